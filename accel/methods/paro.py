"""`paro`: tiles chosen beforehand, in the order of axes that suits each head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr

from ...kernels.plan import BlockPlan, Tail, Tile, pairs_in
from ..calibration import AXES, Calibration, Tally, number_of, observed_steps, places, window
from ..errors import AccelerationError
from ..method import AttentionMethod
from ..options import option
from ..site import Site


class Paro(AttentionMethod):
    """Each head puts the clip's tokens in the one of six axis orders that makes its tiles densest.

    Orders and kept tiles are found beforehand in one dense run, by `kinora calibrate`, and stay the
    same for all prompts; nothing is decided while a video is made. Masks change at an eighth, a
    quarter and half of the steps; text, the diagonal and a ragged last tile are always kept.

    Source: PAROAttention (arXiv 2506.16054).
    Differs from the paper: its tiles are 64 x 64, here they are those of the calibration, 128 x 64
    unless told, with which GPUs are faster; orders are compared by the attention that the kept
    tiles hold, not by how many tiles are nearly empty, whose threshold is not given, and by
    incoherence; both are shares that are better when small, where the printed rule mixes
    directions. Tiles that are left out may be stood for by their means (`tail`).
    """

    name: ClassVar[str] = "paro"
    paper: ClassVar[str] = "arXiv 2506.16054"
    licence: ClassVar[str] = (
        "the authors' kernels are Apache-2.0; their calibration is not published"
    )
    use_when: ClassVar[str] = (
        "many videos are made by one model at one size: all is decided beforehand, by `kinora "
        "calibrate`, and choosing costs nothing."
    )

    calibration: str = option(
        "", "File made by `kinora calibrate` for this model and size", path=True
    )
    tail: Literal["none", "complement"] = option(
        "none", "What stands for the tiles that are left out: nothing, or their means"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        found = self._fitting(site)
        if found.orders.shape[1] != q.shape[1]:
            raise AccelerationError(
                f"{self.calibration} is of {found.orders.shape[1]} heads, this model has "
                f"{q.shape[1]}: calibrate it"
            )
        path, stamp, at, alike = self._at(site)
        return _plan(path, stamp, at, self.tail, alike, q.device)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        self._fitting(site)
        return _density(*self._at(site))

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        if not self.calibration:
            return Tile(), self.tail
        return _read(self.calibration, _stamp(self.calibration)).tile, self.tail

    def orders(self, heads: int) -> int:
        """See `AttentionMethod`."""
        return heads

    def longest(self, computed: float, text: int) -> float:
        """See `AttentionMethod`; of all that the calibration has."""
        del computed, text
        return _longest(self.calibration, _stamp(self.calibration))

    def kept_plans(self, batch: int) -> int:
        """See `AttentionMethod`; all items of a batch share one."""
        del batch
        return 1

    def refuses(self, weights: Callable[[], str]) -> str | None:
        """See `AttentionMethod`."""
        if not self.calibration:
            return None  # told with what to do, where a plan is made
        found = _read(self.calibration, _stamp(self.calibration))
        if not found.weights or found.weights == weights():
            return None
        return (
            f"{self.calibration} was calibrated with other weights, of {found.model}: make one for "
            f"this model with `kinora calibrate`"
        )

    def _at(self, site: Site) -> tuple[str, int, tuple[int, int], Site]:
        """All that a plan depends on: steps of a window share it."""
        alike = Site(
            site.grid, site.layer, site.layers, 0, 1, site.text, site.text_first, expert=site.expert
        )
        return self.calibration, _stamp(self.calibration), (window(site), number_of(site)), alike

    def _fitting(self, site: Site) -> Calibration:
        """The calibration. Raises AccelerationError where it is of something else."""
        if not self.calibration:
            raise AccelerationError(
                "paro needs attention.calibration, a file: make one with `kinora calibrate`"
            )
        found = _read(self.calibration, _stamp(self.calibration))
        given = f"{found.grid} and {found.text} of text in {found.layers} layers"
        wanted = f"{site.grid} and {site.text} of text in {site.layers} layers"
        if given != wanted:
            raise AccelerationError(
                f"{self.calibration} is of {found.model}, tokens {given}; here are {wanted}: "
                f"calibrate for this model and size, or choose another attention.method"
            )
        if site.expert >= found.experts:
            raise AccelerationError(
                f"{self.calibration} is of {found.model}, which has one denoiser; here are more: "
                f"calibrate for this model"
            )
        return found


class ParoObserver(AttentionMethod):
    """Runs dense and collects what `Paro` needs; see `kinora calibrate`."""

    name: ClassVar[str] = "paro-observer"

    _tally: Tally = PrivateAttr()
    _last: list[Site] = PrivateAttr(default_factory=list[Site])

    def __init__(self, tally: Tally, **options: Any) -> None:
        super().__init__(**options)
        self._tally = tally

    @property
    def last(self) -> Site | None:
        """Where it has looked last."""
        return self._last[-1] if self._last else None

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """Look, at the steps that matter."""
        if self.last is not None and (site.grid, site.text) != (self.last.grid, self.last.text):
            raise AccelerationError(
                f"paro cannot be calibrated for models whose layers see different tokens yet: "
                f"here {self.last.grid} and {self.last.text} of text, there {site.grid} and "
                f"{site.text}; choose another attention.method"
            )
        if site.step in observed_steps(site.steps):
            self._tally.observe(q.detach(), k.detach(), site)
            self._last[:] = [site]
        return None

    def predict(self, site: Site) -> float:
        """Below 1, so that it is asked."""
        del site
        return 0.5

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return self._tally.tile, "none"


def _stamp(path: str) -> int:
    """Changes when the file does."""
    try:
        return Path(path).stat().st_mtime_ns
    except (OSError, ValueError):  # no path at all, which reading tells
        return 0


@lru_cache(maxsize=4)
def _read(path: str, stamp: int) -> Calibration:
    del stamp
    with torch.inference_mode(False):
        return Calibration.read(Path(path))


_plans: OrderedDict[Any, BlockPlan] = OrderedDict()
"""Of all layers of a denoiser in a window of the steps, the last used at the end.

