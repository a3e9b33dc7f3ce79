"""What a recipe gains and what it costs: speed and the judge's verdict, against dense, in one run.

    python benchmarks/recipes.py balanced [--size 256x256] [--prompts 1] [--set PART.OPTION=VALUE]

Every prompt is made dense and by each recipe in turn, with the same seed, through `generate`, on a
loaded model; prompts and meanings are those of `tiny_quality.py`. The difference in *all correct*
is paired: its interval is a bootstrap over prompts. Run nothing beside it.

Frames are kept without loss: PSNR and SSIM are of a video to the dense one of the same prompt, mean
over its frames.

`benchmarks/recipes/*.toml` are settings of every method. Those of `paro` want a calibration each,
in the folder that the command runs in: `kinora calibrate kinora-tiny --size 256x256 --steps 30
--seed 1 --keep 0.25 --output paro-25.npz`, and of .15 and .4.

With `--workers N` the prompts are shared among N processes, on all GPUs: for verdicts over many
prompts. Such processes slow each other, so no times are reported then. With `--rows FILE` each
video's row is kept as soon as it is there, and a later run of the same command, with more prompts
too, goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import skimage.metrics
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


def likeness(made: Any, dense: Any) -> dict[str, float]:
    """PSNR in dB, at most 99, and SSIM of frames `[F, height, width, 3]` uint8 to dense ones."""
    metrics: Any = skimage.metrics
    pairs = list(zip(dense, made, strict=True))
    with np.errstate(divide="ignore"):  # of equal frames
        psnr = [min(99.0, float(metrics.peak_signal_noise_ratio(a, b))) for a, b in pairs]
    ssim = [float(metrics.structural_similarity(a, b, channel_axis=-1)) for a, b in pairs]
    return {
        "psnr": round(statistics.fmean(psnr), 3),
        "ssim": round(statistics.fmean(ssim), 5),
    }


def paired_interval(differences: list[float], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean of `differences` over resampled prompts."""
    rng, count = random.Random(seed), len(differences)
    means = sorted(sum(rng.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


Rows = dict[tuple[int, str], dict[str, Any]]
"""By the number of the prompt and the recipe's name."""


def kept_rows(path: Path | None, asked: dict[str, Any]) -> Rows:
    """What an earlier run of the same command left in `path`; what was asked goes in first."""
    if path is None:
        return {}
    if not path.exists():
        path.write_text(json.dumps(asked) + "\n")
        return {}
    first, *lines = path.read_text().splitlines()
    header = json.loads(first)
    # A prompt is the same whatever their number; times are those of one worker.
    free = [
        "prompts",
        "first",
        *(["workers"] if min(header["workers"], asked["workers"]) > 1 else []),
    ]
    if header | {it: asked[it] for it in free} != asked:
        raise SystemExit(f"{path} is of another command, {first}; name another file")
    rows = {(row["seed"], row["recipe"]): row for row in map(json.loads, lines)}
    wanted = range(asked["first"], asked["first"] + asked["prompts"])
    return {key: row for key, row in rows.items() if key[0] in wanted}


def judged(options: argparse.Namespace, names: Sequence[str], done: Rows, share: int) -> Rows:
    """Rows of every `workers`-th prompt from `share` on that are not `done`."""
    width, height = (int(side) for side in options.size.split("x"))
    prompts = Group("recipes", "test", options.things, width).prompts(
        options.first + options.prompts
    )
    count = torch.cuda.device_count()
    device = f"cuda:{share % count}" if count > 1 and options.workers > 1 else "auto"
    if options.workers > 1:
        # Threads that wait for each other on too few cores stand still.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    seeds = range(options.first + share, len(prompts), options.workers)
    left = [(seed, name) for seed in seeds for name in names if (seed, name) not in done]
    # Others are compared with its frames, so it is made again where they go on.
    again = {seed for seed, _ in left}
    left = [(seed, name) for seed in seeds for name in names
            if (seed, name) in left or (seed in again and name == DENSE)]  # fmt: skip
    frames: dict[int, Any] = {}
    shelf, rows = Shelf(), Rows()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        # One short run, so that no recipe pays for loading.
        warm = Request(prompt="a red circle", steps=1, output=folder, format="png", device=device)
        list(generate(warm, shelf=shelf))
        print(f"worker {share}: loaded on {device} in {time.perf_counter() - began:.1f} s, "
              f"{len(left)} videos to go", flush=True)  # fmt: skip
        for seed, name in left:
            if options.minutes and time.perf_counter() - began > 60 * options.minutes:
                break
            prompt, meaning = prompts[seed]
            request = Request(
                prompt=prompt,
                width=width,
                height=height,
                steps=options.steps,
                seed=seed,
                output=folder,
                format="png",
                device=device,
                recipe=name,
                settings=() if name == DENSE else tuple(options.settings),
            )
            row: dict[str, Any] = {"seed": seed, "recipe": name} | run_once(request, shelf)
            path = Path(row.pop("path"))
            made = read_frames(path)
            row[ALL_CORRECT] = judge(made, meaning)[ALL_CORRECT] or 0.0
            path.unlink()
            if name == DENSE:
                frames = {seed: made}
            else:
                row |= likeness(made, frames[seed])
            rows[seed, name] = row
            if options.rows:
                with options.rows.open("a") as file:  # one write of one line: workers share it
                    file.write(json.dumps(row) + "\n")
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
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--minutes", type=float, help="begin no video after these")
    parser.add_argument("--things", type=int, default=1, help="objects in each")
    parser.add_argument("--workers", type=int, default=1, help="processes; more than 1: no times")
    parser.add_argument("--rows", type=Path, help="JSON lines that are kept and gone on with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [DENSE, *options.recipes]
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "size": options.size,
        "steps": options.steps,
        "settings": options.settings,
        "things": options.things,
        "first": options.first,
        "prompts": options.prompts,
        "workers": options.workers,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    found = kept_rows(options.rows, report)
    work = partial(judged, options, names, found)
    if options.workers == 1:
        found = found | work(0)
    else:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for part in pool.map(work, range(options.workers)):
                found = found | part
    seeds = sorted({seed for seed, _ in found if all((seed, name) in found for name in names)})
    if not seeds:
        raise SystemExit("no prompt is done by all recipes: give it more --minutes")
    report["done"] = len(seeds)
    rows = {name: [found[seed, name] for seed in seeds] for name in names}
    dense = rows[DENSE]
    for name, made in rows.items():
        differences = [a[ALL_CORRECT] - b[ALL_CORRECT] for a, b in zip(made, dense, strict=True)]
        report[name] = {
            "density": round(statistics.median(row["density"] for row in made), 3),
            "all correct": sum(row[ALL_CORRECT] for row in made) / len(made),
            "against dense": sum(differences) / len(differences),
            "interval": paired_interval(differences),
            "psnr": mean_of(made, "psnr"),
            "ssim": mean_of(made, "ssim"),
            "receipt": made[-1]["words"],
        }
        if options.workers == 1:
            report[name] |= times(made, dense)
        print(f"{name}: {report[name]}", flush=True)
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)


def mean_of(made: list[dict[str, Any]], key: str) -> float | None:
    """None where no row has it, as those of dense attention."""
    values = [row[key] for row in made if key in row]
    return round(statistics.fmean(values), 4) if values else None


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
