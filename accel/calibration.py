"""What PAROAttention learns of a model beforehand: an order of axes and masks for each head."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..kernels.plan import tiles_of
from .errors import AccelerationError
from .grid import TokenGrid
from .order import AXES, axes
from .site import Site

TILE = 64
"""Queries and keys of a tile, as in the paper."""
STARTS = (0.0, 0.125, 0.25, 0.5)
"""Shares of the steps from which on a mask serves; the last one serves the whole second half."""
_FORMAT = 3
_CHUNK = 256
"""Queries whose attention is written down at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Orders and masks of one model at one size.

    Attributes:
        weights: fingerprint of those that were seen; empty where that is not known.
        orders: `[layers, heads]` int64, places in `AXES`; of several denoisers, whose turns these
            are, the layers of one behind those of the other.
        packed: `[len(STARTS), layers, heads, T, ceil(T / 8)]` uint8, masks of T tiles of `TILE`
            tokens in the order of the head, by bits: Wan 14B has 9 GB of them at 720p otherwise.
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
    weights: str = ""
    experts: int = 1

    @property
    def layers(self) -> int:
        """Of each denoiser."""
        return len(self.orders) // self.experts

    def mask(self, at: int, layer: int) -> torch.Tensor:
        """`[heads, T, T]` bool of a window of the steps and a layer of all."""
        return unpacked(self.packed[at, layer])

    def density(self) -> float:
        """Share of the tiles that masks keep."""
        tiles = self.packed.shape[-2]
        kept = sum(int(_BITS[it.numpy()].sum()) for it in self.packed.flatten(0, 2))
        return kept / (self.packed.shape[:3].numel() * tiles**2)

    def to_bytes(self) -> bytes:
        """As a file of numpy arrays, masks by bits."""
        header = {
            "format": _FORMAT, "model": self.model, "weights": self.weights, "text": self.text,
            "text_first": self.text_first, "keep": self.keep, "recall": self.recall,
            "experts": self.experts,
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
        if path.exists() and not path.is_file():  # what never ends would be waited for
            raise AccelerationError(f"{path} is no calibration file: {remedy}")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(bytes(arrays["header"]))
                if header["format"] != _FORMAT or tuple(header["starts"]) != STARTS:
                    raise AccelerationError(
                        f"{path} was written by another version of Kinora: {remedy}"
                    )
                grid, text = TokenGrid(*header["grid"]), header["text"]
                orders, incoherence = arrays["orders"], arrays["incoherence"]
                shape = _shape(grid, text, orders, incoherence)
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
    grid: TokenGrid, text: int, orders: np.ndarray, incoherence: np.ndarray
) -> tuple[int, ...]:
    """That of the masks beside these. Raises ValueError where they do not go together."""
    layers, heads = orders.shape
    if text < 0 or orders.max() >= len(AXES) or incoherence.shape != (layers, heads, 2):
        raise ValueError("no orders of axes, or not for all heads")
    tiles = tiles_of(grid.tokens + text, TILE)
    return len(STARTS), layers, heads, tiles, -(-tiles // 8)


_BITS = np.array([it.bit_count() for it in range(256)])
"""How many are set in a byte."""


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[…, T, T]` by bits, `[…, T, ceil(T / 8)]` uint8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def unpacked(bits: torch.Tensor) -> torch.Tensor:
    """The mask that `packed` made this of."""
    found = np.unpackbits(bits.numpy(), axis=-1, count=bits.shape[-2])
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
def always(tokens: int, text: int, text_first: bool) -> torch.Tensor:
    """Tiles that are kept whatever was seen: the diagonal, text, the ragged last ones, `[T, T]`.

    Text stays at its end of the sequence in every order of axes, so this is the same for all.
    """
    count = tiles_of(tokens, TILE)
    kept = torch.eye(count, dtype=torch.bool)
    token = torch.arange(tokens)
    is_text = token < text if text_first else token >= tokens - text
    special = (token[is_text] // TILE).unique()
    if tokens % TILE:
        special = torch.cat([special, torch.tensor([count - 1])])
    kept[special] = True
    kept[:, special] = True
    return kept


@dataclass(slots=True, eq=False)
class Tally:
    """Collects what `Calibration` needs from the calls of one dense run, in the order of its steps.

    By the number of a layer: of several denoisers those of one follow the other's.

    Args:
        keep: share of the tiles that a mask keeps.
        balance: how the order is chosen: 1 by the mass that masks keep, 0 by incoherence.
        sample: share of the queries that are looked at.
    """

    keep: float
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
        mass = tile_mass(q, k, every.to(q.device), self._queries(site))[0].cpu()
        for at, step in enumerate(observed_steps(site.steps)):
            if step != site.step:
                continue
            key = (at, layer)
            # Guidance branches and batch items share a mask.
            mass_here = self._mass[key] = self._mass.get(key, 0) + mass
            kept = best(mass_here, self.keep, always(site.tokens, site.text, site.text_first))
            self.masks[key] = packed(kept)
            self.recalls[key] = float((mass_here * kept).sum() / mass_here.sum())

    def _queries(self, site: Site) -> torch.Tensor:
        """Those that are looked at, the same in each call."""
        count = max(1, round(self.sample * site.tokens))
        return torch.randperm(site.tokens, generator=torch.Generator().manual_seed(0))[:count]

    def _choose(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> None:
        kept_always = always(site.tokens, site.text, site.text_first)
        lost: list[torch.Tensor] = []
        rough: list[torch.Tensor] = []
        for order in AXES:
            every = places(site, order).to(q.device).expand(q.shape[1], -1)
            mass, peak = (it.cpu() for it in tile_mass(q, k, every, self._queries(site)))
            kept = best(mass, self.keep, kept_always)
            lost.append(1 - (mass * kept).sum((1, 2)) / mass.sum((1, 2)))
            rough.append((peak / mass.clamp(min=1e-30)).mean((1, 2)))
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
            weights=weights,
        )


def best(mass: torch.Tensor, keep: float, forced: torch.Tensor) -> torch.Tensor:
    """Of each head `[H, T, T]` the share `keep` of the tiles, of the largest mass; forced first."""
    count = max(1, round(keep * forced.numel()))
    flat = mass.masked_fill(forced, torch.inf).flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen.scatter_(1, flat.topk(count, 1).indices, True)
    return chosen.view_as(mass) | forced


def tile_mass(
    q: torch.Tensor, k: torch.Tensor, order: torch.Tensor, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on each tile of keys by the queries of a tile, `[H, T, T]`: mean and largest.

    Args:
        q, k: `[B, H, L, D]`.
        order: `[H, L]`, the tokens of each head in its order.
        queries: the tokens that are looked at; a tile of which none is has mass 0.

    Means are over the pairs of tokens, `largest` is of one pair; the batch is summed.
    """
    batch, heads, tokens, dim = q.shape
    count = tiles_of(tokens, TILE)
    place = order.argsort(-1)
    tile_of = place // TILE
    mass = torch.zeros(heads, count, count, device=q.device)
    peak = torch.zeros_like(mass)
    seen = torch.zeros(heads, count, device=q.device)
    k = k.gather(2, order[None, ..., None].expand_as(k)).float()
    lengths = torch.full((count,), float(TILE), device=q.device)
    lengths[-1] = tokens - (count - 1) * TILE
    for part in queries.to(q.device).split(_CHUNK):
        weights = (q[:, :, part].float() @ k.mT * dim**-0.5).softmax(-1)
        tiles = torch.nn.functional.pad(weights, (0, count * TILE - tokens)).unflatten(
            -1, (-1, TILE)
        )
        row = tile_of[:, part]
        at = row[..., None].expand(heads, len(part), count)
        mass.scatter_add_(1, at, tiles.sum(-1).sum(0))
        peak.scatter_reduce_(1, at, tiles.amax(-1).amax(0), "amax")
        seen.scatter_add_(1, row, torch.ones_like(row, dtype=torch.float32))
    pairs = batch * seen.clamp(min=1)[..., None] * lengths
    return mass / pairs, peak
