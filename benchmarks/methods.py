"""What attention methods select: attention mass and output error, beside chance and an oracle.

    python benchmarks/methods.py [--methods top-blocks …] [--layers 1 4 8] [--steps 1 4 8]
        [--calibrations FILE …] [--cache FILE] [--json FILE] [--plot FILE]

Queries, keys and values are those of `kinora-tiny` at 256 x 256 (9,216 tokens), some layers and
steps of ten. Of each plan it tells the density, the share of the attention mass that falls on kept
tiles (recall), and the relative error of the output with nothing and with means (tail) in the place
of what is left out. Beside it the recall and the error of plans with as many tiles in each row,
drawn at random and, as an oracle, those of the largest true mass. Of `kv-merge`, which keeps no
tiles, it tells the share of the keys that is left and the error, beside keys that join at random.

`paro` is tried with each of the calibrations, which `kinora calibrate kinora-tiny --size 256x256
--steps 10 --seed 1 --keep 0.25 --tile 64x64 --output FILE` makes, of another prompt than the one
recorded here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kinora.accel.calibration import Calibration
from kinora.accel.grid import TokenGrid
from kinora.accel.inspection import tile_mass
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import METHODS, KvMerge
from kinora.accel.site import Site
from kinora.kernels.attention import block_attention
from kinora.kernels.merging import KeyMerge, merged_attention
from kinora.kernels.plan import BlockPlan
from kinora.pipelines.tiny.recording import Recording, recording

GRID = TokenGrid(9, 32, 32)
LAYERS, STEPS = 10, 10
WINDOW = {"frames": 0.6, "height": 0.5, "width": 0.3}
SETTINGS: dict[str, Sequence[dict[str, Any]]] = {
    "top-blocks": [
        *(
            {"keep": keep, "tile": tile}
            for tile in ("256x128", "64x64")
            for keep in (0.125, 0.25, 0.5)
        ),
        {"keep": 0.25, "tile": "256x128", "order": "raster"},
    ],
    "threshold-blocks": [
        *({"rule": "sigma", "beta": beta, "tile": "64x64"} for beta in (0.5, 1.0, 1.5)),
        *({"rule": "top", "keep": 0.1, "mass": mass, "tile": "64x64"} for mass in (0.5, 0.8)),
    ],
    "x-attention": [{"threshold": it, "least": 0.0, "tile": "64x64"} for it in (0.5, 0.7, 0.9)],
    "sliding-tile": [
        {"tile": "64x64", "frames": 0.6, "height": 0.5, "width": 0.5},
        {"tile": "64x64", "frames": 1.0, "height": 0.3, "width": 0.3},
    ],
    "neighborhood": [
        {"tile": "64x64", **WINDOW},
        {"tile": "64x64", "frames": 1.0, "height": 0.3, "width": 0.3},
        {"tile": "64x64", **WINDOW, "stride_frames": 1, "stride_height": 1, "stride_width": 1},
    ],
    "blade": [{"keep": it, "tile": "64x64"} for it in (0.125, 0.25, 0.5)],
    "hierarchical": [
        # Of 144 tiles: one, two and three levels.
        *({"blocks": it, "branch": 4, "tile": "64x64"} for it in (36, 18, 8)),
        *({"blocks": it, "levels": 1, "tile": "64x64"} for it in (18, 8)),
        {"blocks": 18, "branch": 4, "tile": "64x64", "order": "morton"},
    ],
    "permuted-blocks": [
        *({"keep": keep, "tile": "64x64"} for keep in (0.125, 0.25, 0.5)),
        *({"keep": 0.25, "segment": it, "tile": "64x64"} for it in ("1024", "frame", "clip")),
        *({"keep": 0.25, "samples": it, "tile": "64x64"} for it in (32, 512)),
        {"keep": 1.0, "mass": 0.9, "tile": "64x64"},
        {"keep": 0.25, "tile": "256x128"},
        {"keep": 0.25, "tile": "256x128", "order": "raster"},
    ],
    "kv-merge": [
        *({"keep": keep} for keep in (0.5, 0.25)),
        {"keep": 0.5, "likeness": "cosine"},
        {"keep": 0.5, "heads": "shared"},
        *({"keep": keep, "cell": "1x3x3"} for keep in (0.25, 0.125)),
        {"keep": 0.25, "cell": "2x2x2"},
    ],
    "vmoba": [
        *(
            {"keep": keep, "tile": "64x64", "shared": shared}
            for shared in (False, True)
            for keep in (0.125, 0.25)
        ),
        {"rule": "similarity", "scope": "head", "tile": "64x64", "shared": False},
        {"rule": "softmax", "mass": 0.5, "tile": "64x64", "shared": False},
    ],
}
"""What is tried where nothing is said; a method without an entry is tried with its defaults."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting on one recording, mean over heads; errors are of the whole output.

    `error_tail` of plans that can have no tail, since they mask tokens, is `error`. Of merged keys
    there is neither recall nor tail nor oracle; random are those that join.
    """

    method: str
    setting: str
    layer: int
    step: int
    density: float
    recall: float | None
    recall_random: float | None
    recall_oracle: float | None
    error: float
    error_tail: float | None
    error_random: float
    error_oracle: float | None
    plan_ms: float


def with_scores(plan: BlockPlan, scores: torch.Tensor) -> BlockPlan:
    """A plan that keeps as many tiles in each row as `plan`, those of the largest scores.

    Where it masks tokens within tiles: as many as have its pairs of tokens.
    """
    counts = plan.tiles_as_many().expand(*scores.shape[:3])
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    mask = ranks < counts[..., None]
    made = BlockPlan.from_mask(mask, tile=plan.tile, queries=plan.queries, keys=plan.keys)
    return dataclasses.replace(made, order=plan.order, key_order=plan.key_order)


def measured(
    method: AttentionMethod, setting: str, found: Recording, masses: dict[Any, torch.Tensor]
) -> Iterator[Row]:
    """A row for each recording."""
    for (step, layer), (q, k, v) in found.items():
        site = Site(GRID, layer=layer, layers=LAYERS, step=step, steps=STEPS)
        began = time.perf_counter()
        plan = method.plan(q, k, site)
        plan_ms = 1e3 * (time.perf_counter() - began)
        if plan is None:
            continue
        dense = scaled_dot_product_attention(q, k, v)
        if isinstance(method, KvMerge) and isinstance(plan, KeyMerge):
            yield merged(method, setting, site, (q, k, v), dense, plan, plan_ms)
            continue
        assert isinstance(plan, BlockPlan)
        # Orders that the numbers or a calibration make are those of a setting.
        order = None if plan.key_order is not None else getattr(method, "order", None)
        at = step, layer, plan.tile, order or (method.name, setting)
        if at not in masses:
            masses[at] = tile_mass(q, k, plan)
        mass = masses[at]
        heights = torch.full((plan.rows,), float(plan.tile.query))
        heights[-1] = plan.queries - (plan.rows - 1) * plan.tile.query

        def recall(plan: BlockPlan, mass: torch.Tensor, heights: torch.Tensor) -> float:
            kept = (plan.mask() * mass).sum(-1)
            return float((kept * heights).sum(-1).mean() / heights.sum())

        def error(plan: BlockPlan, q: Any, k: Any, v: Any, dense: torch.Tensor) -> float:
            out, _ = block_attention(q, k, v, plan)
            return float((out - dense).norm() / dense.norm())

        chance = with_scores(
            plan, torch.rand(mass.shape, generator=torch.Generator().manual_seed(0))
        )
        oracle = with_scores(plan, mass)
        plain = dataclasses.replace(plan, tail="none")
        masked = plan.within is not None  # a plan that has no tail
        held = tile_mass(q, k, plan, kept=True) if masked else mass
        error_plain = error(plain, q, k, v, dense)
        error_tail = error_plain
        if not masked:
            error_tail = error(dataclasses.replace(plan, tail="complement"), q, k, v, dense)
        yield Row(
            method=method.name,
            setting=setting,
            layer=layer,
            step=step,
            density=float(plan.density().mean()),
            recall=recall(plan, held, heights),
            recall_random=recall(chance, mass, heights),
            recall_oracle=recall(oracle, mass, heights),
            error=error_plain,
            error_tail=error_tail,
            error_random=error(chance, q, k, v, dense),
            error_oracle=error(oracle, q, k, v, dense),
            plan_ms=plan_ms,
        )


def merged(
    method: KvMerge,
    setting: str,
    site: Site,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dense: torch.Tensor,
    plan: KeyMerge,
    plan_ms: float,
) -> Row:
    """A row of merged keys: no tile is left out, so that there is nothing to recall."""
    scores = method.scores(qkv[1], site)
    drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))

    def error(plan: KeyMerge) -> float:
        return float((merged_attention(*qkv, plan) - dense).norm() / dense.norm())

    return Row(
        method=method.name,
        setting=setting,
        layer=site.layer,
        step=site.step,
        density=float(plan.density()),
        recall=None,
        recall_random=None,
        recall_oracle=None,
        error=error(plan),
        error_tail=None,
        error_random=error(method.with_likeness(drawn, site)),
        error_oracle=None,
        plan_ms=plan_ms,
    )


def told(setting: dict[str, Any]) -> str:
    if "calibration" in setting:
        found = Calibration.read(Path(setting["calibration"]))
        return f"calibrated to keep {found.keep:g}, tile {found.tile}"
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "defaults"


def recorded(options: argparse.Namespace) -> Recording:
    """Recordings, from the cache where it has them."""
    wanted = set(itertools.product(options.steps, options.layers))
    if options.cache and options.cache.exists():
        kept: Recording = torch.load(options.cache, weights_only=True)
        if wanted <= set(kept):
            return {key: kept[key] for key in sorted(wanted)}
    found = recording(layers=options.layers, steps=options.steps, of=STEPS)
    if options.cache:
        torch.save(found, options.cache)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Recall and error over density, a line a method and tile; chance and oracle beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    colours = dict(zip(METHODS, matplotlib.colormaps["tab20"](range(20)), strict=False))
    variants: Counter[str] = Counter()
    named: dict[str, list[tuple[float, float, float]]] = {}
    for (method, setting), group in grouped(rows):
        of = "cell 1x2x2" if method == "kv-merge" else "tile 128x64"
        parts = setting.split(", ")
        tile = next((it for it in parts if it.startswith(("tile ", "cell "))), of)
        ways = [it for it in parts if it.startswith(_WAYS)]
        named.setdefault(", ".join([method, tile.partition(" ")[2], *ways]), []).append(
            (mean(group, "density"), mean(group, "recall"), mean(group, "error"))
        )
    for name, points in sorted(named.items()):
        points.sort()
        method = name.partition(",")[0]
        look: dict[str, Any] = {"color": colours[method], "marker": "os^Dv*"[variants[method]]}
        variants[method] += 1
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([it[0] for it in points], [it[column] for it in points], label=name, **look)
    for axis, kind in zip(axes, ("recall", "error"), strict=True):
        for beside, style in (("random", ":"), ("oracle", "--")):
            points = sorted(
                (row.density, getattr(row, f"{kind}_{beside}"))
                for row in rows
                if row.recall is not None  # chance and oracle of tiles
            )
            bins = [(a, [y for x, y in points if a <= x < a + 0.1]) for a in (0.05, 0.2, 0.45)]
            shown = [(a + 0.05, statistics.mean(ys)) for a, ys in bins if ys]
            axis.plot(*zip(*shown, strict=True), style, color="gray", label=beside)
        axis.set(xlabel="density", ylabel=kind)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)


def grouped(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Rows of the same setting."""
    keys = dict.fromkeys((row.method, row.setting) for row in rows)
    for key in keys:
        yield key, [row for row in rows if (row.method, row.setting) == key]


