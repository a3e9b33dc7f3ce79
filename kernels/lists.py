"""Plans from queries and keys: means of tiles, lists of the best of each row, who is on which list.

Each function is there twice. `torch` is the definition, on any device and with gradients. `triton`
is for CUDA: the means of queries and keys in one launch, the lists in a second, with neither a sort
nor a tensor of a byte or more for each pair of tiles. Both agree but for the last bits of sums in
float32, which decide between scores that differ in them.
"""

from __future__ import annotations

import math

import torch

from . import lists_launch as launch
from .listing import entries
from .lists_launch import Backend
from .plan import Tile, tiles_of
from .ranking import above, by_mass, ranks_of
from .reference import pool

MEANS_BYTES = 2**22
"""Tokens in order, in float32, that are alive at a time while `torch` takes their means."""


def tile_means(
    x: torch.Tensor,
    size: int,
    order: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Mean over the valid tokens of each tile, `[B, H, L, D]` to `[B, H, tiles, D]` float32.

    Args:
        x: any strides and floating dtype.
        size: tokens of a tile; the last one may be ragged.
        order: permutation int64 in which tokens are cut into tiles, read as it goes: `[L]` or,
            where heads have their own, `[B or 1, H or 1, L]`.
        backend: None is `triton` where it can, else `torch`.

    Raises:
        ValueError: shapes, dtypes and sizes that do not fit, a backend that cannot.
    """
    _fit_tokens("x", x, order)
    if size < 1:
        raise ValueError(f"size {size}; a tile needs at least one token")
    if launch.takes(backend, x):
        return launch.means(x, None, (size, size), order)[0]
    return _means(x, size, order)


def pair_means(
    q: torch.Tensor,
    k: torch.Tensor,
    tile: Tile,
    order: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tile_means` of queries and of keys, in one launch."""
    for name, x in (("q", q), ("k", k)):
        _fit_tokens(name, x, order)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}; B, H, D and the dtype of "
            "both must be alike"
        )
    if launch.takes(backend, q, k):
        return launch.means(q, k, (tile.query, tile.key), order)
    return _means(q, tile.query, order), _means(k, tile.key, order)


