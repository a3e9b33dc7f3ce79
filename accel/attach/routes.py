"""The two ways by which attention calls of a denoiser reach a session.

Dispatching models: a backend of our own, named on the processors of the self-attention modules
alone. Others: torch's `scaled_dot_product_attention`, taken over while the denoiser runs.

Nothing of a session is visible to `torch.compile`: a compiled call goes through one operator whose
body looks up, when it runs, which session is active and which layer is next. So all layers and
steps share one compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.models import attention_dispatch as dispatch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import AccelerationError

BACKEND = "kinora"


class Flags(NamedTuple):
    """What an attention call can ask for besides; plain ones ask for nothing."""

    dropout_p: float
    is_causal: bool
    enable_gqa: bool

    @property
    def plain(self) -> bool:
        return not (self.dropout_p or self.is_causal or self.enable_gqa)


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call.

    Attributes:
        q, k, v: `[B, H, L, D]`.
        mask: what the model passed, or None.
        scale: of the logits; None is `D ** -0.5`.
        flags: what else is asked for.
        dense: the stock result, laid out as the route returns it.
        laid_out: brings `[B, H, L, D]` into that layout.
        stock: the stock result, laid out so too, of other q, k, v and mask in the place of these.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    flags: Flags
    dense: Callable[[], torch.Tensor]
    laid_out: Callable[[torch.Tensor], torch.Tensor]
    stock: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Listener(Protocol):
    """What a session does while its denoiser runs."""

    def attend(self, call: Call) -> torch.Tensor:
        """The result of a call, laid out as `call.laid_out` does."""
        ...

    def stock_backend(self) -> Any:
        """The dispatcher's backend that the next layer would use without a session."""
        ...

    def at(self, place: int) -> None:
        """The attention at `place` among those of the denoiser is the next to run."""
        ...


active: ContextVar[Listener | None] = ContextVar("active", default=None)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    heads_first: bool,
) -> torch.Tensor:
    """A call of either route: `[B, H, L, D]` where torch was called, else `[B, L, H, D]`."""
    flags = Flags(dropout_p, is_causal, enable_gqa)
    listener = active.get()
    # Without a session it is a copy of a denoiser that was made inside of one: stock.
    stock = None if listener is None or heads_first else listener.stock_backend()

    def compute(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        given: dict[str, Any] = {"attn_mask": mask, "scale": scale, **flags._asdict()}
        if not heads_first:
            return dispatch.dispatch_attention_fn(query, key, value, backend=stock, **given)
        with unrouted():
            return F.scaled_dot_product_attention(query, key, value, **given)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x if heads_first else x.transpose(1, 2)

    def of(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return compute(turned(q), turned(k), turned(v), mask)

    def dense() -> torch.Tensor:
        return compute(query, key, value, mask)

    if listener is None:
        return dense()
    q, k, v = (turned(x) for x in (query, key, value))
    return listener.attend(Call(q, k, v, mask, scale, flags, dense, turned, of))


# One list of arguments for the function and for the operator.
_SCHEMA = torch.library.infer_schema(_attention, mutates_args=())


@torch.library.custom_op("kinora::attention", mutates_args=(), schema=_SCHEMA)
def _attention_op(*args: Any) -> torch.Tensor:
    return _attention(*args).contiguous()


@_attention_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    del key
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _routed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
    *,
    heads_first: bool = False,
) -> torch.Tensor:
    """A call as torch and diffusers spell it; through the operator while `torch.compile` looks."""
    if _parallel_config is not None:
        raise AccelerationError(
            "diffusers' context parallelism is on, which a recipe puts on itself: leave "
            "enable_parallelism out, and use parallel.ulysses"
        )
    flags = (dropout_p, is_causal, enable_gqa)
    args = (query, key, value, attn_mask, scale, *flags, heads_first)
    if torch.compiler.is_compiling():
        return torch.ops.kinora.attention(*args)
    return _attention(*args)


# --- dispatching models -----------------------------------------------------------------------


def backend() -> Any:
    """Our member of diffusers' enumeration of backends; made known to it at first use.

    It stays known, and does nothing unless a processor names it.
    """
    names: Any = dispatch.AttentionBackendName
    if BACKEND not in names.__members__:
        member = str.__new__(names, BACKEND)
        member._name_, member._value_ = BACKEND, BACKEND
        names._member_map_[BACKEND] = member
        names._member_names_.append(BACKEND)
        names._value2member_map_[BACKEND] = member
        type.__setattr__(names, BACKEND, member)
        registry: Any = dispatch._AttentionBackendRegistry  # pyright: ignore[reportPrivateUsage]
        registry.register(member)(_routed)
    return names(BACKEND)


@contextmanager
def routed(processors: list[Any]) -> Generator[list[Any], None, None]:
    """Name our backend on `processors`; yields what each named before."""
    member = backend()
    before = [processor._attention_backend for processor in processors]
    own = ["_attention_backend" in vars(processor) for processor in processors]
    for processor in processors:
        processor._attention_backend = member
    try:
        yield before
    finally:
        for processor, earlier, had in zip(processors, before, own, strict=True):
            if had:
                processor._attention_backend = earlier
            else:
                del processor._attention_backend


@contextmanager
def announced(modules: Iterable[torch.nn.Module]) -> Generator[None, None, None]:
    """Tell the active session before each of these attentions runs, in any order."""

    def before(place: int, *_: Any) -> None:
        listener = active.get()
        if listener is not None:
            listener.at(place)

    handles = [
        it.register_forward_pre_hook(partial(before, place)) for place, it in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- models that call torch themselves --------------------------------------------------------


def unrouted() -> AbstractContextManager[None]:
    """Where torch's attention is torch's: around a compiled denoiser `TakeOver` is still on."""
    return torch._C.DisableTorchFunction()  # pyright: ignore[reportPrivateUsage]


class TakeOver(TorchFunctionMode):
    """Sends every `scaled_dot_product_attention` in its body to the active session."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            # Its body asks super(), which `torch.compile` cannot follow from within a mode.
            func = torch.unflatten
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _routed(*args, **kwargs, heads_first=True)
