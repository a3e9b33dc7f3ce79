"""`dbcache`: cache-dit's DBCache, where that is installed."""

from __future__ import annotations

from typing import ClassVar

from ..options import option
from .cache import CachePolicy


class DBCache(CachePolicy):
    """The middle blocks are reused where what the first ones add has hardly changed.

    The first `fn_compute_blocks` always run and are compared with the last step that ran whole, by
    mean magnitudes of their residual; what the blocks between added there is added again; the last
    `bn_compute_blocks` always run on the sum. Models with two lists of blocks, as Flux, have this
    in each of them.

    Source: DBCache of cache-dit, whose one-block form is ParaAttention's first-block cache, which
    goes back to TeaCache (arXiv 2411.19108).
    Differs from the paper: the indicator is a residual itself, where TeaCache fits a polynomial to
    the modulated input of the first block and adds it up over steps.
    """

    name: ClassVar[str] = "dbcache"
    paper: ClassVar[str] = "arXiv 2411.19108"
    licence: ClassVar[str] = "Apache-2.0"
    library: ClassVar[str] = "cache-dit"
    use_when: ClassVar[str] = (
        "cache-dit is installed, and reuse is to be bounded by warm-up and caps, or the last "
        "blocks are to run."
    )
    shards: ClassVar[bool] = False

    fn_compute_blocks: int = option(
        8, "Blocks at the start that always run, and are compared", least=1, most=1000,
        unit="blocks",
    )  # fmt: skip
    bn_compute_blocks: int = option(
        0, "Blocks at the end that always run", least=0, most=1000, unit="blocks"
    )
    residual_diff_threshold: float = option(
        0.08, "Relative change of the first blocks' residual up to which others are reused",
        least=0, most=10,
    )  # fmt: skip
    max_warmup_steps: int = option(
        8, "Steps that are all evaluated at the start", least=1, most=1000, unit="steps"
    )
    max_cached_steps: int = option(
        -1, "Steps that may be reused in a run; -1 is any number", least=-1, most=1000, unit="steps"
    )
    max_continuous_cached_steps: int = option(
        -1, "Steps that may be reused one after another; -1 is any number", least=-1, most=1000,
        unit="steps",
    )  # fmt: skip

    def remedy(self) -> str:
        """See `CachePolicy`."""
        return (
            "raise residual_diff_threshold, or give fewer max_warmup_steps or fn_compute_blocks, "
            "which must be fewer than the blocks that there are"
        )
