"""Block attention against torch's dense attention: time and effective efficiency.

    python benchmarks/block_attention.py [--tokens 9216] [--tail none complement] [--json FILE]

Plans keep random tiles and are made beforehand. `E = density * T_dense / T_sparse` is 1 where
nothing is lost to gathering, masks and launches. Both run in turn, `--repeats` times; medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kinora.kernels.attention import block_attention
from kinora.kernels.backends import choose
from kinora.kernels.plan import BlockPlan, Tile
from kinora.kernels.problem import Problem

TILES = (Tile(64, 64), Tile(128, 64), Tile(128, 128), Tile(256, 64), Tile(256, 128))
KEEPS = (0.0625, 0.125, 0.25, 0.5, 1.0)


def random_plan(heads: int, tokens: int, tile: Tile, keep: float, tail: str) -> BlockPlan:
    """Of each query tile the share `keep` of key tiles, at least one, drawn at random."""
    rows, columns = -(-tokens // tile.query), -(-tokens // tile.key)
    count = max(1, round(keep * columns))
    order = torch.rand(1, heads, rows, columns).argsort(-1)
    mask = torch.zeros(1, heads, rows, columns, dtype=torch.bool)
    mask.scatter_(-1, order[..., :count], True)
    return BlockPlan.from_mask(
        mask,
        tile=tile,
        queries=tokens,
        keys=tokens,
        tail="complement" if tail == "complement" else "none",
    )


def median_s(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each of `calls`, which take turns; a first turn is not counted."""
    turns: list[list[float]] = []
    for _ in range(repeats + 1):
        turn: list[float] = []
        for call in calls:
            began = time.perf_counter()
            call()
            turn.append(time.perf_counter() - began)
        turns.append(turn)
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, repeats: int
) -> dict[str, Any]:
    """Measure one plan."""
    dense_s, sparse_s = median_s(
        [
            partial(F.scaled_dot_product_attention, q, k, v),
            partial(block_attention, q, k, v, plan),
        ],
        repeats,
    )
    density = float(plan.density().mean())
    return {
        "tokens": plan.queries,
        "tile": f"{plan.tile.query}x{plan.tile.key}",
        "tail": plan.tail,
        "density": density,
        "dense_ms": 1e3 * dense_s,
        "sparse_ms": 1e3 * sparse_s,
        "speedup": dense_s / sparse_s,
        "E": density * dense_s / sparse_s,
        "backend": choose(Problem.of(q, k, v, plan)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2304, 9216])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--keep", type=float, nargs="*", default=KEEPS)
    parser.add_argument("--tail", nargs="*", default=["none"], choices=["none", "complement"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    print("tokens     tile        tail  density     dense    sparse  speed-up     E  backend")
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        q, k, v = (torch.randn(1, options.heads, tokens, options.dim) for _ in range(3))
        tails: list[str] = options.tail
        keeps: list[float] = options.keep
        for tile, tail, keep in itertools.product(TILES, tails, keeps):
            plan = random_plan(options.heads, tokens, tile, keep, tail)
            rows.append(row(q, k, v, plan, options.repeats))
            print(
                "{tokens:6} {tile:>8} {tail:>11} {density:8.3f} {dense_ms:7.1f}ms "
                "{sparse_ms:7.1f}ms {speedup:8.2f}x {E:5.2f}  {backend}".format_map(rows[-1]),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
