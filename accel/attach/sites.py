"""Where an attention call is, and whether a recipe can do anything there."""

from __future__ import annotations

import torch

from ..grid import TokenGrid
from .routes import Call


class NoSiteError(Exception):
    """Why no method can say anything of a call, in words that follow "dense …"."""


def unmasked(call: Call) -> torch.Tensor | None:
    """Numbers of the tokens that the mask of `call` leaves, or None for all of them.

    Raises `NoSiteError` where they are not the same for the whole batch.
    """
    mask = call.mask
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise NoSiteError("because its mask is not one of tokens")
    valid = mask[:, 0, 0]
    if not bool((valid == valid[:1]).all()):
        raise NoSiteError("because texts of different lengths are in one batch")
    return None if bool(valid[0].all()) else valid[0].nonzero()[:, 0]


def text_tokens(
    call: Call, rows: torch.Tensor | None, grid: TokenGrid | None, text: int, first: bool
) -> int:
    """How many of the tokens of `call`, of which `rows` are left, are text.

    All `text` of them stand before the picture (`first`) or behind it. Raises `NoSiteError` where
    the rest is not `grid`, or is masked.
    """
    whole = call.q.shape[2]
    tokens = whole if rows is None else len(rows)
    if not call.flags.plain or call.k.shape != call.q.shape:
        raise NoSiteError("because it is no plain self-attention")
    if grid is None or whole != grid.tokens + text:
        raise NoSiteError(f"because its {whole:,} tokens are not {text} of text and a grid {grid}")
    text = tokens - grid.tokens
    if rows is not None:
        start = whole - grid.tokens if first else 0
        picture = rows[text:] if first else rows[: grid.tokens]
        if not torch.equal(picture.cpu(), torch.arange(start, start + grid.tokens)):
            raise NoSiteError("because tokens of the picture are masked")
    return text


def everywhere(call: Call, rows: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """`out` of the tokens `rows`, or of all, with zeros for the others, `[B, H, L, D]`.

    Nothing looks at the tokens that are masked, as queries either.
    """
    if rows is None:
        return out
    whole = torch.zeros_like(call.q)
    whole[:, :, rows] = out
    return whole
