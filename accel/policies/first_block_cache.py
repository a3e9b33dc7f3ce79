"""`first-block-cache`: diffusers' FirstBlockCache."""

from __future__ import annotations

from typing import ClassVar

from ..options import option
from .cache import CachePolicy


class FirstBlockCache(CachePolicy):
    """All blocks after the first are reused where what the first adds has hardly changed.

    Compared is the residual of block 0 with that of the last step that was evaluated whole, by mean
    magnitudes; then what the other blocks added there is added again. There is no warm-up, and no
    bound on how many steps in a row are reused.

    Source: diffusers' FirstBlockCache, after ParaAttention, which goes back to TeaCache (arXiv
    2411.19108).
    Differs from the paper: the indicator is the first block's residual itself, where TeaCache fits
    a polynomial to its modulated input and adds it up over steps.
    """

    name: ClassVar[str] = "first-block-cache"
    paper: ClassVar[str] = "arXiv 2411.19108"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = "a cache is wanted that needs no measurements of the model before."
    shards: ClassVar[bool] = False

    threshold: float = option(
        0.05, "Relative change of the first block's residual up to which the others are reused",
        least=0, most=10,
    )  # fmt: skip
