"""Muon for many small matrices at once.

`torch.optim.Muon` orthogonalises matrix by matrix; for the hundred small matrices of this model the
GPU then mostly waits for launches. Here matrices of one shape are stacked and go through the
Newton-Schulz iteration together. Same update as torch's with `adjust_lr_fn="match_rms_adamw"`.

Source: Jordan et al. 2024, "Muon"; the factor 0.2 sqrt(max(m, n)) is from Liu et al. 2025, "Muon is
scalable for LLM training". Differs from them: nothing but the stacking.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices and convolutions.

    Args:
        parameters: matrices `[m, n]`, or filters `[m, …]`, which are taken as matrices of m rows.
        lr: on the scale of AdamW's, for an update of AdamW's usual size.
        momentum: of the running mean of gradients (Nesterov's form).
        weight_decay: decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon is for matrices, {tuple(parameter.shape)} given")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._step(parameters, group)

    def _step(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        # One momentum for the stack, kept with its first matrix.
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - group["momentum"])
        ahead = gradients.lerp(state["momentum"], group["momentum"])
        updates = orthogonalise(ahead.flatten(2)).view_as(ahead)
        rows = parameters[0].shape[0]
        size = 0.2 * max(rows, parameters[0].numel() // rows) ** 0.5
        one_call: Any = torch  # for all of them, as torch's own optimizers do it
        one_call._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        one_call._foreach_add_(parameters, list(updates), alpha=-group["lr"] * size)


def muon_and_adamw(
    module: torch.nn.Module, inner: Callable[[str, torch.nn.Parameter], bool], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the trained parameters for which `inner(name, parameter)`, AdamW for the rest."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if inner(name, p)]
    others = [p for name, p in named if not inner(name, p)]
    return [
        Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(
            others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda
        ),
    ]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """For every group of every optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def take_step(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Update with all of them and drop the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each matrix, by five Newton-Schulz iterations in bfloat16.

    Args:
        matrices: `[B, m, n]`.

    Returns:
        `[B, m, n]` in the same dtype; singular values within about 0.7 to 1.2.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)
