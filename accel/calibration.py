"""What PAROAttention learns of a model beforehand: an order of axes and masks for each head."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from ..kernels.plan import Tile, tile_lengths, tiles_of
from .errors import AccelerationError
from .grid import TokenGrid
from .order import AXES, axes
from .site import Site
from .tiles import TileName, tile_of

STARTS = (0.0, 0.125, 0.25, 0.5)
"""Shares of the steps from which on a mask serves; the last one serves the whole second half."""
_FORMAT = 5
_CHUNK = 256
"""Queries whose attention is written down at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Orders and masks of one model at one size.

    Attributes:
        weights: fingerprint of those that were seen; empty where that is not known.
        orders: `[layers, heads]` int64, places in `AXES`; of several denoisers, whose turns these
            are, the layers of one behind those of the other.
        tile: into which tokens are cut, in the order of the head.
        packed: `[len(STARTS), layers, heads, Q, ceil(K / 8)]` uint8, masks of Q tiles of queries
            and K of keys, by bits: Wan 14B has gigabytes of them at 720p otherwise.
        incoherence: `[layers, heads, 2]` float32, largest over mean of the attention in a tile,
            mean over tiles, in raster order and in the order of the head.
        recall: share of the attention that falls on kept tiles, mean over all.
    """

    model: str
    grid: TokenGrid
    text: int
    text_first: bool
    keep: float
    orders: torch.Tensor
    packed: torch.Tensor
    incoherence: torch.Tensor
    recall: float
    tile: Tile
    weights: str = ""
    experts: int = 1

    @property
    def layers(self) -> int:
        """Of each denoiser."""
        return len(self.orders) // self.experts

    def mask(self, at: int, layer: int) -> torch.Tensor:
        """`[heads, Q, K]` bool of a window of the steps and a layer of all."""
        return unpacked(self.packed[at, layer], self._columns)

    @property
    def _columns(self) -> int:
        return tiles_of(self.grid.tokens + self.text, self.tile.key)

    def density(self) -> float:
        """Share of the tiles that masks keep."""
        kept = sum(int(_BITS[it.numpy()].sum()) for it in self.packed.flatten(0, 2))
        return kept / (self.packed.shape[:4].numel() * self._columns)

    def longest(self) -> float:
        """Share of the tiles that the longest row of all masks keeps."""
        rows = (_BITS[it.numpy()].sum(-1).max() for it in self.packed.flatten(0, 2))
        return int(max(rows)) / self._columns

    def to_bytes(self) -> bytes:
        """As a file of numpy arrays, masks by bits."""
        header = {
            "format": _FORMAT, "model": self.model, "weights": self.weights, "text": self.text,
            "text_first": self.text_first, "keep": self.keep, "recall": self.recall,
            "experts": self.experts, "tile": str(self.tile),
            "grid": [self.grid.frames, self.grid.height, self.grid.width],
            "shape": list(self.packed.shape), "starts": list(STARTS),
        }  # fmt: skip
        file = io.BytesIO()
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            orders=self.orders.numpy().astype(np.uint8),
            masks=self.packed.numpy().ravel(),
            incoherence=self.incoherence.numpy(),
        )
        return file.getvalue()

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """What `to_bytes` wrote.

        Raises:
            AccelerationError: no such file, or another one; one line with the remedy.
        """
        remedy = "make one with `kinora calibrate`"
        try:
            if path.exists() and not path.is_file():  # what never ends would be waited for
                raise ValueError("no file")
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(bytes(arrays["header"]))
                if header["format"] != _FORMAT or tuple(header["starts"]) != STARTS:
                    raise AccelerationError(
                        f"{path} was written by another version of Kinora: {remedy}"
                    )
                grid, text = TokenGrid(*header["grid"]), header["text"]
                if header["tile"] not in get_args(TileName):
                    raise ValueError("no tile that calibrations are made with")
                tile, orders = tile_of(header["tile"]), arrays["orders"]
                incoherence = arrays["incoherence"]
                shape = _shape(grid, text, tile, orders, incoherence)
                experts, packed = int(header["experts"]), arrays["masks"]
                if list(shape) != header["shape"] or packed.size != math.prod(shape):
                    raise ValueError("masks are of another size")
                if packed.dtype != np.uint8 or experts < 1 or len(orders) % experts:
                    raise ValueError("no bits, or not as many layers in each denoiser")
                return cls(
                    model=str(header["model"]),
                    grid=grid,
                    text=text,
                    text_first=bool(header["text_first"]),
                    keep=float(header["keep"]),
                    orders=torch.from_numpy(orders.astype(np.int64)),
                    packed=torch.from_numpy(packed.reshape(shape)),
                    incoherence=torch.from_numpy(incoherence.astype(np.float32)),
                    recall=float(header["recall"]),
                    tile=tile,
                    weights=str(header["weights"]),
                    experts=experts,
                )
        except AccelerationError:
            raise
        except FileNotFoundError:
            raise AccelerationError(f"there is no calibration {path}: {remedy}") from None
        except Exception:  # readers of damaged archives raise kinds of their own
            raise AccelerationError(f"{path} is no calibration file: {remedy}") from None


def _shape(
    grid: TokenGrid, text: int, tile: Tile, orders: np.ndarray, incoherence: np.ndarray
) -> tuple[int, ...]:
    """That of the masks beside these. Raises ValueError where they do not go together."""
    layers, heads = orders.shape
    if text < 0 or orders.max() >= len(AXES) or incoherence.shape != (layers, heads, 2):
        raise ValueError("no orders of axes, or not for all heads")
    rows, columns = _counts(grid.tokens + text, tile)
    return len(STARTS), layers, heads, rows, -(-columns // 8)


def _counts(tokens: int, tile: Tile) -> tuple[int, int]:
    """Tiles of queries, and of keys."""
    return tiles_of(tokens, tile.query), tiles_of(tokens, tile.key)


_BITS = np.array([it.bit_count() for it in range(256)])
"""How many are set in a byte."""


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[…, Q, K]` by bits, `[…, Q, ceil(K / 8)]` uint8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The mask of so many tiles of keys that `packed` made this of."""
    found = np.unpackbits(bits.numpy(), axis=-1, count=columns)
    return torch.from_numpy(found).to(torch.bool)


