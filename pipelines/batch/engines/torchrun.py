"""The ranks that torchrun starts share the rows of a batch: each makes its part as `local` does.

They talk once, at the end: torchrun stops all ranks as soon as one fails, so none says that rows
failed before the others have made theirs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from ...errors import RequestError
from .local import Local

if TYPE_CHECKING:
    from ..run import Options

_HOW = "torchrun --nproc-per-node gpu -m kinora.app batch MANIFEST --engine torchrun"
_WAIT = timedelta(days=30)


def engine() -> Torchrun:
    """The engine."""
    return Torchrun()


class Torchrun(Local):
    """One of several such processes."""

    def adapt(self, options: Options) -> Options:
        """The part of this rank, on its device. Raises `RequestError` outside of torchrun."""
        rank, ranks, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if options.workers not in (None, 1):
            raise RequestError(
                f"--workers is {options.workers}: with --engine torchrun each rank is one worker, "
                f"leave it out"
            )
        shard, shards = options.shard
        part = ((shard - 1) * ranks + rank + 1, shards * ranks)
        device = options.device
        if device in ("auto", "cuda"):
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            device = f"cuda:{local % count}" if count else device
        return replace(options, shard=part, device=device, workers=1)

    def agree(self, complete: bool) -> bool:
        """Whether all ranks are; waits for them."""
        import torch
        from torch import distributed

        distributed.init_process_group("gloo", timeout=_WAIT)
        try:
            incomplete = torch.tensor([not complete], dtype=torch.int64)
            distributed.all_reduce(incomplete)
        finally:
            distributed.destroy_process_group()
        return not incomplete.item()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise RequestError(
            f"--engine torchrun finds no {name} in the environment: start it as `{_HOW}`"
        )
    return int(text)
