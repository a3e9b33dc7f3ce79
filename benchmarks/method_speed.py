"""How fast whole attention calls by each method are, beside cuDNN's dense attention.

    python benchmarks/method_speed.py [--shapes wan-1.3b-480p …] [--methods …] [--json FILE]

A call is all that a run pays for it: the plan, the copies into its order, operands in fewer bits,
attention, and the way back; plans of methods that look at no numbers are kept, as in a run. Queries
and keys are those of a middle layer of `kinora-tiny`, spread over the model's own grid of tokens
and its heads, so that attention is as peaked and as local as recorded. Each result is compared with
dense attention: the error is of the method, not of the kernels. On a CPU this runs the same calls,
of small shapes, to see that it does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention

from kinora.accel.calibration import Tally, observed_steps
from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import METHODS, Paro
from kinora.accel.site import Site
from kinora.accel.tiles import tile_of
from kinora.kernels.attention import block_attention
from kinora.kernels.backends import choose
from kinora.kernels.merging import KERNEL, KeyMerge, merged_attention
from kinora.kernels.precision import INPUT, Precision
from kinora.kernels.problem import Problem
from kinora.pipelines.tiny.recording import recording

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Self-attention of a model at a size."""

    grid: TokenGrid
    heads: int
    head_dim: int
    text: int = 0

    def site(self) -> Site:
        """A call in the middle of a run."""
        return Site(self.grid, 0, 1, 1, 2, text=self.text, text_first=True)


SHAPES = {
    "wan-1.3b-480p": Shape(TokenGrid(21, 30, 52), 12, 128),
    "wan-14b-720p": Shape(TokenGrid(21, 45, 80), 40, 128),
    "cogvideox-5b": Shape(TokenGrid(13, 30, 45), 48, 64, text=226),
    "hunyuan-720p-8-heads": Shape(TokenGrid(30, 48, 80), 8, 128),
    "small": Shape(TokenGrid(4, 16, 20), 2, 64, text=5),
}
TILE, NO_TAIL = {"tile": "128x64"}, {"tail": "none"}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("top-blocks", {"keep": 0.2, "tile": it, **NO_TAIL})
        for it in ("128x64", "128x128", "64x64")
    ),
    ("top-blocks", {"keep": 0.2, "tail": "complement", **TILE}),
    ("threshold-blocks", {"rule": "top", "keep": 0.2, "mass": 0.0, **TILE, **NO_TAIL}),
    ("threshold-blocks", {"beta": 1.0, **TILE, **NO_TAIL}),
    ("x-attention", {"threshold": 0.0, "least": 0.2, **TILE, **NO_TAIL}),
    # SparseD's plan: made once, so that its other calls take this time less the plan's.
    ("x-attention", {"threshold": 0.0, "least": 0.2, "stride": "1", **TILE, **NO_TAIL}),
    ("x-attention", {"threshold": 0.0, "least": 0.2, "stride": "16", "tile": "128x128", **NO_TAIL}),
    ("blade", {"keep": 0.2, "mass": 1.0, **TILE, **NO_TAIL}),
    *(
        ("blade", {"keep": 0.2, "mass": 1.0, "tile": it, "tail": "complement"})
        for it in ("128x64", "256x128")
    ),
    *(("permuted-blocks", {"keep": 0.2, "tile": it, **NO_TAIL}) for it in ("128x64", "128x128")),
    ("hierarchical", {"blocks": 100, **TILE, **NO_TAIL}),
    ("kv-merge", {"keep": 0.25}),
    ("kv-merge", {"keep": 0.5}),
    ("sliding-tile", {"frames": 0.6, "height": 0.58, "width": 0.58, **TILE, **NO_TAIL}),
    # About a fifth of each grid, by windows that fill tiles of its own sides best.
    *(
        ("neighborhood", {"frames": frames, "height": height, "width": width, **TILE})
        for frames, height, width in (
            (0.6, 0.6, 0.6),
            (0.4, 0.8, 0.6),
            (1.0, 0.3, 0.6),
            (0.3, 0.6, 1.0),
        )
    ),
    ("vmoba", {"keep": 0.2, **TILE}),
    ("vmoba", {"keep": 0.2, "shared": False, **TILE}),
    *(("paro", {"tile": tile}) for tile in ("128x64", "64x64")),
]
PRECISIONS = (Precision(), Precision("int8"), Precision("int8", "fp8"))


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one shape; times in milliseconds.

    `density` is of pairs of tokens that are attended to, `computed` of those that the kernels go
    over, as predicted.
    """

    shape: str
    method: str
    setting: str
    precision: str
    kernel: str
    density: float
    computed: float
    plan_ms: float
    ms: float
    dense_ms: float
    speedup: float
    error: float


def tensors(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    """Recorded queries, keys and values on the grid of `shape`, `[1, H, L, D]`."""
    (found,) = recording(layers=(5,), steps=(1,), of=4, device=device).values()
    old, generator = TokenGrid(9, 32, 32), torch.Generator(device).manual_seed(0)
    sides = shape.grid.frames, shape.grid.height, shape.grid.width
    made: list[torch.Tensor] = []
    for x in found:
        parts: list[torch.Tensor] = []
        for head in range(shape.heads):
            # As many recorded heads side by side as the width asks for.
            count = shape.head_dim // x.shape[3]
            own = torch.cat([x[0, (head + i) % x.shape[1]] for i in range(count)], dim=-1).float()
            volume = own.T.reshape(1, -1, old.frames, old.height, old.width)
            spread = interpolate(volume, size=sides, mode="trilinear").flatten(2)[0].T
            # What lies between tokens is smoother than they are: their own variance again.
            noise = torch.randn(spread.shape, generator=generator, device=device)
            missing = (own.var(0) - spread.var(0)).clamp(min=0.01 * own.var()).sqrt()
            text = torch.randn(
                shape.text, own.shape[1], generator=generator, device=device
            ) * own.std(0) + own.mean(0)
            parts.append(torch.cat([text, spread + noise * missing]))
        # In a model's own memory, [B, L, H, D].
        made.append(torch.stack(parts, dim=1)[None].to(dtype).transpose(1, 2))
    q, k, v = made
    return q, k, v


def median_ms(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of a call."""
    if device == "cuda":
        do_bench: Callable[..., Any] = importlib.import_module("triton.testing").do_bench
        return float(do_bench(call, warmup=25, rep=100, return_mode="median"))
    times: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def made(
    name: str, options: dict[str, Any], q: Any, k: Any, site: Site, folder: Path
) -> AttentionMethod:
    """The method; `paro` is calibrated on the call itself, in these tiles, to keep a fifth."""
    if name != "paro":
        return METHODS[name](**options)
    tally = Tally(keep=0.2, tile=tile_of(options["tile"]))
    for step in observed_steps(site.steps):
        tally.observe(q, k, replace(site, step=step))
    file = folder / "paro.npz"
    file.write_bytes(tally.finish("recorded", site).to_bytes())
    return Paro(calibration=str(file))


