"""How far the analytic judge can be trusted: scores under known damage, margins, time.

    python benchmarks/world_judge.py --clips 60 --side 128

Prints the mean of every score for ground truth and for each corruption, the worst case of each
quantity that a threshold decides, and the time of a clip on one core.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import torch

from kinora.eval.world import (
    SCORES,
    Perception,
    WorldScores,
    blobs,
    judge,
    perceive,
    score,
    scores,
    summary,
    tracks,
)
from kinora.eval.world import backdrop as backdrops
from kinora.eval.world.corruptions import SCENE_CORRUPTIONS, VIDEO_CORRUPTIONS
from kinora.pipelines.world.palette import COLOURS, lab
from kinora.pipelines.world.render import render
from kinora.pipelines.world.scene import Body, Scene, sample_scene
from kinora.pipelines.world.shapes import SHAPES
from kinora.pipelines.world.split import SPLITS, sample_split

DAMAGE: tuple[tuple[str, float], ...] = (
    *(("h264", 18), ("h264", 28), ("blur", 1), ("blur", 1.5), ("blur", 2), ("noise", 10)),
    *(("noise", 25), ("reverse", 1), ("freeze", 1), ("mirror", 1), ("jitter", 4)),
    *(("flicker", 0.15), ("gray_frames", 1), ("static", 1)),
)
_COLUMNS = {"up": 1, "down": 1, "growing": 2, "shrinking": 2, "spinning": 3}


def draw(scene: Scene, frames: int, side: int) -> Any:
    """The video of a scene, `[frames, side, side, 3]` uint8."""
    video = render([scene], frames=frames, height=side, width=side)[0]
    return (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()


def row(name: str, judged: Iterable[WorldScores]) -> None:
    """Print the means of one case."""
    means = summary(list(judged))
    cells = [" -   " if one.mean is None else f"{one.mean:.3f}" for one in means.values()]
    print(f"{name:14} {' '.join(cells)} {means['world.count'].nulls:5}", flush=True)


def table(scenes: list[Scene], frames: int, side: int) -> None:
    """Scores by corruption, and with the captions of other scenes."""
    videos = [draw(scene, frames, side) for scene in scenes]
    captions = [scene.description for scene in scenes]
    print(f"{'':14} {' '.join(name[6:11].ljust(5) for name in SCORES)} nulls")
    row("ground truth", map(judge, videos, captions))
    for name, strength in DAMAGE:
        damaged = (VIDEO_CORRUPTIONS[name](video, strength) for video in videos)
        row(f"{name} {strength:g}", map(judge, damaged, captions))
    rng = random.Random(1)
    for name, change in SCENE_CORRUPTIONS.items():
        changed = (draw(change(scene, rng), frames, side) for scene in scenes)
        row(name, map(judge, changed, captions))
    row("shuffled", map(judge, videos, captions[1:] + captions[:1]))


def margins(scenes: list[Scene], frames: int, side: int) -> None:
    """The worst case of everything that a threshold decides, beside the threshold."""
    print(
        f"\n{'worst case':14} dice>={tracks.LEAST_DICE} lead>0  "
        f"colour<={blobs.FARTHEST_COLOUR:.0f} (thin {blobs.FARTHEST_THIN_COLOUR:.0f})"
    )
    for name, strength in (("truth", 0.0), *DAMAGE[:7], ("flicker", 0.15)):
        worst: dict[str, list[float]] = {}
        for scene in scenes:
            video = draw(scene, frames, side)
            if name != "truth":
                video = VIDEO_CORRUPTIONS[name](video, strength)
            seen = perceive(video)
            told = score(seen, scene.description).scores
            shares = [told[f"world.{atom}"] for atom in ("count", "object_class", "color", "scene")]
            least = min(share for share in shares if share is not None)
            worst.setdefault("share", []).append(least)
            residuals = [frame.backdrop.residual for frame in seen.frames]
            worst.setdefault("residual", []).append(max(residuals))
            named = [frame.backdrop.name is not None for frame in seen.frames]
            worst.setdefault("named", []).append(statistics.mean(named))
            for body in scene.bodies:
                _margins_of(body, seen, frames, worst)
        print(
            f"{name + f' {strength:g}':14} {min(worst['dice']):10.3f} {min(worst['lead']):6.3f} "
            f"{max(worst['colour']):8.1f}"
            f"  stretch {max(worst['stretch']):.3f} (<= {tracks.LARGEST_STRETCH})"
            f"  residual {max(worst['residual']):.1f} (<= {backdrops.LARGEST_RESIDUAL:.0f})"
            f"  area {min(worst['area']):.4f} (>= {blobs.LEAST_AREA})"
            f"  moving {min(worst['moving']):.2f} (>= 1)  still {max(worst['still']):.3f} (< 1)"
            f"  second {max(worst['second']):.3f} (< 1)"
            f"  rest {max(worst['rest']):.3f} (<= {tracks.LARGEST_REST})"
            f"  pace {min(worst['slowest']):.2f} (>= {tracks.PACE[0]})"
            f" {max(worst['fastest']):.2f} (<= {tracks.PACE[1]})"
            f"  back {max(worst['back']):.3f} (<= {tracks.LARGEST_RETURN})"
            f"  background named {min(worst['named']):.2f} (>= {scores.LEAST_SHARE})"
            f"  share {min(worst['share']):.2f} (>= {scores.LEAST_SHARE})",
            flush=True,
        )


def _margins_of(body: Body, seen: Perception, frames: int, worst: dict[str, list[float]]) -> None:
    def nearest(track: tracks.Track) -> float:
        away = math.hypot(track.blobs[0].x - body.x, track.blobs[0].y - body.y)
        return away + (len(track.blobs) < 0.7 * frames)

    track = min(seen.tracks, key=nearest)
    shape = list(SHAPES).index(body.thing.shape)
    own, others = track.dice[:, shape], np.delete(track.dice, shape, axis=1)
    change, rest = tracks.changes(track, frames)
    strengths = list(tracks.strengths(change))
    colour = np.array(lab(COLOURS[body.thing.colour]))
    found = {
        "dice": float(own.min()),
        "lead": float((own - others.max(1)).min()),
        "colour": max(float(np.linalg.norm(blob.lab - colour)) for blob in track.blobs),
        "area": min(math.pi * blob.radius**2 for blob in track.blobs),
        "stretch": float(track.stretch.max()),
    }
    if body.thing.motion == "still":
        found |= {"still": max(strengths), "rest": float(rest.max())}
    else:
        column = _COLUMNS.get(str(body.thing.motion), 0)
        first = strengths.pop(max(column - 1, 0))
        slowest, fastest, back = tracks.pace(track, column)
        found |= {"moving": first, "second": max(strengths)}
        found |= {"slowest": slowest, "fastest": fastest, "back": back}
        found["rest"] = float(np.delete(rest, column).max())
    for name, value in found.items():
        worst.setdefault(name, []).append(value)


def timing(scenes: list[Scene], frames: int, side: int) -> None:
    """Median over clips of the best of three runs, on one core."""
    times: list[float] = []
    for scene in scenes[:20]:
        video = draw(scene, frames, side)
        runs: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            judge(video, scene.description)
            runs.append(time.perf_counter() - start)
        times.append(min(runs) * 1000)
    print(f"\none core: {statistics.median(times):.0f} ms a clip, {max(times):.0f} ms at most")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = random.Random(given.seed)
    scenes: list[Scene] = []
    for i in range(given.clips):
        description = sample_split(rng, SPLITS[i % 3], things=1 + i // 3 % 2)
        scenes.append(sample_scene(rng, description, frames=given.frames))
    print(f"{given.clips} clips of {given.frames} frames at {given.side}², seed {given.seed}")
    table(scenes, given.frames, given.side)
    margins(scenes, given.frames, given.side)
    timing(scenes, given.frames, given.side)


if __name__ == "__main__":
    main()
