"""Which fast paths can run on this machine, and why the others cannot.

Each probe does the thing, small, instead of reading a version number.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Probe:
    """One fast path. `reason` says why it is not available, or what was found."""

    name: str
    available: bool
    reason: str


def probes() -> list[Probe]:
    """All probes, in a fixed order. Imports torch; takes a few seconds on a GPU."""
    return [
        *_sdpa_backends(),
        _guarded("triton", _triton),
        _guarded("flex attention", _flex_attention),
        _guarded("xformers", _xformers),
        *_cpu_features(),
    ]


def _guarded(name: str, probe: Callable[[], str]) -> Probe:
    """Run a probe that returns what it found or raises why not."""
    try:
        return Probe(name, True, probe())
    except Exception as error:  # whatever a foreign library raises is the answer
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Probe(name, False, first[:160])


class _Absent(Exception):  # noqa: N818 - an answer, not an error
    """Why a probe says no."""


def _sdpa_backends() -> list[Probe]:
    import torch
    from torch.nn.attention import SDPBackend

    backends = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if not torch.cuda.is_available():
        flash = _guarded("sdpa flash", lambda: _sdpa("cpu", SDPBackend.FLASH_ATTENTION))
        others = [Probe(name, False, "needs a CUDA device") for name in list(backends)[1:]]
        return [flash, *others]

    def attempt(backend: SDPBackend) -> Callable[[], str]:
        return lambda: _sdpa("cuda", backend)

    return [_guarded(name, attempt(backend)) for name, backend in backends.items()]


def _sdpa(device: str, backend: object) -> str:
    import torch
    from torch.nn.attention import sdpa_kernel

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    with sdpa_kernel([backend]):  # pyright: ignore[reportArgumentType]
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    if not bool(torch.isfinite(out).all()):
        raise _Absent("it ran and returned values that are not finite")
    return f"ran on {device} in {str(dtype).removeprefix('torch.')}"


def _triton() -> str:
    import torch

    try:
        triton = importlib.import_module("triton")
    except ImportError:
        raise _Absent("triton is not installed (it comes with CUDA builds of torch)") from None
    if not torch.cuda.is_available():
        raise _Absent(f"triton {triton.__version__} is installed, but there is no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 0):
        raise _Absent(f"compute capability {major}.{minor} is below the 7.0 that Triton needs")
    # Triton builds a small C launcher the first time it runs a kernel.
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _Absent("no C compiler on PATH (cc, gcc or clang), which Triton's launcher needs")
    return f"triton {triton.__version__}, compute capability {major}.{minor}, {compiler}"


def _flex_attention() -> str:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.ones(1, 1, 16, 16, device=device, dtype=torch.float32)
    import warnings

    with warnings.catch_warnings():  # uncompiled use is meant here: only "does it run" is asked
        warnings.simplefilter("ignore")
        flex_attention(q, q, q)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if device == "cpu" and compiler is None:
        raise _Absent("runs uncompiled only: no C++ compiler on PATH for torch.compile")
    return f"ran on {device}, uncompiled; torch.compile makes it fast"


def _xformers() -> str:
    try:
        xformers = importlib.import_module("xformers")
    except ImportError:
        raise _Absent("xformers is not installed; nothing here needs it") from None
    return f"xformers {xformers.__version__}"


def _cpu_features() -> list[Probe]:
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError as error:
        return [Probe(f"cpu {name}", False, f"/proc/cpuinfo: {error}") for name in wanted]
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    flags = set(line.partition(":")[2].split())
    return [
        Probe(f"cpu {name}", name in flags, "found" if name in flags else "this CPU lacks it")
        for name in wanted
    ]