Those of large models take a hundred megabytes each.
"""


def _plan(
    path: str, stamp: int, at: tuple[int, int], tail: Tail, site: Site, device: torch.device
) -> BlockPlan:
    """All steps of a window use it, so that those of its layers must all be kept."""
    key = path, stamp, at, tail, site, device
    plan = _plans.pop(key, None) or _made(*key)
    _plans[key] = plan
    while len(_plans) > site.layers:
        _plans.popitem(last=False)
    return plan


def _made(
    path: str, stamp: int, at: tuple[int, int], tail: Tail, site: Site, device: torch.device
) -> BlockPlan:
    found = _read(path, stamp)
    with torch.inference_mode(False):
        orders = torch.stack([places(site, AXES[i]) for i in found.orders[at[1]].tolist()])
        return BlockPlan.from_mask(
            found.mask(*at)[None].to(device),
            tile=found.tile,
            queries=site.tokens,
            keys=site.tokens,
            tail=tail,
            order=orders[None].to(device),
        )


@lru_cache(maxsize=16)
def _longest(path: str, stamp: int) -> float:
    """The share of the tiles that the longest row of all masks keeps."""
    return _read(path, stamp).longest()


@lru_cache(maxsize=1024)
def _density(path: str, stamp: int, at: tuple[int, int], site: Site) -> float:
    """That of the plan, by the mask alone; asked at every call."""
    found, tokens = _read(path, stamp), site.tokens
    mask = found.mask(*at)[None]
    pairs = pairs_in(mask, tile=found.tile, queries=tokens, keys=tokens).sum(-1)
    return float((pairs.to(torch.float32) / tokens**2).mean())
