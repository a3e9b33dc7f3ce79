"""How well a `kinora-tiny` draws what it is asked: autoencoder PSNR and the judge's scores.

    python benchmarks/tiny_quality.py [--model FOLDER] [--prompts 200] [--json FILE] [--sheet FILE]

Prompts come from splits that training never saw, seeds are fixed, sampling is the stock
`WanPipeline` with 50 steps and guidance. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from kinora.eval.world import ALL_CORRECT, perceive, score, summary
from kinora.pipelines.tiny import WEIGHTS
from kinora.pipelines.tiny.architecture import TEXT_LENGTH
from kinora.pipelines.world.grammar import phrase
from kinora.pipelines.world.render import render
from kinora.pipelines.world.scene import Description, sample_scene
from kinora.pipelines.world.split import sample_split

FRAMES = 33


@dataclass(frozen=True, slots=True)
class Group:
    """A set of prompts judged together."""

    name: str
    split: str
    things: int
    size_px: int
    share: float = 1.0
    """Of the number of prompts asked for."""

    def prompts(self, count: int) -> list[tuple[str, Description]]:
        """Prompts and what they mean; a meaning comes again only when all were there.

        The test split has 173 descriptions of one object, so that 200 prompts say 27 of them twice,
        in other words and with another seed.
        """
        rng, count = random.Random(self.name), max(1, round(count * self.share))
        drawn = (sample_split(rng, self.split, things=self.things) for _ in range(30 * count))
        different = list(dict.fromkeys(drawn))
        chosen = itertools.islice(itertools.cycle(different), count)
        return [(phrase(description, rng), description) for description in chosen]


GROUPS = (
    Group("one object, 128 px", "test", 1, 128),
    Group("two objects, 128 px", "test", 2, 128),
    Group("held-out combination, one object, 128 px", "held-out", 1, 128, 0.5),
    Group("held-out combination, two objects, 128 px", "held-out", 2, 128, 0.5),
    Group("one object, 256 px", "test", 1, 256, 0.5),
)


def reconstruct(
    pipe: WanPipeline, size_px: int, clips: int = 32
) -> Iterator[tuple[Description, np.ndarray, float]]:
    """What the autoencoder makes of rendered clips of the test split.

    Yields:
        Description, video `[33, size, size, 3]` uint8, and its PSNR in dB.
    """
    rng = random.Random(f"psnr/{size_px}")
    for _ in range(clips):
        scene = sample_scene(rng, sample_split(rng, "test"), frames=FRAMES)
        video = render([scene], frames=FRAMES, height=size_px, width=size_px, device=pipe.device)
        with torch.no_grad():
            latents = pipe.vae.encode((video * 2 - 1).to(pipe.vae.dtype)).latent_dist.mode()
            decoded = pipe.vae.decode(latents).sample.float().clamp(-1, 1) / 2 + 0.5
        psnr_db = -10 * float((decoded - video).square().mean().log10())
        frames = (decoded[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8)
        yield scene.description, frames.cpu().numpy(), psnr_db


def generate(
    pipe: WanPipeline, prompts: Sequence[str], size_px: int, options: argparse.Namespace
) -> Iterator[np.ndarray]:
    """One video `[F, H, W, 3]` uint8 a prompt; prompt i has seed i."""
    batch = max(1, options.batch * 128 * 128 // size_px**2)
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])
        seeds = [torch.Generator().manual_seed(seed) for seed in range(start, start + len(chosen))]
        result: Any = pipe(
            chosen,
            height=size_px,
            width=size_px,
            num_frames=FRAMES,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=seeds,
            max_sequence_length=options.text_length,
            output_type="np",
        )
        yield from (np.asarray(result.frames) * 255).round().astype(np.uint8)


def contact_sheet(videos: Sequence[np.ndarray], columns: int = 8) -> Image.Image:
    """First, middle and last frame of each video, `columns` videos a row."""
    tiles = [np.concatenate([v[0], v[len(v) // 2], v[-1]], axis=1) for v in videos]
    while len(tiles) % columns:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return Image.fromarray(np.concatenate(rows))


def _print_row(name: str, row: dict[str, Any]) -> None:
    correct = row["scores"][ALL_CORRECT]
    parts = {key.removeprefix("world."): it["mean"] for key, it in row["scores"].items()}
    told = ", ".join(f"{key} {mean:.2f}" for key, mean in parts.items() if mean is not None)
    print(
        f"{name}: all correct {correct['mean']:.3f} [{correct['low']:.3f}, {correct['high']:.3f}] "
        f"of {row['prompts']}, shuffled {row['shuffled captions']}, {row['seconds']} s; {told}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--flow-shift", type=float)
    parser.add_argument("--text-length", type=int, default=TEXT_LENGTH)
    parser.add_argument("--batch", type=int, default=64, help="videos of 128 px at a time")
    parser.add_argument("--groups", type=int, nargs="*", help="numbers of the groups, default all")
    parser.add_argument("--reconstruct", type=int, nargs="*", default=[128, 256], metavar="PX")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="a PNG of frames of the first videos")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    pipe = WanPipeline.from_pretrained(options.model, dtype=dtype)
    pipe.to("cuda" if cuda else "cpu").set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float32)
    if options.flow_shift:
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, flow_shift=options.flow_shift
        )
    report: dict[str, Any] = {
        "steps": options.steps,
        "guidance": options.guidance,
        "flow_shift": pipe.scheduler.config["flow_shift"],
        "text_length": options.text_length,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }
    sheet: list[np.ndarray] = []
    chosen = range(len(GROUPS)) if options.groups is None else options.groups
    with ProcessPoolExecutor(
        options.workers,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as workers:
        for size_px in options.reconstruct:
            made = list(reconstruct(pipe, size_px))
            seen = workers.map(perceive, [video for _, video, _ in made])
            own = [score(it, made[i][0]) for i, it in enumerate(seen)]
            report[f"autoencoder, {size_px} px"] = row = {
                "clips": len(made),
                "psnr_db": round(sum(psnr_db for *_, psnr_db in made) / len(made), 2),
                "all correct": summary(own)[ALL_CORRECT].mean,
            }
            print(f"autoencoder, {size_px} px: {row}", flush=True)
        for group in (GROUPS[i] for i in chosen):
            began = time.perf_counter()
            prompts = group.prompts(options.prompts)
            texts = [text for text, _ in prompts]
            jobs: list[Any] = []
            for i, video in enumerate(generate(pipe, texts, group.size_px, options)):
                jobs.append(workers.submit(perceive, video))
                if group.size_px == 128 and i < 16:
                    sheet.append(video)
            seen = [job.result() for job in jobs]
            own = [score(it, prompts[i][1]) for i, it in enumerate(seen)]
            other = [
                score(it, next(d for _, d in prompts[i:] + prompts[:i] if d != prompts[i][1]))
                for i, it in enumerate(seen)
                if len(prompts) > 1
            ]
            report[group.name] = {
                "prompts": len(prompts),
                "descriptions": len({description for _, description in prompts}),
                "seconds": round(time.perf_counter() - began, 1),
                "shuffled captions": summary(other)[ALL_CORRECT].mean if other else None,
                "scores": {name: asdict(value) for name, value in summary(own).items()},
                "missed": {
                    f"{i}: {prompts[i][0]}": it.seen
                    for i, it in enumerate(own)
                    if it[ALL_CORRECT] != 1
                },
            }
            _print_row(group.name, report[group.name])
    if options.sheet and sheet:
        contact_sheet(sheet).save(options.sheet)
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
