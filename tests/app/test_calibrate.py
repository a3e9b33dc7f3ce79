"""`kinora calibrate`: from a model to a file that `paro` runs with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinora.accel.calibration import Calibration
from kinora.app.cli import main

SMALL = ("--size", "128x128", "--frames", "5", "--steps", "2")


def test_it_learns_and_paro_runs_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "tiny.npz"
    assert main(["calibrate", "kinora-tiny", *SMALL, "--keep", "0.4", "-o", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == str(path) and "step 1/2" in told.err
    assert "masks keep" in told.out and "incoherence in a tile" in told.out
    found = Calibration.read(path)
    assert found.model == "kinora-tiny" and found.masks.shape[1:3] == (10, 4)
    assert 0.39 < float(found.masks.float().mean()) < 0.55
    recipe = ("--set", "attention.method=paro", "--set", f"attention.calibration={path}")
    video = tmp_path / "a.mp4"
    given = ("generate", "a red circle", *SMALL, *recipe, "--set", "when=always", "--json")
    assert main([*given, "-o", str(video)]) == 0
    receipt = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"][0]["receipt"]
    density = receipt["attention"]["density"]
    assert density == pytest.approx(float(found.masks.float().mean()), abs=0.02)
    assert main(["plan", "--size", "256x256", *recipe]) == 2
    assert "calibrate for this model and size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("kinora-tiny", "--keep", "2"), "keep must be above 0 and at most 1, not 2"),
        (("kinora-tiny", "--method", "sada"), "--method is 'sada'; paro is the one"),
        (("kinora-tinny",), "kinora-tiny"),
        (("kinora-tiny", "-o", "/nowhere/a.npz"), "there is no folder /nowhere: make it first"),
        (("kinora-tiny", "-o", "{folder}/there"), "is there already: name another file"),
    ],
)
def test_bad_input(
    given: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "there").touch()
    assert main(["calibrate", *(it.format(folder=tmp_path) for it in given)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert told in line
    assert [it.name for it in tmp_path.iterdir()] == ["there"]