def measured(
    name: str, shape: Shape, chosen: Sequence[str], device: str, folder: Path
) -> Iterator[Row]:
    """A row for each method, setting and precision; dense attention before and after each."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = tensors(shape, device, dtype)
    site = shape.site()
    backend = SDPBackend.CUDNN_ATTENTION if device == "cuda" else SDPBackend.FLASH_ATTENTION

    def dense() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    exact = dense()
    for method_name, options in SETTINGS:
        if method_name not in chosen:
            continue
        method = made(method_name, options, q, k, site, folder)
        plan = method.plan(q, k, site)
        if plan is None:
            print(f"{name} {method.words()}: dense {method.why_dense(site)}", flush=True)
            continue
        density = float(plan.density().mean())
        plan_ms = median_ms(lambda method=method: method.plan(q, k, site), device)
        before, found = median_ms(dense, device), list[tuple[Precision, str, float, float]]()
        for precision in PRECISIONS:
            if isinstance(plan, KeyMerge):
                if precision != INPUT:
                    continue
                kernel = KERNEL
            else:
                kernel = choose(Problem.of(q, k, v, plan, precision))
            if kernel == "reference":
                continue  # nothing is timed that is there to be read

            def call(method: AttentionMethod = method, it: Precision = precision) -> torch.Tensor:
                again = method.plan(q, k, site)
                assert again is not None
                if isinstance(again, KeyMerge):
                    return merged_attention(q, k, v, again)
                return block_attention(q, k, v, again, precision=it)[0]

            error = float((call() - exact).float().norm() / exact.float().norm())
            found.append((precision, kernel, median_ms(call, device), error))
        dense_ms = (before + median_ms(dense, device)) / 2
        for precision, kernel, ms, error in found:
            yield Row(
                name, method_name, str(options), str(precision), kernel, round(density, 4),
                round(method.computed(site), 4), round(plan_ms, 3), round(ms, 3),
                round(dense_ms, 3), round(dense_ms / ms, 3), round(error, 4),
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    cuda = torch.cuda.is_available()
    shapes = [it for it in SHAPES if it != "small"] if cuda else ["small"]
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=shapes)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path, help="a JSON line for each row, with the machine")
    options = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    machine = {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
    }
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            for row in measured(name, SHAPES[name], options.methods, device, Path(folder)):
                print(
                    f"{row.shape:14} {row.method:17} {row.setting:58} {row.precision:14} "
                    f"{row.kernel:7} density {row.density:.3f} of {row.computed:.3f} "
                    f"plan {row.plan_ms:8.3f} all "
                    f"{row.ms:8.3f} dense {row.dense_ms:8.3f} ms {row.speedup:6.2f} times "
                    f"error {row.error:.3f}",
                    flush=True,
                )
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps({**asdict(row), **machine}) + "\n")


if __name__ == "__main__":
    main()