def number_of(site: Site) -> int:
    """Of its layer among those of all denoisers."""
    return site.expert * site.layers + site.layer


def _nearest(at: int, windows: Sequence[int]) -> int:
    return min(windows, key=lambda it: abs(it - at))


def window(site: Site) -> int:
    """Which of the masks serves a step."""
    share = (site.step + 1e-6) / site.steps
    return sum(start <= share for start in STARTS) - 1


def observed_steps(steps: int) -> tuple[int, ...]:
    """The step in the middle of each window of a run of `steps`; windows without a step borrow."""
    ends = (*STARTS[1:], 1.0)
    return tuple(
        min(int((start + end) / 2 * steps), steps - 1)
        for start, end in zip(STARTS, ends, strict=True)
    )


def places(site: Site, order: str) -> torch.Tensor:
    """The tokens of a site along an order of axes, text beside them, `[L]` int64."""
    return _places(order, site.grid, site.text, site.text_first)


@lru_cache(maxsize=64)
def _places(order: str, grid: TokenGrid, text: int, text_first: bool) -> torch.Tensor:
    with torch.inference_mode(False):
        return axes(grid, order).beside_text(text, first=text_first).places


@lru_cache(maxsize=16)
def always(tokens: int, text: int, text_first: bool, tile: Tile) -> torch.Tensor:
    """Tiles that are kept whatever was seen: the diagonal, text, the ragged last ones, `[Q, K]`.

    Text stays at its end of the sequence in every order of axes, so this is the same for all.
    """
    token = torch.arange(tokens)
    row, column = token // tile.query, token // tile.key
    kept = torch.zeros(_counts(tokens, tile), dtype=torch.bool)
    kept[row, column] = True
    is_text = token < text if text_first else token >= tokens - text
    kept[row[is_text]] = True
    kept[:, column[is_text]] = True
    if tokens % tile.query:
        kept[-1] = True
    if tokens % tile.key:
        kept[:, -1] = True
    return kept


