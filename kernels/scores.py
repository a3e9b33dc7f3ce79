"""Scores of tiles from logits of some of their tokens, and the lists of the heaviest.

As in `lists`, each function is there twice: `torch` is the definition, `triton` writes no logits
down and sorts nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from . import lists_launch as launch
from .lists import by_mass, listed, listed_width
from .lists_launch import Backend
from .plan import tiles_of
from .triton_support import interpreted, on_device, padded

LOGITS_BYTES = 2**26
"""Logits in float32 that are alive at a time in `torch`."""
JOINED_BYTES = 2**29
"""What groups of columns leave of all rows, alive at a time if of more than a head."""
Reduce = Literal["largest", "log-sum-exp"]
_COLUMNS = 128


def tile_scores(
    a: torch.Tensor,
    b: torch.Tensor,
    sizes: tuple[int, int],
    reduce: Reduce,
    scale: float,
    added: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """How much groups of rows attend to groups of columns, as logarithms.

    Of logits `scale * a @ b.mT` the largest, or the log-sum-exp, of each group of columns; less the
    largest, or the log-sum-exp, of their row; then the same of each group of rows.

    Args:
        a, b: `[B, H, M, D]` and `[B, H, N, D]` of one floating dtype.
        sizes: rows and columns of a group; the last ones may have fewer.
        added: `[M]` and `[N]` float32, logarithms of what rows and columns weigh. Those of rows are
            added at the end.

    Returns:
        `[B, H, groups of rows, groups of columns]` float32, float64 of float64.
    """
    rows, columns = a.shape[2], tiles_of(b.shape[2], sizes[1])
    many = max(1, JOINED_BYTES // (4 * a.shape[0] * rows * columns))
    found = [
        join_rows(
            group_logits(*some, sizes[1], reduce, scale, added[1], backend=backend),
            sizes[0], reduce, added[0], backend=backend,
        )
        for some in zip(a.split(many, 1), b.split(many, 1), strict=True)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def group_logits(
    a: torch.Tensor,
    b: torch.Tensor,
    group: int,
    reduce: Reduce,
    scale: float,
    added: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Of logits `scale * a @ b.mT + added` one number for every `group` columns.

    Args:
        a, b: `[B, H, M, D]` and `[B, H, N, D]` of one floating dtype.
        group: columns that leave their largest logit, or the log-sum-exp of theirs; the last group
            may have fewer.
        added: `[N]` float32.
        backend: None is `triton` where it can, for groups of a power of two up to 128; else
            `torch`.

    Returns:
        `[B, H, M, N / group rounded up]` float32, float64 of float64. What is no number
        makes its group none.

    Raises:
        ValueError: a group of less than 1, a backend that cannot.
    """
    batch, heads, rows, dim = a.shape
    columns = b.shape[2]
    groups = tiles_of(columns, max(1, group))
    if group < 1:
        raise ValueError(f"groups of {group} columns; at least 1 is needed")
    fits = group <= _COLUMNS and group & (group - 1) == 0
    if backend == "triton" and not fits:
        raise ValueError(f"backend triton takes groups of a power of two up to 128, not {group}")
    if not fits or not launch.takes(backend, a, b):
        return _group_logits(a, b, group, reduce, scale, added)
    out = torch.empty(batch, heads, rows, groups, dtype=torch.float32, device=a.device)
    a, b = _rows_whole(a), _rows_whole(b)
    half = a.dtype != torch.float32
    size: dict[str, Any] = {"ROWS": 128 if half else 64, "STEP": 64 if half else 32}
    blocks = tiles_of(rows, size["ROWS"]) * tiles_of(columns, _COLUMNS)
    from . import scores_kernels

    kernel: Any = scores_kernels.group_logits
    with on_device(a):
        kernel[(blocks, batch * heads)](
            a, b, out if added is None else added, out, *a.stride()[:3], *b.stride()[:3],
            heads, rows, columns, groups, scale, DIM=dim, GROUP=group, COLUMNS=_COLUMNS,
            SUMS=reduce == "log-sum-exp", ADDED=added is not None, WIDE=interpreted(),
            PRECISION="ieee" if half else launch.precision(a.device),
            num_warps=8, num_stages=3 if half else 2, **size,
        )  # fmt: skip
    return out


