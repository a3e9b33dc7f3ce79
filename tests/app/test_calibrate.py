"""`kinora calibrate`: from a model to a file that `paro` runs with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kinora.accel.calibration import Calibration
from kinora.accel.grid import TokenGrid
from kinora.app.calibrate import told
from kinora.app.cli import main
from kinora.kernels.plan import Tile
from kinora.pipelines.calibrate import Calibrated

SMALL = ("--size", "128x128", "--frames", "5", "--steps", "2")


def test_it_learns_and_paro_runs_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "tiny.npz"
    assert main(["calibrate", "kinora-tiny", *SMALL, "--keep", "0.4", "-o", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == str(path) and "step 1/2" in said.err
    assert "masks keep" in said.out and "lower is better" in said.out
    found = Calibration.read(path)
    assert found.tile == Tile(128, 64) and "of the tiles (128x64) and" in said.out
    assert found.model == "kinora-tiny" and found.packed.shape[1:3] == (10, 4)
    assert 0.39 < found.density() < 0.55
    recipe = ("--set", "attention.method=paro", "--set", f"attention.calibration={path}")
    video = tmp_path / "a.mp4"
    always = ("--set", "when=always", "--set", "attention.from_step=0")
    given = ("generate", "a red circle", *SMALL, *recipe, *always, "--json")
    assert main([*given, "-o", str(video)]) == 0
    receipt = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"][0]["receipt"]
    density = receipt["attention"]["density"]
    assert density == pytest.approx(found.density(), abs=0.02)
    assert main(["plan", "--size", "256x256", *recipe]) == 2
    assert "calibrate for this model and size" in capsys.readouterr().err


def calibration(orders: list[int], incoherence: list[list[float]]) -> Calibrated:
    """Of one layer, a head for each order."""
    heads = len(orders)
    it = Calibration(
        "any", TokenGrid(1, 8, 8), 0, False, 0.5, torch.tensor([orders]),
        torch.full((4, 1, heads, 1, 1), 128, dtype=torch.uint8), torch.tensor([incoherence]), 0.9,
        Tile(64, 64),
    )  # fmt: skip
    return Calibrated(Path("a.npz"), it)


def test_incoherence_is_told_by_order_with_what_lower_means():
    found = told(calibration([3, 0, 3], [[8.0, 4.0], [3.0, 3.0], [6.0, 2.0]]))
    at = next(i for i, line in enumerate(found) if line.startswith("incoherence"))
    assert "lower is better" in found[at]
    assert found[at + 1 : at + 3] == [
        "  HFW, 2 heads: 7.0 -> 3.0",
        "  FHW, 1 head: 3.0, the model's own order",
    ]
    assert not any("rises" in line for line in found)
    assert "  where it rises, masks keep more of the attention in that order" in told(
        calibration([1], [[2.0, 5.0]])
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("kinora-tiny", "--keep", "2"), "keep must be above 0 and at most 1, not 2"),
        (("kinora-tiny", "--tile", "128x46"), "not '128x46' (did you mean 128x64?)"),
        (("kinora-tiny", "--method", "sada"), "--method is 'sada'; paro is the one"),
        (("kinora-tinny",), "kinora-tiny"),
        (("sdxl",), "its layers see different tokens, which paro does not serve yet; choose"),
        (("kinora-tiny", "-o", "/nowhere/a.npz"), "there is no folder /nowhere: make it first"),
        (("kinora-tiny", "-o", "{folder}/there"), "is there already: name another file"),
    ],
)
def test_bad_input(
    given: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "there").touch()
    assert main(["calibrate", *(it.format(folder=tmp_path) for it in given)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert [it.name for it in tmp_path.iterdir()] == ["there"]
