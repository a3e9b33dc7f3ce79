"""Taps on one loaded pipeline for the length of one run, taken off again whatever happens.

They time the encoders of text and image, see every denoising step, and hold the latents back for
saving just before the autoencoder decodes them. All are attributes of the instances (`pipe`,
`pipe.vae`): classes and other pipelines stay untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch

from .cards import Precision
from .frames import check_finite
from .latents import Calls, DecodeState
from .run import StageClock


@contextmanager
def tapped(
    pipe: Any,
    clock: StageClock,
    *,
    check: Callable[[], None],
    before_decode: Callable[[Calls, DecodeState], None],
    after_text: Callable[[], None],
) -> Generator[None, None, None]:
    """Run the body with taps on `pipe`.

    `check` is called before anything is encoded and each part of decoding and may raise to stop the
    run. `after_text` is called when a text is encoded. `before_decode` gets the tensors of every
    `vae.decode` call so far, before the last one runs. Raises `GenerationError` where decoding
    gives values that are no finite numbers.
    """
    calls: Calls = []
    vae = pipe.vae
    signature = inspect.signature(vae.decode)

    def encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check()
        clock.switch("text")
        try:
            return original(*args, **kwargs)
        finally:
            clock.switch("denoise")

    def encode_prompt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        encoded = encode(original, *args, **kwargs)
        after_text()
        return encoded

    def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check()
        given = signature.bind(*args, **kwargs).arguments
        calls.append({key: it for key, it in given.items() if isinstance(it, torch.Tensor)})
        clock.switch("save")
        before_decode(calls, decode_state(pipe))
        check()
        clock.switch("decode")
        decoded = original(*args, **kwargs)
        check_finite([decoded[0]], "decoding", decode_state(pipe).vae_dtype)
        return decoded

    with ExitStack() as stack:
        if hasattr(pipe, "encode_prompt"):
            stack.enter_context(replaced(pipe, "encode_prompt", encode_prompt))
        for owner, name in ((pipe, "encode_image"), (vae, "encode")):  # of what a video begins with
            if hasattr(owner, name):
                stack.enter_context(replaced(owner, name, encode))
        stack.enter_context(replaced(vae, "decode", decode))
        stack.enter_context(stoppable(vae, check))
        yield


@contextmanager
def stoppable(vae: Any, check: Callable[[], None]) -> Generator[None, None, None]:
    """Call `check`, which may raise, before each chunk of frames that `vae` decodes in the body."""
    decoder = getattr(vae, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield
        return
    hook = decoder.register_forward_pre_hook(lambda *_: check())
    try:
        yield
    finally:
        hook.remove()


def decode_state(pipe: Any) -> DecodeState:
    """What a later decode must know about the autoencoder of `pipe`, as it is now."""
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    return DecodeState(
        vae_dtype=cast("Precision", str(pipe.vae.dtype).removeprefix("torch.")),
        tiling=bool(getattr(pipe.vae, "use_tiling", False)),
        slicing=bool(getattr(pipe.vae, "use_slicing", False)),
        normalised=bool(getattr(getattr(processor, "config", None), "do_normalize", True)),
    )


class _Tap(partial[Any]):
    """What stands in for a method while it is tapped."""


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Generator[None, None, None]:
    """Shadow a method of one instance; what lay in the instance before comes back afterwards."""
    original = getattr(owner, name)
    if isinstance(original, _Tap):
        # Taps of two runs would come off in the wrong order and stay on for good.
        raise RuntimeError(f"{type(owner).__name__}.{name} is tapped: its pipeline runs already")
    had, before = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, _Tap(replacement, original))
    try:
        yield
    finally:
        if had:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)


@contextmanager
def without_progress_bar(pipe: Any) -> Generator[None, None, None]:
    """Keep diffusers' own progress bar off for the length of the run."""
    had, before = hasattr(pipe, "_progress_bar_config"), getattr(pipe, "_progress_bar_config", None)
    pipe._progress_bar_config = {"disable": True}
    try:
        yield
    finally:
        if had:
            pipe._progress_bar_config = before
        else:
            del pipe._progress_bar_config
