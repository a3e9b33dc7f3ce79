"""Block attention on a GPU or CPU against torch's dense attention: right first, then how fast.

    python benchmarks/attention.py [--shapes 12x32768x128] [--tiles 128x64] [--densities 0.2 0.1]
        [--tails none complement] [--precisions input.input int8.fp8] [--backends hopper] [--json F]

Shapes are heads x tokens x channels. Every combination is first compared with the reference on a
ragged 1,000 tokens; where it errs, no time is printed. Plans keep random tiles and are made
beforehand; everything that the call itself does is in its time: pooling, quantising, launches.
E = density x dense time / own time, with the fastest of torch's dense kernels in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kinora.kernels.attention import block_attention
from kinora.kernels.backends import BACKENDS, refuses
from kinora.kernels.plan import BlockPlan, Tail, Tile, tiles_of
from kinora.kernels.precision import Precision
from kinora.kernels.problem import Problem

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DENSE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if CUDA else (None,)
LARGEST_ERROR = {"input.input": 5e-3}
"""Relative, of the whole output, against float64; 8 bits lose up to 0.06."""

Shape = tuple[int, int, int]


def random_case(
    shape: Shape, tile: Tile, density: float, tail: Tail
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    """q, k, v `[1, H, L, D]` as models have them, and a plan of random tiles."""
    heads, tokens, dim = shape
    dtype = torch.bfloat16 if CUDA else torch.float32
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    rows, columns = tiles_of(tokens, tile.query), tiles_of(tokens, tile.key)
    width = max(1, round(density * columns))
    chosen = torch.rand(1, heads, rows, columns, device=DEVICE).argsort(-1)[..., :width]
    counts = torch.full((1, heads, rows), width, dtype=torch.int32, device=DEVICE)
    indices = chosen.sort(-1).values.int().contiguous()
    return q, k, v, BlockPlan(indices, counts, tile, tokens, tokens, tail)


def median_ms(call: Callable[[], object]) -> float:
    """Of as many calls as go into a tenth of a second on a GPU, of five on a CPU."""
    if CUDA:
        from triton.testing import do_bench

        return float(cast(Any, do_bench)(call, warmup=25, rep=100, return_mode="median"))
    times: list[float] = []
    for _ in range(6):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def dense_ms(shape: Shape) -> dict[str, float]:
    """Median time of each of torch's dense kernels."""
    q, k, v, _ = random_case(shape, Tile(), 0.1, "none")
    found: dict[str, float] = {}
    for backend in DENSE:
        call = partial(scaled_dot_product_attention, q, k, v)
        if backend is None:
            found["cpu"] = median_ms(call)
            continue
        with sdpa_kernel(backend):
            found[backend.name.partition("_")[0].lower()] = median_ms(call)
    return found


def error(shape: Shape, tile: Tile, tail: Tail, precision: Precision, backend: str) -> float:
    """Against the reference in float64, on fewer and ragged tokens."""
    q, k, v, plan = random_case((2, 1000, shape[2]), tile, 0.5, tail)
    out, _ = block_attention(q, k, v, plan, precision=precision, backend=backend)
    exact, _ = block_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    return float((out.double() - exact).norm() / exact.norm())


def row(
    shape: Shape,
    tile: Tile,
    density: float,
    tail: Tail,
    precision: Precision,
    backend: str,
    dense: float,
) -> dict[str, Any]:
    """One line of the table: a time, or why there is none."""
    names = f"{precision.qk}.{precision.pv}"
    told: dict[str, Any] = {
        "shape": "x".join(map(str, shape)), "tile": f"{tile.query}x{tile.key}", "tail": tail,
        "precision": names, "backend": backend,
    }  # fmt: skip
    q, k, v, plan = random_case(shape, tile, density, tail)
    reason = refuses(Problem.of(q, k, v, plan, precision), backend)
    if reason:
        return told | {"refused": reason}
    told["error"] = error(shape, tile, tail, precision, backend)
    if not told["error"] <= LARGEST_ERROR.get(names, 0.06):
        return told | {"refused": f"it errs by {told['error']:.3g}"}
    call = partial(block_attention, q, k, v, plan, precision=precision, backend=backend)
    if CUDA:
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        told["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        del out
    told["density"] = float(plan.density().mean())
    told["ms"] = median_ms(call)
    told["tflops_on_kept"] = (
        4e-9 * told["density"] * shape[0] * shape[1] ** 2 * shape[2] / told["ms"]
    )
    return told | {"e": told["density"] * dense / told["ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    shapes = ["12x32768x128", "48x17776x64"] if CUDA else ["4x4608x64"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="HxNxD")
    parser.add_argument("--tiles", nargs="+", default=["128x64", "128x128"], metavar="QxK")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1])
    parser.add_argument("--tails", nargs="+", default=["none"], choices=["none", "complement"])
    parser.add_argument("--precisions", nargs="+", default=["input.input"])
    parser.add_argument(
        "--backends", nargs="+", default=["hopper", "triton"] if CUDA else ["cpu"], choices=BACKENDS
    )
    parser.add_argument("--json", type=Path, help="a JSON line for each line of the table")
    options = parser.parse_args()
    machine = {
        "machine": torch.cuda.get_device_name() if CUDA else platform.processor() or "cpu",
        "torch": torch.__version__,
        "dtype": "bfloat16" if CUDA else "float32",
    }
    tiles = [Tile(*map(int, it.split("x"))) for it in options.tiles]
    precisions = [Precision(*it.split(".")) for it in options.precisions]
    tails = cast(list[Tail], options.tails)
    backends = cast(list[str], options.backends)
    densities = cast(list[float], options.densities)
    lines: list[str] = []
    for shape in (cast(Shape, tuple(map(int, it.split("x")))) for it in options.shapes):
        torch.manual_seed(0)
        dense = dense_ms(shape)
        told = "".join(f" {name} {value:.3f} ms" for name, value in dense.items())
        print(f"{'x'.join(map(str, shape))}: dense{told}", flush=True)
        for case in itertools.product(tiles, tails, precisions, backends, densities):
            tile, tail, precision, backend, density = case
            made = row(shape, tile, density, tail, precision, backend, min(dense.values()))
            lines.append(json.dumps(machine | {"dense_ms": dense} | made))
            print("  " + words(made), flush=True)
    if options.json:
        options.json.write_text("".join(f"{line}\n" for line in lines))


def words(made: dict[str, Any]) -> str:
    """A row as it is printed."""
    begin = "{backend:9} {tile:8} {tail:10} {precision:12}".format_map(made)
    if "refused" in made:
        return f"{begin} no time: {made['refused']}"
    end = "density {density:.3f}  {ms:9.3f} ms  E {e:.3f}  error {error:.1e}"
    return f"{begin} {end.format_map(made)}"


if __name__ == "__main__":
    main()