def permuted(
    x: torch.Tensor,
    order: torch.Tensor,
    *,
    inverse: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """`x[:, :, order]`, contiguous; `inverse`: the tensor that this would make `x` of.

    Args:
        x: `[B, H, L, D]`, any strides and floating dtype.
        order: permutation int64, `[L]` or, where heads have their own, `[B or 1, H or 1, L]`.

    Raises:
        ValueError: shapes and dtypes that do not fit, a backend that cannot.
    """
    _fit_tokens("x", x, order)
    if not launch.takes(backend, x):
        return _ordered(x, order.argsort(-1) if inverse else order).contiguous()
    return launch.permuted(x, order, inverse)


def top_tiles(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    count: int,
    forced: torch.Tensor | None = None,
    *,
    width: int | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the `count` tiles of keys whose mean has the largest product with the row's.

    Args:
        means_q, means_k: `[B, H, Q, D]` and `[B, H, K, D]` float32.
        count: how many, 1 to K.
        forced: `[Q, K]` bool, the tiles that are among them whatever their score; where a row has
            more than `count`, just these are kept.
        width: of the lists: at least `widest(forced, count)`, which it is if None. On a GPU finding
            that out waits for it, so a caller who knows says it.

    Returns:
        indices `[B, H, Q, width]` int32, ascending, zeros behind what counts, and counts
        `[B, H, Q]` int32, as a `BlockPlan` takes them. Of equal scores the first tiles are kept;
        scores that are not a number count as the largest.

    Raises:
        ValueError: shapes, dtypes and numbers that do not fit, a backend that cannot.
    """
    _fit_means(means_q, means_k, forced)
    columns = means_k.shape[2]
    _in_range("count", count, columns)
    width = listed_width(width, forced, count, columns)
    if launch.takes(backend, means_q, means_k, columns=columns):
        return launch.choose(means_q, means_k, forced, width, count)
    ranks = ranks_of(means_q @ means_k.mT, forced)
    best = ranks.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, best, True)
    return listed(chosen, forced, width)


def mass_tiles(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    mass: float,
    scale: float,
    forced: torch.Tensor | None = None,
    most: int | None = None,
    *,
    least: int = 0,
    last: float = 1.0,
    width: int | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the fewest best tiles that hold `mass` of the softmax over its tiles.

    A tile weighs exp(`scale` x product of the means) x its tokens.

    Args:
        means_q, means_k: `[B, H, Q, D]` and `[B, H, K, D]` float32.
        mass: 0, with a `least`, to 1, which keeps all tiles.
        forced: `[Q, K]` bool, tiles that are kept before all others; their mass counts.
        most: how many tiles are kept at the most, 1 to K or None for K, if no more are forced.
        least: how many are kept at the least, at most `most`.
        last: tokens of the last tile of keys as a share of those of the others.
        width: of the lists: at least `widest(forced, most)`, see `top_tiles`.

    Returns:
        indices and counts, see `top_tiles`.

    Raises:
        ValueError: shapes, dtypes and numbers that do not fit, a backend that cannot.
    """
    _fit_means(means_q, means_k, forced)
    columns = means_k.shape[2]
    most = columns if most is None else most
    _in_range("most", most, columns)
    if not 0 <= least <= most:
        raise ValueError(f"least {least}; it must be 0 to {most}, the most")
    if not 0 <= mass <= 1 or (mass == 0 and not least):
        raise ValueError(f"mass {mass}; it must be 0 to 1, and above 0 without a least")
    if not 0 < last <= 1:
        raise ValueError(f"last {last}; the last tile has more than 0 and at most 1 of the others")
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}; it must be finite")
    width = listed_width(width, forced, most, columns)
    scale, added = scale * math.log2(math.e), math.log2(last)
    if launch.takes(backend, means_q, means_k, columns=columns):
        return launch.choose(means_q, means_k, forced, width, most, least, (mass, scale, added))
    logits = means_q @ means_k.mT * scale
    logits[..., -1] += added
    return listed(by_mass(logits, mass, forced, least, most), forced, width)


def above_tiles(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    beta: float,
    forced: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the tiles whose score is above mean + `beta` x standard deviation of the row's.

    Args:
        means_q, means_k: `[B, H, Q, D]` and `[B, H, K, D]` float32, whose products are the scores.
        beta: any finite number.
        forced: `[Q, K]` bool, tiles that are kept too.

    Returns:
        indices, as wide as there are tiles of keys, and counts, see `top_tiles`; a row may keep
        none. A mean of queries that is no number or infinite keeps all of its row, one of keys all
        of its head. Squares of scores from 1e19 on overflow: what is kept then says nothing.

    Raises:
        ValueError: shapes, dtypes and numbers that do not fit, a backend that cannot.
    """
    _fit_means(means_q, means_k, forced)
    if not math.isfinite(beta):
        raise ValueError(f"beta {beta}; it must be finite")
    columns = means_k.shape[2]
    # Taking it off changes neither what is above the mean nor how far, only rounding.
    means_k = means_k - means_k.mean(-2, keepdim=True)
    if launch.takes(backend, means_q, means_k, columns=columns):
        return launch.choose_above(means_q, means_k, forced, beta)
    return listed(above(means_q @ means_k.mT, beta), forced, columns)


def transposed(
    indices: torch.Tensor,
    counts: torch.Tensor,
    columns: int,
    *,
    width: int | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each tile of keys the tiles of queries that keep it, for backward passes.

    Args:
        indices, counts: `[B, H, Q, width]` and `[B, H, Q]` int32, as in a `BlockPlan`.
        columns: K, tiles of keys.
        width: of the new lists: at least the most rows that keep a tile. None is Q.

    Returns:
        rows_of `[B, H, K, width]` int32, ascending, zeros behind what counts, and counts
        `[B, H, K]` int32.

    Raises:
        ValueError: shapes, dtypes and numbers that do not fit, a backend that cannot.
    """
    if indices.ndim != 4 or counts.shape != indices.shape[:3]:
        raise ValueError(
            f"indices {tuple(indices.shape)}, counts {tuple(counts.shape)}; [B, H, Q, width] and "
            "[B, H, Q] are needed"
        )
    if indices.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"indices {indices.dtype}, counts {counts.dtype}; both must be int32")
    batch, heads, rows, entries = indices.shape
    if columns < 1 or min(indices.shape) < 1:
        raise ValueError(f"columns {columns}, indices {tuple(indices.shape)}; nothing to turn over")
    width = rows if width is None else width
    _in_range("width", width, rows)
    if not launch.takes(backend, columns=max(columns, rows), integers=indices):
        places = torch.arange(entries, device=indices.device)
        at = torch.where(places < counts[..., None], indices, columns).long()
        chosen = at.new_zeros(batch, heads, rows, columns + 1, dtype=torch.bool)
        return listed(chosen.scatter_(-1, at, True)[..., :-1].mT, None, width)
    return launch.transposed(indices, counts, columns, width)


def left_out(
    indices: torch.Tensor,
    counts: torch.Tensor,
    columns: int,
    *,
    words: int | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Bits of the tiles of keys that a row does not keep, `[B, H, Q, words]` int32.

    Bit i of word w is of tile 32 w + i; there are none behind the last tile.

    Args:
        indices, counts, columns: as in `transposed`.
        words: at least K / 32, which it is, rounded up, if None.
    """
    words = tiles_of(columns, 32) if words is None else words
    _in_range("columns", columns, 32 * words)
    if launch.takes(backend, columns=columns, integers=indices):
        return launch.left_out(indices, counts, columns, words)
    places = torch.arange(indices.shape[3], device=indices.device)
    at = torch.where(places < counts[..., None], indices, columns).long()
    out = torch.zeros(*indices.shape[:3], 32 * words + 1, dtype=torch.int32, device=at.device)
    out[..., :columns] = 1
    out = out.scatter_(-1, at, 0)[..., :-1].unflatten(-1, (words, 32))
    # The highest bit is minus 2^31, as two's complement has it.
    powers = [*(1 << i for i in range(31)), -(1 << 31)]
    return (out * out.new_tensor(powers)).sum(-1, dtype=torch.int32)


def widest(forced: torch.Tensor | None, count: int) -> int:
    """The longest list where each has `count` tiles or, if these are more, those forced."""
    return count if forced is None else max(count, int(forced.sum(-1).max()))


def _means(x: torch.Tensor, size: int, order: torch.Tensor | None) -> torch.Tensor:
    tokens = x.shape[2]
    step = size * max(1, MEANS_BYTES // (4 * size * x[:, :, 0].numel()))
    # Some tiles at a time: all tokens, in order and in float32, leave the caches.
    starts = range(0, tokens, step)
    if order is None:
        parts = (x[:, :, start : start + step] for start in starts)
    else:
        parts = (_ordered(x, order[..., start : start + step]) for start in starts)
    return torch.cat([pool(it.float(), size) for it in parts], dim=2)


def _ordered(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return x
    if order.ndim == 1:
        return x.index_select(2, order)
    return x.gather(2, order.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[3]))


def listed(
    chosen: torch.Tensor, forced: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is true in each row of `chosen` or forced, ascending, then zeros; how many."""
    chosen = chosen if forced is None else chosen | forced
    longest = int(chosen.sum(-1).max())
    if longest > width:
        raise ValueError(f"width {width}; a list has {longest} tiles")
    return entries(chosen, width)


def _fit_tokens(name: str, x: torch.Tensor, order: torch.Tensor | None) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name} {tuple(x.shape)}; [B, H, L, D] is needed, none of them 0")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} {x.dtype}; a floating dtype is needed")
    if order is None:
        return
    tokens = x.shape[2]
    by_head = [(b, h, tokens) for b in (1, x.shape[0]) for h in (1, x.shape[1])]
    if tuple(order.shape) not in [(tokens,), *by_head] or order.dtype != torch.int64:
        raise ValueError(
            f"order {tuple(order.shape)} {order.dtype} for the {tokens} tokens of {name}; it "
            f"must be one permutation of them, or one for each head, int64"
        )
    if order.device != x.device:
        raise ValueError(f"order on {order.device}, {name} on {x.device}; both on one device")


