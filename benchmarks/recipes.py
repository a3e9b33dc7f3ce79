"""What a recipe gains and what it costs: speed and the judge's verdict, against dense, in one run.

    python benchmarks/recipes.py balanced [--size 256x256] [--prompts 1] [--set PART.OPTION=VALUE]

Every prompt is made dense and by each recipe in turn, with the same seed, through `generate`, on a
loaded model; prompts and meanings are those of `tiny_quality.py`. The difference in *all correct*
is paired: its interval is a bootstrap over prompts. Run nothing beside it.

With `--workers N` the prompts are shared among N processes, on all GPUs: for verdicts over many
prompts. Such processes slow each other, so no times are reported then.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tiny_quality import Group

from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines.generate import generate
from kinora.pipelines.media import read_frames
from kinora.pipelines.models import Shelf
from kinora.pipelines.request import DENSE, Request
from kinora.pipelines.run import Run

RESAMPLES = 10_000


def run_once(request: Request, shelf: Shelf) -> dict[str, Any]:
    """Times, receipt and verdict of one video."""
    run = list(generate(request, shelf=shelf))[-1]
    assert isinstance(run, Run)
    (output,) = run.outputs
    receipt = output.receipt
    assert receipt is not None
    return {
        "denoise_s": run.stages_s["denoise"],
        "total_s": run.total_s,
        "density": receipt.attention.density if receipt.attention else 1.0,
        "words": receipt.words(),
        "path": output.path,
    }


def paired_interval(differences: list[float], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean of `differences` over resampled prompts."""
    rng, count = random.Random(seed), len(differences)
    means = sorted(sum(rng.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def judged(
    options: argparse.Namespace, names: Sequence[str], share: int
) -> dict[int, dict[str, dict[str, Any]]]:
    """Of every `workers`-th prompt from `share` on, by its number: a row for each recipe."""
    width, height = (int(side) for side in options.size.split("x"))
    prompts = Group("recipes", "test", options.things, width).prompts(options.prompts)
    count = torch.cuda.device_count()
    device = f"cuda:{share % count}" if count > 1 and options.workers > 1 else "auto"
    shelf, rows = Shelf(), {}
    with tempfile.TemporaryDirectory() as folder:
        # One short run, so that no recipe pays for loading.
        warm = Request(prompt="a red circle", steps=1, output=folder, device=device)
        list(generate(warm, shelf=shelf))
        for seed in range(share, len(prompts), options.workers):
            prompt, meaning = prompts[seed]
            for name in names:
                request = Request(
                    prompt=prompt,
                    width=width,
                    height=height,
                    steps=options.steps,
                    seed=seed,
                    output=folder,
                    device=device,
                    recipe=name,
                    settings=() if name == DENSE else tuple(options.settings),
                )
                row = run_once(request, shelf)
                seen = judge(read_frames(row.pop("path")), meaning)
                row[ALL_CORRECT] = seen[ALL_CORRECT] or 0.0
                rows.setdefault(seed, {})[name] = row
                print(f"{name}: {row['total_s']:.1f} s, all correct {row[ALL_CORRECT]:g}: {prompt}",
                      flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipes", nargs="+", help="names or files; dense is always run too")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--things", type=int, default=1, help="objects in each")
    parser.add_argument("--workers", type=int, default=1, help="processes; more than 1: no times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [DENSE, *options.recipes]
    work = partial(judged, options, names)
    if options.workers == 1:
        found = work(0)
    else:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            found = {
                k: v for part in pool.map(work, range(options.workers)) for k, v in part.items()
            }
    rows = {name: [found[seed][name] for seed in sorted(found)] for name in names}
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "size": options.size,
        "steps": options.steps,
        "settings": options.settings,
        "prompts": len(found),
        "workers": options.workers,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    dense = rows[DENSE]
    for name, made in rows.items():
        differences = [a[ALL_CORRECT] - b[ALL_CORRECT] for a, b in zip(made, dense, strict=True)]
        report[name] = {
            "density": round(statistics.median(row["density"] for row in made), 3),
            "all correct": sum(row[ALL_CORRECT] for row in made) / len(made),
            "against dense": sum(differences) / len(differences),
            "interval": paired_interval(differences),
            "receipt": made[-1]["words"],
        }
        if options.workers == 1:
            report[name] |= times(made, dense)
        print(f"{name}: {report[name]}", flush=True)
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)


def times(made: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds, and how much faster than dense."""
    medians = {
        key: round(statistics.median(row[key] for row in made), 3)
        for key in ("denoise_s", "total_s")
    }
    whole = statistics.median(row["total_s"] for row in dense)
    return {**medians, "speedup": round(whole / medians["total_s"], 3)}


if __name__ == "__main__":
    main()
