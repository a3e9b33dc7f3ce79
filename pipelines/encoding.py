"""Texts are encoded once: what an encoder made of one is kept, on the CPU, while its model is."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

from .taps import replaced

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MOST_BYTES = 256 * 2**20
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class _Kept:
    """Tensors and other values of a result, where the tensors were, and how all belong together."""

    leaves: list[Any]
    devices: list[torch.device | None]
    form: Any
    size: int

    @classmethod
    def of(cls, result: Any) -> _Kept:
        leaves, form = pytree.tree_flatten(result)
        tensors = [it if isinstance(it, torch.Tensor) else None for it in leaves]
        held = [
            it if tensor is None else tensor.detach().to("cpu", copy=True)
            for it, tensor in zip(leaves, tensors, strict=True)
        ]
        devices = [None if it is None else it.device for it in tensors]
        size = sum(it.numel() * it.element_size() for it in tensors if it is not None)
        return cls(held, devices, form, size)

    def result(self) -> Any:
        """It again, the caller's to change."""
        leaves = [
            it if device is None else it.to(device, copy=True)
            for it, device in zip(self.leaves, self.devices, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.form)


class Encodings:
    """Of one model: those used last, of up to `most` bytes together."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._size = most, 0
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    def of(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """What `encode` gives, or gave for this key."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found.result()
        result = encode()
        kept = _Kept.of(result)
        if kept.size <= self._most:
            self._kept[key] = kept
            self._size += kept.size
        while self._size > self._most:
            _, dropped = self._kept.popitem(last=False)
            self._size -= dropped.size
        return result


@contextmanager
def remembered(pipe: Any, encodings: Encodings) -> Generator[None, None, None]:
    """Have the text encoders of `pipe` take what they have made before from `encodings`."""

    def encode(
        name: str, names: inspect.Signature, original: Any, *args: Any, **kwargs: Any
    ) -> Any:
        key = _key(name, names.bind(*args, **kwargs).arguments)
        run = partial(original, *args, **kwargs)
        return run() if key is None else encodings.of(key, run)

    with ExitStack() as stack:
        for name in ENCODERS:
            encoder = getattr(pipe, name, None)
            if isinstance(encoder, torch.nn.Module) and not encoder.training:
                taken = partial(encode, name, inspect.signature(encoder.forward))
                stack.enter_context(replaced(encoder, "forward", taken))
        yield


def _key(name: str, given: Any) -> Hashable | None:
    """Tells calls apart that give different results; None where that cannot be told."""
    parts: list[Hashable] = [name]
    leaves, form = pytree.tree_flatten(dict(given))
    for it in leaves:
        if isinstance(it, torch.Tensor):
            if it.is_floating_point():  # no text, but something that was made of one
                return None
            numbers = it.detach().cpu().contiguous().numpy().tobytes()
            parts.append((tuple(it.shape), str(it.dtype), str(it.device), numbers))
        elif isinstance(it, _PLAIN):
            parts.append((type(it).__name__, it))
        else:
            return None
    return (*parts, str(form))
