"""What a recipe gains and what it costs: speed and the judge's verdict, against dense, in one run.

    python benchmarks/recipes.py balanced [--size 256x256] [--prompts 1] [--set PART.OPTION=VALUE]

Every prompt is made dense and by each recipe in turn, with the same seed, through `generate`, on a
loaded model; prompts and meanings are those of `tiny_quality.py`. The difference in *all correct*
is paired: its interval is a bootstrap over prompts. Run nothing beside it.

*predicted* is the speed-up by the cost rule: the dense run's other stages, and its denoising as
many times faster as sparse attention in the steps that were evaluated is foretold to be.

Frames are kept without loss: PSNR and SSIM are of a video to the dense one of the same prompt, mean
over its frames. For verdicts over many prompts there is `verdicts.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.metrics
import torch
from tiny_quality import Group

from kinora.accel.cost import together
from kinora.accel.recipe import from_table
from kinora.eval.paired import mean_interval
from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines import cards, models, planning
from kinora.pipelines.generate import generate
from kinora.pipelines.media import read_frames
from kinora.pipelines.models import Shelf
from kinora.pipelines.request import DENSE, Request, resolve
from kinora.pipelines.run import Run


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
        "nfe": receipt.policy.evaluations if receipt.policy else run.request.steps,
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


def predicted_s(
    recipe: str, made: dict[str, Any], dense: dict[str, Any], options: argparse.Namespace
) -> float:
    """Seconds of a run by the cost rule: the dense run's, its denoising as much faster as foretold.

    With sparse attention as `kinora plan` predicts it, in as many steps as were evaluated.
    """
    width, height = (int(side) for side in options.size.split("x"))
    request = Request(prompt="a red circle", width=width, height=height, steps=options.steps,
                      recipe=recipe, settings=tuple(options.settings))  # fmt: skip
    card = cards.find(request.model)
    place = models.place(card, "auto", "auto")
    resolved = resolve(request, card)
    resolved = resolved.model_copy(update={"device": place.device, "dtype": place.dtype})
    chosen, by_step = from_table(resolved.recipe), (1.0,) * options.steps
    if chosen.attention is not None:
        shape = planning.shape_of(models.locate(card).folder)
        by_step = planning.predicted(resolved, shape).by_step
    window = range(options.steps) if chosen.steps is None else chosen.steps.window(options.steps)
    faster = together(by_step, made["nfe"], window)
    return dense["total_s"] - dense["denoise_s"] + dense["denoise_s"] / faster


def measured(options: argparse.Namespace, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of all prompts by each of `names`, dense first."""
    width, height = (int(side) for side in options.size.split("x"))
    prompts = Group("recipes", "test", options.things, width).prompts(options.prompts)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shelf = Shelf()
    with tempfile.TemporaryDirectory() as folder:
        # One short run, so that no recipe pays for loading.
        warm = Request(prompt="a red circle", steps=1, output=folder, format="png")
        list(generate(warm, shelf=shelf))
        for seed, (prompt, meaning) in enumerate(prompts):
            dense: Any = None
            for name in names:
                request = Request(
                    prompt=prompt,
                    width=width,
                    height=height,
                    steps=options.steps,
                    seed=seed,
                    output=folder,
                    format="png",
                    recipe=name,
                    settings=() if name == DENSE else tuple(options.settings),
                )
                row: dict[str, Any] = {"seed": seed} | run_once(request, shelf)
                path = Path(row.pop("path"))
                made = read_frames(path)
                row[ALL_CORRECT] = judge(made, meaning)[ALL_CORRECT] or 0.0
                path.unlink()
                if name == DENSE:
                    dense = made
                else:
                    row |= likeness(made, dense)
                rows[name].append(row)
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [DENSE, *options.recipes]
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "size": options.size,
        "steps": options.steps,
        "settings": options.settings,
        "things": options.things,
        "prompts": options.prompts,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = measured(options, names)
    dense = rows[DENSE]
    for name, made in rows.items():
        differences = [a[ALL_CORRECT] - b[ALL_CORRECT] for a, b in zip(made, dense, strict=True)]
        report[name] = {
            "density": round(statistics.median(row["density"] for row in made), 3),
            "all correct": sum(row[ALL_CORRECT] for row in made) / len(made),
            "against dense": sum(differences) / len(differences),
            "interval": mean_interval(differences),
            "psnr": mean_of(made, "psnr"),
            "ssim": mean_of(made, "ssim"),
            "receipt": made[-1]["words"],
        }
        report[name] |= times(made, dense)
        if name != DENSE:
            foretold = predicted_s(name, made[-1], dense[-1], options)
            report[name]["predicted"] = round(report[DENSE]["total_s"] / foretold, 3)
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