@dataclass(slots=True, eq=False)
class Tally:
    """Collects what `Calibration` needs from the calls of one dense run, in the order of its steps.

    By the number of a layer: of several denoisers those of one follow the other's.

    Args:
        keep: share of the tiles that a mask keeps.
        tile: into which tokens are cut; 64 x 64 in the paper.
        balance: how the order is chosen: 1 by the mass that masks keep, 0 by incoherence.
        sample: share of the queries that are looked at.
    """

    keep: float
    tile: Tile = field(default_factory=Tile)
    balance: float = 0.5
    sample: float = 0.25
    orders: dict[int, torch.Tensor] = field(default_factory=dict[int, "torch.Tensor"])
    incoherence: dict[int, torch.Tensor] = field(default_factory=dict[int, "torch.Tensor"])
    masks: dict[tuple[int, int], torch.Tensor] = field(
        default_factory=dict[tuple[int, int], "torch.Tensor"]
    )
    recalls: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    _mass: dict[tuple[int, int], torch.Tensor] = field(
        default_factory=dict[tuple[int, int], "torch.Tensor"]
    )
    _step: int = -1

    def observe(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> None:
        """Look at one call, `[B, H, L, D]`; the first one of a layer chooses the orders."""
        layer = number_of(site)
        if layer not in self.orders:
            self._choose(q, k, site)
        if self._step != site.step:  # of no other step is it needed, and it is large
            self._step = site.step
            self._mass.clear()
        every = torch.stack([places(site, AXES[i]) for i in self.orders[layer].tolist()])
        queries, forced = self._queries(site), self._always(site)
        mass = tile_mass(q, k, every.to(q.device), queries, self.tile)[0].mean(0).cpu()
        for at, step in enumerate(observed_steps(site.steps)):
            if step != site.step:
                continue
            key = (at, layer)
            # Guidance branches and batch items share a mask.
            mass_here = self._mass[key] = self._mass.get(key, 0) + mass
            kept = best(mass_here, self.keep, forced)
            self.masks[key] = packed(kept)
            self.recalls[key] = float((mass_here * kept).sum() / mass_here.sum())

    def _queries(self, site: Site) -> torch.Tensor:
        """Those that are looked at, the same in each call."""
        count = max(1, round(self.sample * site.tokens))
        return torch.randperm(site.tokens, generator=torch.Generator().manual_seed(0))[:count]

    def _always(self, site: Site) -> torch.Tensor:
        return always(site.tokens, site.text, site.text_first, self.tile)

    def _choose(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> None:
        queries, forced = self._queries(site), self._always(site)
        lost: list[torch.Tensor] = []
        rough: list[torch.Tensor] = []
        for order in AXES:
            every = places(site, order).to(q.device).expand(q.shape[1], -1)
            each, peak = (it.cpu() for it in tile_mass(q, k, every, queries, self.tile))
            mass = each.mean(0)
            kept = best(mass, self.keep, forced)
            lost.append(1 - (mass * kept).sum((1, 2)) / mass.sum((1, 2)))
            seen = mass.sum(2) > 0  # a short tile of queries may have none that is looked at
            rows = (peak / each.clamp(min=1e-30)).mean((0, 3))
            rough.append((rows * seen).sum(1) / seen.sum(1))
        losses, roughness = torch.stack(lost), torch.stack(rough)
        # Of each head, both as shares of their sum over the orders: what is small is good.
        cost = self.balance * losses / losses.sum(0).clamp(min=1e-9)
        cost = cost + (1 - self.balance) * roughness / roughness.sum(0)
        chosen = cost.argmin(0)
        self.orders[number_of(site)] = chosen
        heads = torch.arange(len(chosen))
        self.incoherence[number_of(site)] = torch.stack(
            [roughness[0], roughness[chosen, heads]], -1
        )

    def finish(self, model: str, site: Site, *, weights: str = "") -> Calibration:
        """The calibration, once all layers have been seen at all observed steps.

        `weights` is the fingerprint of the model's, if there is one. A denoiser that has no turn in
        a window of the steps borrows the masks of the nearest one in which it has.

        Raises:
            AccelerationError: not all were, as where a layer has run dense for a reason of its own.
        """
        count, windows = site.layers, range(len(STARTS))
        experts = range(1 + max(self.orders, default=0) // count)
        turns = [sorted({at for at, i in self.masks if i // count == it}) for it in experts]
        needed = {
            (at, it * count + layer) for it in experts for at in turns[it] for layer in range(count)
        }
        if needed - self.masks.keys() or not all(turns) or {at for at, _ in needed} != {*windows}:
            raise AccelerationError(
                f"of {site.layers} layers not every one was seen in each window of the steps, so "
                f"{model} cannot be calibrated like this: try the model's own size and steps"
            )
        layers = range(len(experts) * count)
        masks = [
            torch.stack([self.masks[_nearest(at, turns[i // count]), i] for i in layers])
            for at in windows
        ]
        return Calibration(
            model=model,
            grid=site.grid,
            text=site.text,
            text_first=site.text_first,
            keep=self.keep,
            orders=torch.stack([self.orders[layer] for layer in layers]),
            packed=torch.stack(masks),
            experts=len(experts),
            incoherence=torch.stack([self.incoherence[layer] for layer in layers]).float(),
            recall=sum(self.recalls.values()) / len(self.recalls),
            tile=self.tile,
            weights=weights,
        )


def best(mass: torch.Tensor, keep: float, forced: torch.Tensor) -> torch.Tensor:
    """Of each head `[H, Q, K]` the share `keep` of the tiles, of the largest mass; forced first."""
    count = max(1, round(keep * forced.numel()))
    flat = mass.masked_fill(forced, torch.inf).flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen.scatter_(1, flat.topk(count, 1).indices, True)
    return chosen.view_as(mass) | forced


def tile_mass(
    q: torch.Tensor, k: torch.Tensor, order: torch.Tensor, queries: torch.Tensor, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on each tile of keys by the queries of a tile, `[B, H, Q, K]`: mean and largest.

    Args:
        q, k: `[B, H, L, D]`.
        order: `[H, L]`, the tokens of each head in its order.
        queries: the tokens that are looked at; a tile of which none is has mass 0.

    Means are over the pairs of tokens, `largest` is of one pair.
    """
    batch, heads, tokens, dim = q.shape
    rows, columns = _counts(tokens, tile)
    row_of = order.argsort(-1) // tile.query
    mass = torch.zeros(batch, heads, rows, columns, device=q.device)
    peak = torch.zeros_like(mass)
    seen = torch.zeros(heads, rows, device=q.device)
    k = k.gather(2, order[None, ..., None].expand_as(k)).float()
    padding = (0, columns * tile.key - tokens)
    for part in queries.to(q.device).split(_CHUNK):
        weights = (q[:, :, part].float() @ k.mT * dim**-0.5).softmax(-1)
        tiles = torch.nn.functional.pad(weights, padding).unflatten(-1, (-1, tile.key))
        row = row_of[:, part]
        at = row[..., None].expand(batch, heads, len(part), columns)
        mass.scatter_add_(2, at, tiles.sum(-1))
        peak.scatter_reduce_(2, at, tiles.amax(-1), "amax")
        seen.scatter_add_(1, row, torch.ones_like(row, dtype=torch.float32))
    pairs = seen.clamp(min=1)[..., None] * tile_lengths(tokens, tile.key, q.device)
    return mass / pairs, peak
