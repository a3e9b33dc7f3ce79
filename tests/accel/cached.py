"""What tests of caches look at: modules, how often they are evaluated, and what is left on them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from kinora.accel.policies import CachePolicy, TaylorSeer
from kinora.accel.receipt import CacheReceipt, Receipt

LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def ids(value: Any) -> str:
    return value.name if isinstance(value, CachePolicy) else str(value)


def blocks(denoiser: Any) -> list[Any]:
    named = dict(denoiser.named_children())
    return [block for name in LISTS for block in named.get(name, ())]


def units(denoiser: Any, policy: CachePolicy) -> list[Any]:
    """The modules that a policy should stand on, without the last projection of the lite mode."""
    if policy.unit == "block" or lite(policy):
        return blocks(denoiser)
    wanted = ("attn", "attn1")
    return [getattr(it, name) for it in blocks(denoiser) for name in wanted if hasattr(it, name)]


def lite(policy: CachePolicy) -> bool:
    return isinstance(policy, TaylorSeer) and policy.use_lite_mode


@contextmanager
def counted(modules: list[Any]) -> Generator[list[int], None, None]:
    """A number for each module: how often it was evaluated, seen from its first linear map."""
    counts = [0] * len(modules)
    handles: list[Any] = []
    for place, module in enumerate(modules):
        first = next(it for it in module.modules() if isinstance(it, torch.nn.Linear))

        def count(*_: Any, place: int = place) -> None:
            counts[place] += 1

        handles.append(first.register_forward_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


def state(model: Any) -> list[Any]:
    """What is attached to a model's denoiser and scheduler.

    Pipelines themselves leave diffusers' empty registry of hooks on the denoiser.
    """
    modules = list(model.denoiser.modules())
    found: list[Any] = [set(vars(it)) - {"_diffusers_hook"} for it in modules]
    found += [
        set(it._diffusers_hook.hooks) if hasattr(it, "_diffusers_hook") else set() for it in modules
    ]
    found += [(len(it._forward_pre_hooks), len(it._forward_hooks)) for it in modules]
    ours = {"step", "set_timesteps"} & vars(model.scheduler).keys()
    return [*found, ours, model.denoiser.is_cache_enabled]


def cache_of(receipt: Receipt) -> CacheReceipt:
    assert receipt.cache is not None and receipt.policy is None
    return receipt.cache
