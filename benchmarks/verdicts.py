"""What settings cost in quality: verdicts over many prompts, each beside the stock pipeline's.

    python benchmarks/verdicts.py benchmarks/recipes/*.toml --prompts 100 --batch 5 --workers 4
    python benchmarks/verdicts.py --policy sada --policy "pattern pattern=ssC" --steps 50

Every prompt is made dense and by each setting, from the same noise, by `kinora-tiny`; prompts and
meanings are those of `tiny_quality.py`. Per setting: *all correct*, its difference to dense with a
95 % interval (paired, a bootstrap over prompts), PSNR and SSIM of frames that were never coded to
the dense ones, executed density, and evaluations. Beside a policy, which leaves steps out, stands
the plain sampler in as many steps as the policy evaluated.

`--batch B` makes B prompts in one call, each of its own noise: attention is planned for each of
them, but a policy decides for all, so that of policies only `pattern`, which looks at none, is
allowed there. `--workers N` share the prompts among N processes on all GPUs, each with `--scorers`
of its own. With `--rows FILE` each video's row is kept once it is judged, and a later run of the
same command, with more prompts or settings, goes on behind them. `--timed` keeps the seconds of a
call too, by one worker and one prompt at a time, each setting made once before, which compiles; the
table has the median.

`benchmarks/recipes/*.toml` are settings of every method. Those of `paro` want a calibration each,
in the folder that the command runs in: `kinora calibrate kinora-tiny --size 256x256 --steps 30
--seed 1 --keep 0.25 --tile 64x64 --output paro-25.npz`, and so on for .4, .5, .6 and .75; with
`--tile 128x64` in `paro-50-128x64.npz`, and so on for .6 and .75.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from recipes import likeness
from tiny_quality import Group

from kinora.accel.attach import accelerate
from kinora.accel.recipe import Recipe, from_table
from kinora.eval.paired import mean_interval
from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines import cards, models, planning
from kinora.pipelines.chatter import relayed
from kinora.pipelines.errors import KinoraError
from kinora.pipelines.frames import to_uint8
from kinora.pipelines.request import DEFAULT_MODEL, DENSE, Request, resolve
from kinora.pipelines.taps import without_progress_bar

Row = dict[str, Any]
Rows = dict[tuple[int, str], Row]
"""By the number of the prompt and the setting's name."""
PROMPTS = 173
"""Descriptions of one object in the test split. Always all are worded, so that none changes."""
PLAIN, POLICY = "plain ", "policy "


def requested(name: str, prompt: str, asked: argparse.Namespace) -> Request:
    """Of a preset or file; of "policy shadow threshold=0.1"; of "plain 25", and of dense."""
    width, height = (int(side) for side in asked.size.split("x"))
    request = Request(
        prompt=prompt, width=width, height=height, frames=asked.frames, steps=asked.steps
    )
    if name == DENSE:
        return request
    if name.startswith(PLAIN):
        return request.model_copy(update={"steps": int(name.removeprefix(PLAIN))})
    if name.startswith(POLICY):
        policy, *given = name.removeprefix(POLICY).split()
        of = (f"steps.policy={policy}", *(f"steps.{it}" for it in given), *asked.settings)
        return request.model_copy(update={"settings": of})
    return request.model_copy(update={"recipe": name, "settings": tuple(asked.settings)})


def recipe_of(request: Request) -> Recipe:
    """What `request` accelerates by, its settings in it."""
    return from_table(resolve(request, cards.find(DEFAULT_MODEL)).recipe)


def check(names: Sequence[str], asked: argparse.Namespace) -> None:
    """Raises `KinoraError` for what is no setting, a calibration that is not there among them."""
    for name in names:
        parts = planning.plan(requested(name, "a red circle", asked)).parts
        for part in parts:
            if part.verdict == "refused":
                raise KinoraError(f"{name}: {part.why}")


def made(
    loaded: models.Loaded, name: str, prompts: Sequence[str], seed: int, asked: argparse.Namespace
) -> tuple[np.ndarray, Row]:
    """Frames `[B, F, height, width, 3]` of prompts numbered from `seed` on, and what was run."""
    card = cards.find(DEFAULT_MODEL)
    whole = resolve(requested(name, prompts[0], asked), card)
    recipe = from_table(whole.recipe)
    with accelerate(loaded.pipe, recipe, seed=seed) as session, without_progress_bar(loaded.pipe):
        began = time.perf_counter()
        videos = loaded.pipe(
            list(prompts),
            width=whole.width,
            height=whole.height,
            num_frames=whole.frames,
            num_inference_steps=whole.steps,
            guidance_scale=whole.guidance,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
            output_type="pt",
            **card.call,
        ).frames
        if videos.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        receipt = session.receipt
    told: Row = {"recipe": name, "nfe": whole.steps, "density": 1.0}
    if asked.timed:
        told["seconds"] = round(seconds, 4)
    if receipt.attention is not None:
        told["density"] = receipt.attention.density
    if receipt.policy is not None:
        told |= {"nfe": receipt.policy.evaluations, "pattern": receipt.policy.pattern}
    return np.stack([to_uint8(it) for it in videos]), told