def mean(rows: Sequence[Row], name: str) -> float:
    """NaN where there is no such number."""
    found = (getattr(row, name) for row in rows)
    return statistics.mean(math.nan if it is None else it for it in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--calibrations", nargs="+", type=Path, default=[], help="files for paro")
    parser.add_argument("--cache", type=Path, help="a file for the recordings")
    parser.add_argument("--json", type=Path, help="a JSON line for each row")
    parser.add_argument("--plot", type=Path, help="a PNG of recall and error over density")
    options = parser.parse_args()
    settings = {**SETTINGS, "paro": [{"calibration": str(it)} for it in options.calibrations]}
    found = recorded(options)
    rows: list[Row] = []
    masses: dict[Any, torch.Tensor] = {}
    print("method, setting: density; recall (random, oracle); error (tail; random, oracle); plan")
    for name in options.methods:
        if name == "paro" and not options.calibrations:
            print("paro: left out, it needs --calibrations", flush=True)
        for setting in settings.get(name, [{}]):
            made = list(measured(METHODS[name](**setting), told(setting), found, masses))
            rows += made
            if not made:
                print(f"{name}, {told(setting)}: dense", flush=True)
                continue
            ((_, group),) = grouped(made)
            it = {key: mean(group, key) for key in ("density", *_SHOWN)}
            print(
                f"{name}, {told(setting)}: {it['density']:.3f}; {it['recall']:.3f} "
                f"({it['recall_random']:.3f}, {it['recall_oracle']:.3f}); {it['error']:.3f} "
                f"({it['error_tail']:.3f}; {it['error_random']:.3f}, {it['error_oracle']:.3f}); "
                f"{it['plan_ms']:.0f} ms", flush=True,
            )  # fmt: skip
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if options.plot:
        plot(rows, options.plot)


_WAYS = ("order ", "segment ", "scope ", "shared ", "likeness ", "heads ")
_SHOWN = (
    *("recall", "recall_random", "recall_oracle", "error", "error_tail"),
    *("error_random", "error_oracle", "plan_ms"),
)


if __name__ == "__main__":
    main()
