"""How long the GPU is busy in a whole call, and with how many kernels, beside how long that takes.

    python benchmarks/busy.py benchmarks/recipes/blade-25.toml benchmarks/recipes/top-blocks-40.toml

One prompt of `verdicts.py` by `kinora-tiny`, dense and by each recipe, which are made twice before;
by torch's profiler, whose own cost is not in the time of the call. Where the GPU is busy for a part
of it, the rest is Python that starts kernels.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch.profiler import ProfilerActivity, profile
from verdicts import PROMPTS, Group, check, made

from kinora.pipelines import cards, models
from kinora.pipelines.request import DEFAULT_MODEL, DENSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipes", nargs="*", help="names or files; dense is always run too")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args(namespace=argparse.Namespace(settings=[], timed=True))
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    names = [DENSE, *asked.recipes]
    check(names, asked)
    card = cards.find(DEFAULT_MODEL)
    loaded = models.load(models.locate(card), models.place(card, "auto", "auto"))
    prompt, _ = Group("verdicts", "test", 1, 0).prompts(PROMPTS)[0]
    for name in names:
        made(loaded, name, [prompt], 0, asked)
        _, told = made(loaded, name, [prompt], 0, asked)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            made(loaded, name, [prompt], 0, asked)
        events = [it for it in found.key_averages() if it.self_device_time_total > 0]
        busy = sum(it.self_device_time_total for it in events) / 1e6
        counted = {"busy_s": round(busy, 3), "kernels": sum(it.count for it in events)}
        print(json.dumps({"recipe": name, "seconds": told["seconds"], **counted}), flush=True)


if __name__ == "__main__":
    main()
