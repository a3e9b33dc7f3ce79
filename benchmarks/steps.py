"""What skipping steps costs: policies against all steps, beside the plain sampler in as few.

    python benchmarks/steps.py [--size 96x96] [--frames 9] [--steps 50] [--prompts 4]

Every prompt is made with all steps, by each policy, and by the plain sampler in as many steps as
the policy evaluated, with the same seed; a pruned evaluation counts as the share of the tokens that
it ran on. PSNR and SSIM are of the frames against those of all steps; *gain* is the PSNR less that
of the plain sampler, paired; *all correct* is the judge's. Times are of denoising alone and of this
machine: run nothing beside it. With `--rows FILE` each run's row is kept as soon as it is there,
and a later run of the same command goes on behind them.
`--policy "shadow threshold=0.1"`, as often as wanted, replaces the list.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from skimage.metrics import structural_similarity
from tiny_quality import Group

from kinora.accel.attach import accelerate
from kinora.accel.recipe import Recipe, changed, find
from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines.tiny import WEIGHTS
from kinora.pipelines.tiny.architecture import TEXT_LENGTH

POLICIES = (
    "pattern pattern=sC",
    "pattern pattern=ssC",
    "pattern pattern=sssC",
    "pattern pattern=sC reconstruct=hold",
    "pattern pattern=sC reconstruct=three-node",
    "shadow",
    "shadow threshold=0.1 max_skip=3",
    "sign",
    "sign max_skip=2",
    "easy",
    "easy threshold=0.05",
    "sada",
    "sada lagrange_step=1",
)
Row = dict[str, Any]


def recipe_of(policy: str) -> Recipe:
    """The recipe that `policy` is short for; "plain" is none."""
    if policy.startswith("plain"):
        return find("dense")
    name, *options = policy.split()
    settings = [f"steps.policy={name}", *(f"steps.{it}" for it in options)]
    return changed(find("dense"), settings)


def made(pipe: Any, policy: str, prompt: str, seed: int, options: argparse.Namespace) -> Row:
    """Frames `[F, H, W, 3]` of 0 to 1 and what they took; "plain 20" is that of 20 steps."""
    width, height = (int(side) for side in options.size.split("x"))
    steps = int(policy.split()[1]) if policy.startswith("plain ") else options.steps
    given = {"width": width, "height": height, "num_frames": options.frames}
    given |= {"guidance_scale": options.guidance, "max_sequence_length": TEXT_LENGTH}
    with accelerate(pipe, recipe_of(policy), seed=seed) as session:
        began = time.perf_counter()
        latents = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **given,
        ).frames
        if latents.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        told, cache = session.receipt.policy, session.receipt.cache
    row: Row = {"policy": policy, "seed": seed, "nfe": steps, "denoise_s": round(seconds, 2)}
    if told is not None:
        # A pruned one counts as the share of the tokens that it ran on.
        left_out = told.pattern.count("p") * (1 - (told.kept or 0.0))
        row |= {"nfe": round(told.evaluations - left_out), "kept": told.kept}
        row |= {"pattern": told.pattern, "error": told.mean_error}
    if cache is not None:
        # As many evaluations as were made of what it stands on.
        row |= {"nfe": round(steps * cache.evaluated / max(1, cache.calls)), "error": None}
        row["pattern"] = cache.pattern
    return row | {"frames": decoded(pipe, latents)}


def decoded(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """As the pipeline does it."""
    config = pipe.vae.config
    shape = (1, config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(it).view(shape).to(latents)
                 for it in (config.latents_mean, config.latents_std))  # fmt: skip
    with torch.no_grad():
        video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype)).sample
    return (video[0].float().clamp(-1, 1) / 2 + 0.5).permute(1, 2, 3, 0).cpu().numpy()


def compared(row: Row, full: np.ndarray, meaning: Any) -> Row:
    """A row with scores in place of its frames."""
    frames: np.ndarray = row.pop("frames")
    error = float(np.square(frames - full).mean())
    alike = [
        structural_similarity(a, b, channel_axis=2, data_range=1.0)
        for a, b in zip(frames, full, strict=True)
    ]
    row["psnr_db"] = round(-10 * float(np.log10(max(error, 1e-12))), 2)
    row["ssim"] = round(float(np.mean(alike)), 5)
    row[ALL_CORRECT] = judge((frames * 255).round().astype(np.uint8), meaning)[ALL_CORRECT]
    return row


def measured(pipe: Any, options: argparse.Namespace, done: list[Row]) -> list[Row]:
    """The rows of all prompts, those in `done` first."""
    rows, width = list(done), int(options.size.split("x")[0])
    known = {(row["policy"], row["seed"]) for row in done}
    for seed, (prompt, meaning) in enumerate(
        Group("steps", "test", options.things, width).prompts(options.prompts)
    ):
        if ("end", seed) in known:
            continue
        full = np.empty(0)
        counts: list[int] = []
        queue = ["plain", *options.policy]
        while queue:
            policy = queue.pop(0)
            row = made(pipe, policy, prompt, seed, options)
            full = full if full.size else row["frames"]
            row = compared(row, full, meaning)
            if not policy.startswith("plain") and row["nfe"] not in counts:
                counts.append(row["nfe"])
                queue.append(f"plain {row['nfe']}")
            keep(row, rows, options)
        keep({"policy": "end", "seed": seed}, rows, options)
    return rows


def keep(row: Row, rows: list[Row], options: argparse.Namespace) -> None:
    """Put a row to the others, and into the file."""
    rows.append(row)
    if options.rows:
        with options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if row["policy"] != "end":
        print(f"{row['seed']}: {row['policy']}: {row['nfe']} evaluations, {row['psnr_db']} dB, "
              f"{row['denoise_s']} s", flush=True)  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    """Means by policy, in lines of Markdown."""
    by = {(row["policy"], row["seed"]): row for row in rows if row["policy"] != "end"}
    lines = ["| policy | evaluations | denoising, s | PSNR, dB | gain, dB | SSIM | all correct |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for policy in dict.fromkeys(name for name, _ in by if not name.startswith("plain ")):
        mine = [row for (name, _), row in by.items() if name == policy]
        first = policy == "plain"
        gains = [
            row["psnr_db"] - by[f"plain {row['nfe']}", row["seed"]]["psnr_db"]
            for row in mine
            if not first
        ]

        def mean(name: str, mine: list[Row] = mine) -> float:
            return statistics.fmean(row[name] or 0.0 for row in mine)

        psnr = "" if first else f"{mean('psnr_db'):.1f}"
        gain = "" if first else f"{statistics.fmean(gains):+.1f}"
        lines.append(
            f"| {policy} | {mean('nfe'):.1f} | {mean('denoise_s'):.1f} | {psnr} | {gain} | "
            f"{mean('ssim'):.4f} | {mean(ALL_CORRECT):.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--size", default="96x96", metavar="WxH")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--things", type=int, default=1, help="objects in a prompt")
    parser.add_argument("--policy", action="append", metavar="NAME OPTION=VALUE …")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    options.policy = options.policy or list(POLICIES)
    for policy in options.policy:
        recipe_of(policy)  # a mistake is better told before the first video
    cuda = torch.cuda.is_available()
    pipe = WanPipeline.from_pretrained(
        options.model, dtype=torch.bfloat16 if cuda else torch.float32
    )
    pipe.to("cuda" if cuda else "cpu").set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float32)
    asked = {key: value for key, value in vars(options).items() if key != "rows"}
    asked["model"] = "kinora-tiny" if options.model == WEIGHTS else str(options.model)
    asked |= {"device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
              "torch": torch.__version__}  # fmt: skip
    done: list[Row] = []
    if options.rows and options.rows.exists():
        first, *lines = options.rows.read_text().splitlines()
        if json.loads(first) != asked:
            raise SystemExit(f"{options.rows} is of another command, {first}; name another file")
        every: list[Row] = [json.loads(line) for line in lines]
        ended = {row["seed"] for row in every if row["policy"] == "end"}
        done = [row for row in every if row["seed"] in ended]
    if options.rows:
        kept = [json.dumps(asked), *(json.dumps(row) for row in done)]
        options.rows.write_text("\n".join(kept) + "\n")
    print("\n".join(table(measured(pipe, options, done))))


if __name__ == "__main__":
    main()
