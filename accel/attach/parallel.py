"""Several processes at one video: who they are, what they share, and what cannot be shared.

diffusers' context parallelism splits tokens at the first block and gathers them behind the last.
Its plans of who splits what stand here for each family, since some have none there and others are
of attention that does not look at where tokens come from. Attention itself is `exchange`'s.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models import _modeling_parallel as modeling  # pyright: ignore[reportPrivateUsage]
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import AccelerationError
from ..method import AttentionMethod, Wrapper
from ..parallel import Parallel
from ..policies import CachePolicy, MagCache
from ..recipe import Recipe
from ..steps import Compute, Decision, Skip
from ..wrappers import Reuse
from .family import Arguments

Config = Mapping[str, Any]
ContextPlan = dict[str, Any]


def _split(axis: int) -> Any:
    return modeling.ContextParallelInput(split_dim=axis)


def _split_output(axis: int) -> Any:
    return modeling.ContextParallelInput(split_dim=axis, split_output=True)


_GATHERED = modeling.ContextParallelOutput(gather_dim=1)
_JOINT = {"hidden_states": _split(1), "encoder_hidden_states": _split(1)}

PLANS: dict[str, ContextPlan] = {
    "WanTransformer3DModel": {
        "blocks.0": {"hidden_states": _split(1)},
        "rope": {0: _split_output(1), 1: _split_output(1)},
        "proj_out": _GATHERED,
    },
    "LTXVideoTransformer3DModel": {
        # Its text stays whole: attention to it is no exchange, and would see a part.
        "": {"hidden_states": _split(1)},
        "rope": {0: _split_output(1), 1: _split_output(1)},
        "proj_out": _GATHERED,
    },
    "FluxTransformer2DModel": {
        "": {**_JOINT, "img_ids": _split(0), "txt_ids": _split(0)},
        "proj_out": _GATHERED,
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks.0": _JOINT,
        "transformer_blocks.*": {"encoder_hidden_states_mask": _split(1)},
        "pos_embed": {0: _split_output(0), 1: _split_output(0)},
        "proj_out": _GATHERED,
    },
    "HunyuanVideoTransformer3DModel": {
        "transformer_blocks.0": _JOINT,
        "rope": {0: _split_output(0), 1: _split_output(0)},
        "proj_out": _GATHERED,
    },
    "CogVideoXTransformer3DModel": {
        "transformer_blocks.0": _JOINT,
        "transformer_blocks.*": {"image_rotary_emb": [_split(0), _split(0)]},
        "proj_out": _GATHERED,
    },
}
"""What is split and gathered where, by class name of the denoiser."""
BATCHED_GUIDANCE = frozenset({"CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel"})
"""Denoisers whose pipelines give them both guidance branches in one batch."""
_HEADS_TOGETHER: dict[str, tuple[str, str] | None] = {
    "hierarchical": None,
    "kv-merge": ("heads", "shared"),
    "neighborhood": None,
    "permuted-blocks": None,
    "sliding-tile": None,
    "threshold-blocks": None,
    "top-blocks": ("budget", "by-head"),
    "vmoba": ("scope", "global"),
    "x-attention": None,
}
"""Methods whose plan of a head comes of that head alone, but where an option is so."""
_LEAVE = "leave [parallel] out"


def plans_by_head(method: AttentionMethod) -> bool:
    """Whether some of the heads have, without the others, the plans that they have among all."""
    while isinstance(method, Wrapper):
        method = method.method
    if method.name not in _HEADS_TOGETHER:
        return False
    together = _HEADS_TOGETHER[method.name]
    return together is None or getattr(method, together[0]) != together[1]


def refusal(recipe: Recipe, denoiser: str, config: Config) -> str | None:
    """Why several processes cannot share a denoiser of this class and config, or None."""
    asked = recipe.parallel
    if asked is None:
        return None
    if denoiser not in PLANS:
        return f"{denoiser} cannot be shared by processes, only {', '.join(PLANS)}: {_LEAVE}"
    heads = int(config["num_attention_heads"])
    if heads % asked.ulysses:
        fits = ", ".join(str(it) for it in range(2, heads + 1) if heads % it == 0) or "1"
        return (
            f"parallel.ulysses is {asked.ulysses}, which does not divide the {heads} heads of "
            f"{denoiser}: choose {fits}"
        )
    if asked.ring > 1 and recipe.attention is not None:
        return (
            f"parallel.ring is {asked.ring}, where each process sees the keys piece by piece, and "
            f"{recipe.attention.name} chooses among all of them: use parallel.ulysses"
        )
    if asked.ring > 1 and recipe.dense_kernel != "stock":
        return (
            f"parallel.ring needs logarithms of sums, which the dense kernel {recipe.dense_kernel} "
            f"does not tell: leave dense_kernel out"
        )
    policy = recipe.steps
    if policy is not None and policy.prunes():
        return f"steps.prune leaves out tokens, which several processes hold: {_LEAVE}, or prune"
    if isinstance(policy, CachePolicy) and (asked.cfg > 1 or not policy.shards):
        return (
            f"{policy.name} decides by what is computed, in each process for itself, and several "
            f"share {denoiser}: choose a policy that skips steps, such as shadow"
        )
    if isinstance(policy, MagCache) and asked.tokens > 1:
        return (
            f"{policy.name} keeps what blocks add to all tokens, of which each process has some "
            f"within them: choose a policy that skips steps, such as shadow"
        )
    if asked.cfg > 1 and _shares_branches(recipe.attention):
        return (
            "attention.branches is shared, and with parallel.cfg each branch is in another "
            "process: leave one of them out"
        )
    if asked.tokens > 1 and config.get("image_condition_type") == "token_replace":
        return f"blocks of this {denoiser} treat tokens by their place: {_LEAVE}, or use cfg alone"
    return None


def _shares_branches(method: AttentionMethod | None) -> bool:
    while isinstance(method, Wrapper):
        if isinstance(method, Reuse) and method.branches == "shared":
            return True
        method = method.method
    return False


def check_given(denoiser: str, given: Arguments) -> None:
    """Raise AccelerationError where a denoiser is given what `PLANS` do not split."""
    timestep = given.get("timestep")
    if isinstance(timestep, torch.Tensor) and timestep.ndim > 1:
        raise AccelerationError(f"{denoiser} is given a time for each token: {_LEAVE}")
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if given.get(name) is not None:
            raise AccelerationError(f"{denoiser} is given {name}, which is of all tokens: {_LEAVE}")


class Order(NamedTuple):
    """Tokens as a model orders them, and as they come from one process after another.

    Both `[L]` int64: `places` of the model's tokens in that `row`, and what tokens the row is of.
    """

    places: torch.Tensor
    row: torch.Tensor


@dataclass(eq=False)
class Ranks:
    """This process among those that make one video.

    Attributes:
        asked: their factors.
        everyone: the group of all of them.
        context: diffusers' options; None where tokens are not shared.
    """

    asked: Parallel
    mesh: DeviceMesh
    device: torch.device
    everyone: Any
    context: ContextParallelConfig | None
    _orders: dict[Any, Order] = field(default_factory=dict[Any, "Order"])

    @property
    def branch(self) -> int:
        """Which guidance branch is its own."""
        return self.mesh["cfg"].get_local_rank()

    @property
    def heads_group(self) -> Any:
        """The group among which heads are shared."""
        return self.mesh["ulysses"].get_group()

    @property
    def cfg_group(self) -> Any:
        """The group among which guidance branches are shared."""
        return self.mesh["cfg"].get_group()

    def heads(self, own: int) -> slice:
        """The numbers of its `own` heads."""
        first = self.mesh["ulysses"].get_local_rank() * own
        return slice(first, first + own)

    def agree(self, decision: Decision) -> Decision:
        """A step is skipped where all want to; else all evaluate it."""
        want = torch.tensor([isinstance(decision, Skip)], dtype=torch.int32, device=self.device)
        distributed.all_reduce(want, distributed.ReduceOp.MIN, self.everyone)
        return decision if want.item() else Compute()

    def cut(self, *lengths: int) -> None:
        """Have each of these numbers of tokens split, unevenly where it must be.

        Raises AccelerationError.
        """
        assert self.context is not None
        count = self.asked.tokens
        uneven = [it for it in lengths if it % count]
        if uneven and self.asked.ring > 1:
            raise AccelerationError(
                f"parallel.ring splits tokens evenly, and {uneven[0]:,} are not {count} parts: use "
                f"parallel.ulysses alone, or another size"
            )
        few = [it for it in lengths if 0 < it < count]
        if few:
            raise AccelerationError(
                f"{few[0]} tokens cannot be shared by {count} processes: {_LEAVE}"
            )
        self.context.ulysses_anything = bool(uneven)

    def parts(self, length: int) -> list[int]:
        """How many tokens of `length` each process has."""
        count = self.asked.tokens
        return [length // count + (it < length % count) for it in range(count)]

    def order(self, text: int, picture: int, first: bool, device: torch.device) -> Order:
        """How tokens stand, of which each process has some text beside some of the picture.

        Text is `first`, or last, in each process and in all.
        """
        key = text, picture, first, device
        if key not in self._orders:
            tokens = torch.arange(text + picture)
            texts, pictures = (
                (tokens[:text], tokens[text:]) if first else (tokens[picture:], tokens[:picture])
            )
            rows: list[torch.Tensor] = []
            of_text = texts.split(self.parts(text))
            for some, shown in zip(of_text, pictures.split(self.parts(picture)), strict=True):
                rows += [some, shown] if first else [shown, some]
            row = torch.cat(rows)
            self._orders[key] = Order(row.argsort().to(device), row.to(device))
        return self._orders[key]


_joined: dict[tuple[Any, ...], Ranks] = {}


def joined(asked: Parallel, device: torch.device) -> Ranks:
    """This process among those that torchrun has started.

    Raises:
        AccelerationError: there are none, or not as many as `asked` for.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread, as collectives expect it
    _start(asked, device)
    world = distributed.get_world_size()
    if world % asked.processes:
        raise AccelerationError(
            f"[parallel] asks for {asked.words()}, and {world} are running: start a multiple, as "
            f"with torchrun --nproc-per-node {asked.processes}"
        )
    key = (distributed.group.WORLD, device, asked)
    if key not in _joined:
        for gone in [it for it in _joined if it[0] is not distributed.group.WORLD]:
            del _joined[gone]
        shape = (world // asked.processes, asked.cfg, asked.ring, asked.ulysses)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cfg", "ring", "ulysses"))
        context = None
        if asked.tokens > 1:
            context = ContextParallelConfig(
                ring_degree=asked.ring, ulysses_degree=asked.ulysses, mesh=mesh
            )
            context.setup(distributed.get_rank(), world, device, mesh)
        together: Any = mesh["cfg", "ring", "ulysses"]
        everyone = together._flatten().get_group()
        _joined[key] = Ranks(asked, mesh, device, everyone, context)
    return _joined[key]


def _start(asked: Parallel, device: torch.device) -> None:
    if distributed.is_initialized():
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise AccelerationError(
            f"[parallel] asks for {asked.words()}, and this is one alone: start it as torchrun "
            f"--nproc-per-node {asked.processes} -m kinora.app …, or {_LEAVE}"
        )
    # diffusers looks for "cpu" in the name, to exchange lengths there.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo")


@contextmanager
def shared(inner: Any, ranks: Ranks) -> Generator[None, None, None]:
    """Have the tokens of a denoiser split and gathered."""
    if ranks.context is None:
        yield
        return
    plan = PLANS[type(inner).__name__]
    apply_context_parallel(inner, ranks.context, plan)
    try:
        yield
    finally:
        remove_context_parallel(inner, plan)
