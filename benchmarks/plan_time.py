"""How the time of making a plan grows with the number of tokens.

    python benchmarks/plan_time.py [--methods hierarchical top-blocks] [--tile 64x64] [--heads 2]
        [--turns 5] [--json FILE]

Clips of 4 to 64 frames of 64 x 64 tokens, 16,384 to 262,144 in all, 64 channels, random numbers in
float32, on one core. Of each length it tells the processor time of a plan, the least of some turns
once the token order is made, which little disturbs, and the bytes of its lists; of each method the
exponent: the slope of the line through the logarithms of times and tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import METHODS
from kinora.accel.site import Site
from kinora.kernels.plan import BlockPlan

FRAMES = (4, 8, 16, 32, 64)
SETTINGS: dict[str, dict[str, Any]] = {
    "hierarchical": {"blocks": 32},
    "top-blocks": {"keep": 0.25, "tail": "none"},
}
"""Of other methods their defaults."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method on clips of one length."""

    method: str
    words: str
    tokens: int
    heads: int
    plan_ms: float
    list_bytes: int
    density: float


def measured(name: str, options: dict[str, Any], frames: int, heads: int, turns: int) -> Row:
    method, grid = METHODS[name](**options), TokenGrid(frames, 64, 64)
    at = Site(grid, layer=0, layers=1, step=0, steps=1)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, heads, grid.tokens, 64, generator=generator)
    plan = method.plan(q, k, at)
    if plan is None:
        raise SystemExit(f"{method.words()} is dense at {grid.tokens} tokens")
    if not isinstance(plan, BlockPlan):
        raise SystemExit(f"{method.words()} makes no lists of tiles")
    times: list[float] = []
    for _ in range(turns):
        began = time.process_time()
        method.plan(q, k, at)
        times.append(1e3 * (time.process_time() - began))
    size = plan.indices.nbytes + plan.counts.nbytes
    density = method.predict(at)
    return Row(name, method.words(), grid.tokens, heads, min(times), size, density)


def exponent(rows: list[Row]) -> float:
    """The slope of the times over the tokens, both as logarithms."""
    tokens, times = ([math.log(getattr(it, of)) for it in rows] for of in ("tokens", "plan_ms"))
    return statistics.linear_regression(tokens, times).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--methods", nargs="+", default=["hierarchical", "top-blocks"])
    parser.add_argument("--tile", nargs="+", default=["64x64", "256x128"])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a JSON line for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made: list[Row] = []
    for name in options.methods:
        for tile in options.tile:
            rows: list[Row] = []
            for frames in FRAMES:
                given = {"tile": tile, **SETTINGS.get(name, {})}
                row = measured(name, given, frames, options.heads, options.turns)
                rows.append(row)
                print(
                    f"{row.words}: {row.tokens:,} tokens, density {row.density:.4f}, "
                    f"{row.plan_ms:.1f} ms, lists {row.list_bytes / 2**20:.2f} MiB",
                    flush=True,
                )
            print(f"{name}, {tile}: exponent {exponent(rows):.2f}", flush=True)
            made += rows
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in made))


if __name__ == "__main__":
    main()
