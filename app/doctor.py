"""`kinora doctor`: what this machine has, what works, and why the rest does not."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..kernels.toolchain import probes
from ..pipelines import cards, memory, models
from ..pipelines.errors import ModelError
from ..pipelines.request import DEFAULT_MODEL
from ..pipelines.sidecar import machine

Verdict = Literal["PASS", "WARN", "FAIL"]

_LIBRARIES = (
    "kinora",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "imageio",
    "av",
    "pillow",
    "numpy",
)
_LOW_MEMORY_BYTES = 2 * 10**9
_LOW_DISK_BYTES = 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    subject: str
    text: str


def examine() -> list[Finding]:
    """Every check. A FAIL means that generation cannot work."""
    libraries = _libraries()
    if any(finding.verdict == "FAIL" for finding in libraries):
        return libraries
    broken = _broken_torch()
    if broken is not None:
        others = [it for it in libraries if it.subject != "torch"]
        return [broken, *others, *_room(), _embedded_model(), _encoders()]
    return [*libraries, *_devices(), *_room(), _embedded_model(), _encoders(), *_fast_paths()]


def works(findings: list[Finding]) -> bool:
    """Whether nothing stands in the way of generating."""
    return all(finding.verdict != "FAIL" for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """The report as plain values."""
    return {"works": works(findings), "findings": [asdict(finding) for finding in findings]}


def _libraries() -> list[Finding]:
    found: list[Finding] = []
    for name in _LIBRARIES:
        try:
            found.append(Finding("PASS", name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding("FAIL", name, f"not installed: pip install {name}"))
    return found


def _broken_torch() -> Finding | None:
    """Why torch, which is installed, cannot be imported; None if it can."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        text = f"installed, but cannot be imported ({reason}): install it again"
        return Finding("FAIL", "torch", text)
    return None


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        other = "mps" if torch.backends.mps.is_available() else None
        device = machine("cpu")
        text = f"{device.device}, {device.threads} threads"
        why = "this torch is a CPU build" if torch.version.cuda is None else "no CUDA device found"
        no_gpu = (
            Finding("PASS", "device mps", "Apple GPU")
            if other
            else Finding("WARN", "device cuda", f"{why}: large models will be slow or will not fit")
        )
        return [Finding("PASS", "device cpu", text), no_gpu]
    found: list[Finding] = []
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
        text += f"{memory.amount(memory.free_bytes(device))} free"
        found.append(Finding("PASS", f"device {device}", text))
    return found


def _room() -> list[Finding]:
    free, disk = memory.host_free_bytes(), shutil.disk_usage(Path.cwd()).free
    return [
        Finding(
            "PASS" if free >= _LOW_MEMORY_BYTES else "WARN",
            "memory",
            f"{memory.amount(free)} free for this process",
        ),
        Finding(
            "PASS" if disk >= _LOW_DISK_BYTES else "WARN",
            "disk",
            f"{memory.amount(disk)} free in {Path.cwd()}",
        ),
    ]


def _embedded_model() -> Finding:
    try:
        weights = models.locate(cards.find(DEFAULT_MODEL))
    except ModelError as error:
        return Finding("WARN", DEFAULT_MODEL, str(error))
    size = sum(file.bytes for file in weights.files)
    return Finding("PASS", DEFAULT_MODEL, f"whole, {memory.amount(size)}")


def _encoders() -> Finding:
    import numpy as np

    from ..pipelines.media import encode
    from ..pipelines.request import FORMATS

    broken: list[str] = []
    for media in FORMATS:
        try:
            encode(np.zeros((2, 16, 16, 3), dtype=np.uint8), media, 8.0, "{}")
        except Exception as error:  # whatever the encoder raises is the answer
            broken.append(f"{media}: {error}")
    if broken:
        return Finding("FAIL", "encoders", "; ".join(broken))
    return Finding("PASS", "encoders", ", ".join(FORMATS))


def _fast_paths() -> list[Finding]:
    return [
        Finding("PASS" if probe.available else "WARN", probe.name, probe.reason)
        for probe in probes()
    ]
