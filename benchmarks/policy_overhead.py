"""What step policies themselves cost: time and memory beside the denoiser's.

    python benchmarks/policy_overhead.py [--latents 16x21x90x160] [--steps 50] [--json FILE]

A stand-in for the denoiser costs nothing and returns what a smooth flow would, so that all time is
the policy's: what decides, foretells and remembers, a step of the scheduler left out. The default
size is that of Wan 14B, 720p, of which a dense step is two calls of 40 layers; attention alone is
some 200 ms of each layer on an H200 (`method_speed.py`), so that 1 % of a step is 160 ms. Memory is
what a run keeps between steps, in latents of float32, told on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from steps import POLICIES, recipe_of

from kinora.accel.codec import Codec, Level
from kinora.accel.steps import Schedule, Skip, Step, StepPolicy


def settle(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measured(policy: StepPolicy, shape: list[int], steps: int, device: str) -> dict[str, Any]:
    """Milliseconds of a step, the median and the most, and what is kept."""
    levels = tuple(Level(1 - s / steps, s / steps, s / steps) for s in range(steps, 0, -1))
    run = policy.start(Schedule(levels, Codec("flow_prediction")))
    generator = torch.Generator(device).manual_seed(0)
    noise, clip = (torch.randn(1, *shape, generator=generator, device=device) for _ in range(2))
    times: list[float] = []
    skipped, sample, output = 0, noise, noise
    settle(device)
    used = torch.cuda.memory_allocated() if device == "cuda" else 0
    for index, level in enumerate(levels):
        sample = level.alpha * clip + level.sigma * noise
        settle(device)
        began = time.perf_counter()
        decision = run.decide(Step(index, steps), None if index == 0 else sample)
        settle(device)
        spent = time.perf_counter() - began
        if isinstance(decision, Skip):
            output = decision.output
            skipped += 1
        else:
            # A flow that bends a little, as networks' do.
            output = noise - clip * (1 + 0.1 * level.sigma**2)
        settle(device)
        began = time.perf_counter()
        run.observe(Step(index, steps), output, sample, computed=not isinstance(decision, Skip))
        settle(device)
        times.append(1e3 * (spent + time.perf_counter() - began))
    row: dict[str, Any] = {
        "skipped": skipped,
        "median_ms": round(statistics.median(times), 3),
        "most_ms": round(max(times), 3),
    }
    if device == "cuda":
        del sample, output
        kept = torch.cuda.memory_allocated() - used
        row["kept_latents"] = round(kept / noise.numel() / 4, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--latents", default="16x21x90x160", help="channels, frames, height, width")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="a JSON line for each policy, with the machine")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = {
        "latents": options.latents,
        "steps": options.steps,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
    }
    shape = [int(it) for it in options.latents.split("x")]
    with torch.inference_mode():
        for name in POLICIES:
            policy = recipe_of(name).steps
            assert policy is not None
            row = {"policy": name, **measured(policy, shape, options.steps, device), **machine}
            print(row, flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
