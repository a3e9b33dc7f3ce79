"""Files of calibrations, and what their plans take: what is no such file is told in one line."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinora.accel.calibration import Calibration, Tally
from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Paro, paro
from kinora.accel.order import AXES
from kinora.accel.policies.pattern import Pattern
from kinora.accel.site import Site
from kinora.accel.wrappers import Reuse
from kinora.kernels.plan import Tile

from .calibrating import SITE, calibrated, saved, tensors


class Forgetful(Paro):
    """Keeps no plan."""

    def kept_plans(self, batch: int) -> int:
        return 0 * batch


@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize("grid", [TokenGrid(4, 8, 8), TokenGrid(4, 10, 11)])
def test_the_memory_of_its_plans_is_predicted(grid: TokenGrid, text: int, tmp_path: Path):
    """All are kept, with an order for each head; the last row, if ragged, keeps everything."""
    layers = (transformer_layer(3, 64, 256, text=text),) * 2
    site = Site(grid, 0, 2, 4, 8, text=text)
    method = Paro(calibration=saved(calibrated(site, 0.4), tmp_path))
    forgetful = Forgetful(calibration=method.calibration)
    run: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "steps": 8, "always": True}
    kept = Reuse(method=method, every=0)  # of what is the same for all branches
    three = (method, forgetful, kept)
    more = [predict(it, Shape(layers), grid, **run).workspace for it in three]
    assert more[2] == more[0]
    q, k, _ = tensors(site)
    for step, layer in itertools.product(range(8), range(2)):
        method.plan(q, k, dataclasses.replace(site, layer=layer, step=step))
    held = 0
    for plan in paro._plans.values():  # pyright: ignore[reportPrivateUsage]
        assert plan.order is not None
        held += 4 * (plan.indices.numel() + plan.counts.numel()) + 8 * plan.order.numel()
    assert 0.7 * (more[0] - more[1]) < held <= more[0] - more[1]


# --- bad input ---


def test_a_layer_that_was_not_seen():
    tally = Tally(keep=0.5)
    q, k, _ = tensors(SITE)
    tally.observe(q, k, SITE)
    with pytest.raises(AccelerationError, match="of 1 layers not every one was seen"):
        tally.finish("tiny", SITE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grid": TokenGrid(4, 6, 8)}, "tokens 4×6×7 and 0 of text in 1 layers; here are 4×6×8"),
        ({"text": 5}, "here are 4×6×7 and 5 of text"),
        ({"layers": 2}, "in 2 layers: calibrate for this model and size"),
    ],
)
def test_a_calibration_of_something_else(changes: dict[str, object], told: str, tmp_path: Path):
    method = Paro(calibration=saved(calibrated(SITE, 0.5), tmp_path))
    with pytest.raises(AccelerationError, match=told):
        method.predict(dataclasses.replace(SITE, **changes))  # pyright: ignore[reportArgumentType]


def test_other_heads(tmp_path: Path):
    method = Paro(calibration=saved(calibrated(SITE, 0.5), tmp_path))
    q, k, _ = tensors(SITE, heads=2)
    with pytest.raises(AccelerationError, match="is of 3 heads, this model has 2"):
        method.plan(q, k, SITE)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_files_that_are_none(content: bytes, tmp_path: Path):
    path = tmp_path / "paro.npz"
    path.write_bytes(content)
    with pytest.raises(AccelerationError, match="is no calibration file: make one with"):
        Paro(calibration=str(path)).predict(SITE)
    whole = calibrated(SITE, 0.5).to_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AccelerationError, match="is no calibration file"):
        Calibration.read(path)


def test_a_damaged_file_is_told_wherever_the_damage_is(tmp_path: Path):
    whole, path = calibrated(SITE, 0.5).to_bytes(), tmp_path / "paro.npz"
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            Calibration.read(path)  # where nothing that is read was hit
        except AccelerationError as error:
            assert "make one with `kinora calibrate`" in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": TokenGrid(4, 6, 20)},  # of more tiles than the masks have
        {"text": -1},
        {"text": 200},
        {"orders": torch.full((1, 3), len(AXES))},
        {"orders": torch.zeros(1, 2, dtype=torch.int64)},
        {"orders": torch.zeros(3, dtype=torch.int64)},
        {"packed": torch.ones(1, 1, 3, 3, 1, dtype=torch.uint8)},
        {"experts": 2},
        {"tile": Tile(128, 64)},
        *({"tile": Tile(*it)} for it in ((65, 64), (64, 10**30), (1, 1), (64, 128))),
        {"incoherence": torch.ones(1, 3)},
    ],
)
def test_contents_that_contradict_each_other_are_no_calibration(
    changes: dict[str, Any], tmp_path: Path
):
    made = dataclasses.replace(calibrated(SITE, 0.5), **changes)
    with pytest.raises(AccelerationError, match="is no calibration file: make one with"):
        Calibration.read(Path(saved(made, tmp_path)))


def test_a_file_that_claims_to_be_huge_takes_no_memory(tmp_path: Path):
    made = calibrated(SITE, 0.5)
    huge = dataclasses.replace(made, grid=TokenGrid(6400, 1000, 1000)).to_bytes()
    path = tmp_path / "paro.npz"
    with np.load(io.BytesIO(huge)) as found:
        arrays = dict(found)
    header = json.loads(bytes(arrays["header"]))
    header["shape"][-2:] = [10**8, 10**8]
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(AccelerationError, match="is no calibration file: make one with"):
        Calibration.read(path)


def test_what_never_ends_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(AccelerationError, match="is no calibration file: make one"):
            Calibration.read(path)
    refused = Pattern(mask=str(tmp_path / "pipe")).refuses(16)
    assert refused is not None and "cannot be read: no file" in refused


@pytest.mark.parametrize(
    "tile", ["64x65", "64", "", "64x64x64", "0x0", [64, 64], 64, None, {"query": 64}]
)
def test_a_file_whose_tile_is_none(tile: object, tmp_path: Path):
    path = Path(saved(calibrated(SITE, 0.5), tmp_path))
    with np.load(path) as found:
        arrays = dict(found)
    header = json.loads(bytes(arrays["header"]))
    arrays["header"] = np.frombuffer(json.dumps({**header, "tile": tile}).encode(), np.uint8)
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(AccelerationError, match="is no calibration file: make one with"):
        Calibration.read(path)


def test_a_file_of_another_version(tmp_path: Path):
    path = Path(saved(calibrated(SITE, 0.5), tmp_path))
    with np.load(path) as found:
        arrays = dict(found)
    header = json.loads(bytes(arrays["header"]))
    arrays["header"] = np.frombuffer(json.dumps({**header, "format": 4}).encode(), np.uint8)
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(AccelerationError, match="was written by another version of Kinora: make"):
        Calibration.read(path)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_what_is_no_path_is_no_calibration(name: str):
    with pytest.raises(AccelerationError, match="is no calibration file: make one with"):
        Paro(calibration=name).predict(SITE)


def test_no_file():
    with pytest.raises(AccelerationError, match=r"paro needs attention\.calibration"):
        Paro().predict(SITE)
    with pytest.raises(AccelerationError, match="there is no calibration /nowhere"):
        Paro(calibration="/nowhere").predict(SITE)
