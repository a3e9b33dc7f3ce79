"""cache-dit's DBCache on a denoiser: put on, counted at the blocks, and taken off."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import AccelerationError
from ..policies import DBCache
from .hooked import Stood, Tally, blocks_in

_OTHERS = {"_diffusers_hook", "_compiled_call_impl"}
"""What others than cache-dit may put on a module in the meantime."""


def absent() -> str | None:
    """Why it cannot be used here, or None."""
    if importlib.util.find_spec("cache_dit") is not None:
        return None
    return (
        "dbcache is cache-dit's, which is not installed: pip install cache-dit, or choose "
        "first-block-cache, which is diffusers' own"
    )


@contextmanager
def on(
    policy: DBCache, inner: Any, steps: int, tally: Tally, *, guided: bool
) -> Generator[Stood, None, None]:
    """DBCache on a denoiser, which is as before afterwards.

    Args:
        guided: whether there is guidance; where it comes in calls of its own, as cache-dit knows of
            a class, each second call has a past of its own.

    Raises:
        AccelerationError: cache-dit does not know the denoiser, or refuses.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        library: Any = importlib.import_module("cache_dit")
        name = type(inner).__name__
        if not library.BlockAdapterRegister.is_supported(inner):
            raise AccelerationError(f"cache-dit does not know {name}: choose first-block-cache")
        modules = list(inner.modules())
        stack.callback(_clean, modules, [_state(it) for it in modules])
        blocks = blocks_in(inner)

        def evaluated(*_: Any) -> None:
            tally.evaluated += 1

        def asked(*_: Any) -> None:
            tally.calls += len(blocks)

        for block in blocks:
            stack.callback(block.register_forward_pre_hook(evaluated).remove)
        stack.callback(inner.register_forward_pre_hook(asked).remove)
        config = library.DBCacheConfig(
            Fn_compute_blocks=policy.fn_compute_blocks,
            Bn_compute_blocks=policy.bn_compute_blocks,
            residual_diff_threshold=policy.residual_diff_threshold,
            max_warmup_steps=policy.max_warmup_steps,
            max_cached_steps=policy.max_cached_steps,
            max_continuous_cached_steps=policy.max_continuous_cached_steps,
            num_inference_steps=steps,
            enable_separate_cfg=None if guided else False,
        )
        stack.callback(library.disable_cache, inner)
        try:
            library.enable_cache(inner, cache_config=config)
        except (ValueError, AssertionError, AttributeError) as error:
            raise AccelerationError(f"dbcache cannot be put on {name}: {error}") from error
        separate = inner._context_kwargs["cache_config"].enable_separate_cfg
        yield Stood(hooked=len(blocks), calls_a_step=2 if separate else 1)


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without cache-dit's messages, which it prints where a command's results go."""
    importlib.import_module("cache_dit.logger")
    handlers = logging.getLogger("CACHE_DIT").handlers
    levels = [it.level for it in handlers]
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _state(module: Any) -> dict[str, Any]:
    own = vars(module)
    return {**own, "_modules": list(own["_modules"])}


def _clean(modules: list[Any], before: list[dict[str, Any]]) -> None:
    """Take off what `disable_cache` leaves: a `forward` of its own, and notes."""
    for module, had in zip(modules, before, strict=True):
        own = vars(module)
        for name in own.keys() - had.keys() - _OTHERS:
            del own[name]
        if "forward" in had:
            own["forward"] = had["forward"]
        # Lists of blocks are set again in each call, which puts them last.
        for name in had["_modules"]:
            own["_modules"][name] = own["_modules"].pop(name)