def _fit_means(q: torch.Tensor, k: torch.Tensor, forced: torch.Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"means_q {tuple(q.shape)}, means_k {tuple(k.shape)}; [B, H, Q, D] and [B, H, K, D] "
            "are needed"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"means_q {tuple(q.shape)}, means_k {tuple(k.shape)}; none may be empty")
    if q.dtype != torch.float32 or k.dtype != torch.float32:
        raise ValueError(f"means_q {q.dtype}, means_k {k.dtype}; both must be float32")
    if q.device != k.device or (forced is not None and forced.device != q.device):
        raise ValueError("means_q, means_k and forced must be on one device")
    if forced is not None and (
        forced.shape != (q.shape[2], k.shape[2]) or forced.dtype != torch.bool
    ):
        raise ValueError(
            f"forced {tuple(forced.shape)} {forced.dtype}; [{q.shape[2]}, {k.shape[2]}] of "
            "torch.bool is needed"
        )


def _in_range(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name} {value}; it must be 1 to {most}")


def listed_width(width: int | None, forced: torch.Tensor | None, count: int, columns: int) -> int:
    """What was asked, or the least that serves."""
    width = widest(forced, count) if width is None else width
    if not count <= width <= columns:
        raise ValueError(f"width {width}; it must be {count} to {columns}")
    return width
