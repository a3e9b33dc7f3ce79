"""What the processes of a `Gang` are told to run: small models, alone or together."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from kinora.accel.attach import accelerate
from kinora.accel.recipe import from_table


def model(family: str, folder: str) -> Any:
    """As the fixture `build` makes it, from a spec or the pipeline in `folder`."""
    spec = importlib.util.spec_from_file_location(
        "accel_conftest", Path(__file__).parent / "conftest.py"
    )
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = models
    spec.loader.exec_module(models)
    torch.manual_seed(0)
    if family in models.LOOPS:
        return models.LOOPS[family]()
    pipe = models.diffusers().DiffusionPipeline.from_pretrained(folder)
    return models.Stock(pipe, models.SIZES[family])


def made(
    family: str, folder: str, table: dict[str, Any], steps: int, seed: int = 0
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a recipe makes of a model, and the receipt."""
    it = model(family, folder)
    recipe = from_table({"when": "always", **table})
    with accelerate(it, recipe) as session:
        latents = it(steps=steps, seed=seed)
    return latents, session.receipt.model_dump()


def replicas(family: str, folder: str, table: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """A video of its own in each group of processes that share one."""
    asked = from_table(table).parallel
    assert asked is not None
    seed = distributed.get_rank() // asked.processes
    return seed, made(family, folder, table, 3, seed)[0]


def disagreeing(family: str, folder: str) -> str:
    """The steps of a policy that would skip in one process alone."""
    threshold = 0.9 if distributed.get_rank() else 1e-9
    table = {"steps": {"policy": "shadow", "threshold": threshold}, "parallel": {"ulysses": 2}}
    return made(family, folder, table, 16)[1]["policy"]["pattern"]


def stock_again(family: str, folder: str) -> bool:
    """Whether a shared model makes alone what it made before, bit for bit."""
    it = model(family, folder)
    before = it()
    forward = it.denoiser.forward
    with accelerate(it, from_table({"parallel": {"ulysses": 2}})):
        it()
    hooks = [m for m in it.denoiser.modules() if getattr(m, "_diffusers_hook", None)]
    left = [name for m in hooks for name in m._diffusers_hook.hooks]
    return torch.equal(before, it()) and not left and it.denoiser.forward == forward


def guided(early: bool, asked: dict[str, int] | None) -> torch.Tensor:
    """A loop that calls for each branch, and perhaps looks at one before both are there."""
    it = model("hunyuan", "")
    recipe = from_table({"parallel": asked} if asked else {})
    other = {**it.arguments, "encoder_hidden_states": -it.arguments["encoder_hidden_states"]}
    x = torch.randn(it.latents, generator=torch.Generator().manual_seed(0))
    with accelerate(it, recipe), torch.no_grad():
        it.scheduler.set_timesteps(4)
        for t in it.scheduler.timesteps:
            given = {"hidden_states": x, "timestep": t.expand(len(x)), "return_dict": False}
            cond = it.denoiser(**given, **it.arguments)[0]
            cond = cond.clone() if early else cond
            uncond = it.denoiser(**given, **other)[0]
            out = uncond + 3 * (cond - uncond)
            x = it.scheduler.step(out, t, x, return_dict=False)[0]
    return x