def judged(row: Row, video: np.ndarray, dense: np.ndarray | None, meaning: Any) -> Row:
    """A row with its verdict, and its likeness to `dense`."""
    row[ALL_CORRECT] = judge(video, meaning)[ALL_CORRECT] or 0.0
    return row if dense is None else row | likeness(video, dense)


def to_make(names: Sequence[str], seeds: range, done: Rows) -> Iterator[str]:
    """Settings that some prompt of `seeds` lacks, dense first if there are any.

    Behind each policy comes the plain sampler in as many steps, known once that is in `done`.
    """
    began = False
    for name in names:
        others = [name, f"{PLAIN}{{nfe}}"] if name.startswith(POLICY) else [name]
        for other in others:
            if other != name:
                other = other.format(nfe=done[seeds[0], name]["nfe"])
            if all((seed, other) in done for seed in seeds):
                continue
            if not began and other != DENSE:
                yield DENSE
            began = True
            yield other


def alone() -> None:
    """One thread: of several processes, each with as many as the machine has, none gets on."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


_stop: Any = None


def listen(stop: Any) -> None:
    """A worker's first call: the event that says that another has failed."""
    global _stop
    _stop = stop


def measured(asked: argparse.Namespace, names: Sequence[str], done: Rows, share: int) -> Rows:
    """Rows, that are not `done`, of every `workers`-th batch of prompts from `share` on."""
    prompts = Group("verdicts", "test", 1, 0).prompts(PROMPTS)
    count = torch.cuda.device_count()
    device = f"cuda:{share % count}" if count > 1 and asked.workers > 1 else "auto"
    if asked.workers > 1:
        # Threads that wait for each other on too few cores stand still.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // asked.workers))
    began = time.perf_counter()
    card = cards.find(DEFAULT_MODEL)
    with relayed(lambda _: None):
        loaded = models.load(models.locate(card), models.place(card, device, "auto"))
    print(f"worker {share}: loaded on {device} in {time.perf_counter() - began:.1f} s", flush=True)
    rows: Rows = {}
    warm: set[str] = set()
    with ProcessPoolExecutor(asked.scorers, get_context("spawn"), alone) as pool:
        waiting: set[Future[Row]] = set()

        def keep(most: int) -> None:
            """Take in what is judged, until at most so many are not."""
            while len(waiting) > most:
                for one in wait(waiting, return_when=FIRST_COMPLETED).done:
                    waiting.remove(one)
                    row = one.result()
                    rows[row["seed"], row["recipe"]] = row
                    if asked.rows:
                        with asked.rows.open("a") as file:  # one write of one line: it is shared
                            file.write(json.dumps(row) + "\n")

        end = asked.first + asked.prompts
        for first in range(asked.first + share * asked.batch, end, asked.workers * asked.batch):
            batch = prompts[first : min(first + asked.batch, end)]
            seeds = range(first, first + len(batch))
            dense: np.ndarray | None = None
            # Others are compared with its frames, so it is made again where they go on.
            for name in to_make(names, seeds, done):
                late = asked.minutes and time.perf_counter() - began > 60 * asked.minutes
                if late or (_stop is not None and _stop.is_set()):
                    keep(0)
                    return rows
                if asked.timed and name not in warm:
                    warm.add(name)
                    made(loaded, name, [batch[0][0]], first, asked)
                start = time.perf_counter()
                videos, told = made(loaded, name, [prompt for prompt, _ in batch], first, asked)
                print(f"{name}: {told['nfe']} steps, density {told['density']:.3f}, prompts from "
                      f"{first} in {time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip
                if name.startswith(POLICY):
                    # The next that `to_make` looks for is the plain sampler in as many steps.
                    done[first, name] = told
                for i, video in enumerate(videos):
                    like = None if dense is None else dense[i]
                    row = {"seed": first + i, **told}
                    waiting.add(pool.submit(judged, row, video, like, batch[i][1]))
                if name == DENSE:
                    dense = videos
                keep(4 * asked.scorers)
        keep(0)
    return rows


def kept_rows(path: Path | None, asked: dict[str, Any]) -> Rows:
    """What an earlier run of the same command left in `path`; what was asked goes in first."""
    if path is None:
        return {}
    if not path.exists():
        path.write_text(json.dumps(asked) + "\n")
        return {}
    first, *lines = path.read_text().splitlines()
    if json.loads(first) != asked:
        raise SystemExit(f"{path} is of another command, {first}; name another file")
    return {(row["seed"], row["recipe"]): row for row in map(json.loads, lines)}


def named(recipe: str) -> str:
    """A setting as tables have it: of a file without its folder and ending."""
    path = Path(recipe)
    return path.stem if path.suffix == ".toml" else recipe


def summary(rows: Sequence[Row], beside: Sequence[Row]) -> Row:
    """Means over prompts, and the difference to those `beside` with its interval."""
    differences = [a[ALL_CORRECT] - b[ALL_CORRECT] for a, b in zip(rows, beside, strict=True)]
    low, high = mean_interval(differences)
    told: Row = {
        "recipe": named(rows[0]["recipe"]),
        "prompts": len(rows),
        "density": round(statistics.fmean(row["density"] for row in rows), 4),
        "nfe": round(statistics.fmean(row["nfe"] for row in rows), 2),
        ALL_CORRECT: round(statistics.fmean(row[ALL_CORRECT] for row in rows), 4),
        "difference": round(statistics.fmean(differences), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }
    for key, digits in (("psnr", 2), ("ssim", 4)):
        if all(key in row for row in rows):
            told[key] = round(statistics.fmean(row[key] for row in rows), digits)
    if all("seconds" in row for row in rows):
        told["seconds"] = round(statistics.median(row["seconds"] for row in rows), 3)
    return told


def table(names: Sequence[str], found: Rows) -> Iterator[Row]:
    """A summary of each setting over the prompts that it shares with dense.

    `gain_db` is the PSNR of a policy less that of the plain sampler in as many steps, paired.
    """
    for name in names:
        seeds = [seed for seed, it in found if it == name and (seed, DENSE) in found]
        if name.startswith(POLICY):
            seeds = [it for it in seeds if (it, f"{PLAIN}{found[it, name]['nfe']}") in found]
        if not seeds:
            print(f"{name}: no prompt is done; give it more --minutes", flush=True)
            continue
        rows = [found[seed, name] for seed in seeds]
        told = summary(rows, [found[seed, DENSE] for seed in seeds])
        if name.startswith(POLICY):
            plain = [found[row["seed"], f"{PLAIN}{row['nfe']}"] for row in rows]
            beside = summary(plain, [found[seed, DENSE] for seed in seeds])
            gains = [a["psnr"] - b["psnr"] for a, b in zip(rows, plain, strict=True)]
            low, high = mean_interval(gains)
            told |= {f"plain {key}": beside[key] for key in (ALL_CORRECT, "psnr", "ssim")}
            told |= {"gain_db": round(statistics.fmean(gains), 2)}
            told |= {"gain_low": round(low, 2), "gain_high": round(high, 2)}
        yield told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipes", nargs="*", help="names or files; dense is always run too")
    parser.add_argument("--policy", action="append", default=[], help="name option=value …")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=100, help=f"up to {PROMPTS}")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts in a call")
    parser.add_argument("--minutes", type=float, help="begin no video after these")
    parser.add_argument("--workers", type=int, default=1, help="processes that make videos")
    parser.add_argument("--scorers", type=int, default=1, help="processes of each that judge them")
    parser.add_argument("--timed", action="store_true", help="with one worker, no batch")
    parser.add_argument("--rows", type=Path, help="JSON lines that are kept and gone on with")
    parser.add_argument("--json", type=Path, help="a JSON line for each setting")
    asked = parser.parse_args()
    names = [DENSE, *asked.recipes, *(POLICY + it for it in asked.policy)]
    try:
        check(names, asked)
    except KinoraError as error:
        parser.error(str(error))
    stepped = [it for it in asked.recipes if recipe_of(requested(it, "a", asked)).steps is not None]
    others = [it for it in asked.policy if it.split()[0] != "pattern"]
    if asked.batch > 1 and (others or stepped):
        parser.error("a policy decides for a whole batch: give it --batch 1")
    if asked.timed and (asked.batch > 1 or asked.workers > 1):
        parser.error("--timed wants one worker and --batch 1")
    if asked.first < 0 or not 1 <= asked.prompts <= PROMPTS - asked.first:
        parser.error(f"there are prompts 0 to {PROMPTS - 1}")
    cuda = torch.cuda.is_available()
    command: Row = {key: getattr(asked, key) for key in ("size", "frames", "steps", "settings")}
    command |= {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
    }
    found = kept_rows(asked.rows, command)
    work = partial(measured, asked, names, found)
    if asked.workers == 1:
        found |= work(0)
    else:
        context = get_context("spawn")
        stop = context.Event()
        with ProcessPoolExecutor(asked.workers, context, listen, (stop,)) as pool:
            parts = [pool.submit(work, share) for share in range(asked.workers)]
            wait(parts, return_when=FIRST_EXCEPTION)
            stop.set()
            for part in parts:
                found |= part.result()
    for told in table(names, found):
        print(json.dumps(told), flush=True)
        if asked.json:
            with asked.json.open("a") as file:
                file.write(json.dumps({**told, **command}) + "\n")


if __name__ == "__main__":
    main()