def _group_logits(
    a: torch.Tensor, b: torch.Tensor, group: int, reduce: str, scale: float,
    added: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    wide = torch.promote_types(a.dtype, torch.float32)
    batch, heads, rows, _ = a.shape
    columns = b.shape[2]
    out = a.new_empty(batch, heads, rows, tiles_of(columns, group), dtype=wide)
    # Of one head; some rows of it, or several heads.
    step = max(1, min(rows, LOGITS_BYTES // (wide.itemsize * columns)))
    many = max(1, LOGITS_BYTES // (wide.itemsize * columns * step))
    flat = zip(*(x.flatten(0, 1).split(many) for x in (a, b, out)), strict=True)
    for queries, keys, to in flat:
        keys = keys.to(wide).mT
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = queries[:, part].to(wide) @ keys * scale
            if added is not None:
                logits = logits + added
            missing = -columns % group
            parts = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
            parts = parts.unflatten(-1, (-1, group))
            to[:, part] = parts.amax(-1) if reduce == "largest" else parts.logsumexp(-1)
    return out


def mean_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, *, backend: Backend | None = None
) -> torch.Tensor:
    """Mean over queries of the softmax of `scale * q @ k.mT` over all keys.

    Args:
        q, k: `[B, H, M, D]` and `[B, H, N, D]` of one floating dtype.

    Returns:
        `[B, H, N]` float32. A query with a logit that is no number, or infinite, makes all of its
        head none.

    Raises:
        ValueError: a backend that cannot.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if not launch.takes(backend, q, k):
        step = max(1, LOGITS_BYTES // (4 * keys))
        out = q.new_zeros(batch * heads, keys, dtype=torch.float32)
        for a, b, to in zip(q.flatten(0, 1), k.flatten(0, 1), out, strict=True):
            for some in a.split(step):
                to += (some.float() @ b.float().mT).mul_(scale).softmax(-1).sum(0)
        return (out / queries).unflatten(0, (batch, heads))
    whole = group_logits(q, k, _COLUMNS, "log-sum-exp", scale, backend=backend).logsumexp(-1)
    whole = whole.masked_fill(whole == torch.inf, torch.nan)
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    q, k, half = _rows_whole(q), _rows_whole(k), q.dtype != torch.float32
    block = 128 if half else 64
    from . import scores_kernels

    kernel: Any = scores_kernels.mean_attention
    with on_device(q):
        kernel[(tiles_of(keys, block), batch * heads)](
            q, k, whole, out, *q.stride()[:3], *k.stride()[:3], heads, queries, keys, scale,
            DIM=dim, PADDED_DIM=padded(dim), QUERIES=block, KEYS=block, WIDE=interpreted(),
            PRECISION="ieee" if half else launch.precision(q.device), num_warps=8,
        )  # fmt: skip
    return out


def _rows_whole(x: torch.Tensor) -> torch.Tensor:
    """With the numbers of a token side by side; else as it lies."""
    return x if x.stride(3) == 1 else x.contiguous()


def join_rows(
    logits: torch.Tensor,
    high: int,
    reduce: Reduce,
    added: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Of logits less the largest, or the log-sum-exp, of their row the same of every `high` rows.

    Args:
        logits: `[B, H, M, K]` float32 or float64.
        added: `[M]` float32, added to the rows before they are joined.

    Returns:
        `[B, H, M / high rounded up, K]` of the dtype of `logits`.

    Raises:
        ValueError: less than a row, a backend that cannot.
    """
    if high < 1:
        raise ValueError(f"groups of {high} rows; at least 1 is needed")
    batch, heads, rows, columns = logits.shape
    tiles = tiles_of(rows, high)
    if not launch.takes(backend, logits):
        largest = reduce == "largest"
        whole = logits.amax(-1, keepdim=True) if largest else logits.logsumexp(-1, keepdim=True)
        own = logits - whole if added is None else logits - whole + added[:, None]
        own = torch.nn.functional.pad(own, (0, 0, 0, -rows % high), value=-torch.inf)
        parts = own.unflatten(2, (-1, high))
        return parts.amax(3) if largest else parts.logsumexp(3)
    out = torch.empty(batch, heads, tiles, columns, dtype=torch.float32, device=logits.device)
    logits, lines = logits.contiguous(), padded(high)
    from . import scores_kernels

    kernel: Any = scores_kernels.join_rows
    with on_device(logits):
        kernel[(tiles, batch * heads)](
            logits, out if added is None else added, out, rows, columns, tiles,
            HIGH=high, PADDED=lines, STEP=max(16, min(padded(columns), 8192 // lines)),
            SUMS=reduce == "log-sum-exp", ADDED=added is not None, num_warps=8,
        )  # fmt: skip
    return out


def heaviest_tiles(
    weights: torch.Tensor,
    mass: float,
    forced: torch.Tensor | None = None,
    *,
    least: int = 0,
    most: int | None = None,
    width: int | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the fewest heaviest tiles that hold `mass` of its weight.

    Args:
        weights: `[B, H, Q, K]` float32, their natural logarithms.
        mass: 0 to 1; 1 is all tiles.
        forced: `[Q, K]` bool, tiles that are kept before all others; their weight counts.
        least, most: how many tiles are kept at the least and, None is K, at the most, if no more
            are forced.
        width: of the lists, see `lists.top_tiles`.

    Returns:
        indices and counts, see `lists.top_tiles`. What is no number comes first and weighs nothing;
        a row in which nothing weighs keeps all.

    Raises:
        ValueError: numbers out of range, a backend that cannot.
    """
    columns = weights.shape[3]
    most = columns if most is None else most
    if not 0 <= least <= most <= columns:
        raise ValueError(f"least {least}, most {most}; 0 <= least <= most <= {columns} is needed")
    if not 0 <= mass <= 1:
        raise ValueError(f"mass {mass}; it must be 0 to 1")
    width = listed_width(width, forced, most, columns)
    if launch.takes(backend, weights, columns=columns):
        return launch.choose_scored(
            weights, forced, width, most, least, (mass, math.log2(math.e), 0.0)
        )
    return listed(by_mass(weights * math.log2(math.e), mass, forced, least, most), forced, width)
