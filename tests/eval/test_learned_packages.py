"""The real LPIPS and pytorch-fid, installed for the test, with random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinora.eval.evaluate import evaluate
from kinora.eval.learned import client
from kinora.eval.learned.spec import weights_folder
from kinora.eval.report import Report

pytestmark = pytest.mark.slow

RANDOM = """
import sys, torch, torchvision.models, pytorch_fid.inception as fid
torch.manual_seed(0)
alexnet, inception = sys.argv[1:]
torch.save(torchvision.models.alexnet(weights=None).state_dict(), alexnet)
class Kept(Exception): pass
def stop(*_, **__): raise Kept
fid.load_state_dict_from_url = stop
kept = []
build = fid._inception_v3
def building(**options):
    kept.append(build(**options))
    return kept[-1]
fid._inception_v3 = building
try:
    fid.fid_inception_v3()
except Kept:
    torch.save(kept[0].state_dict(), inception)
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    minor = int(torch.__version__.split(".")[1]) + 15  # torchvision's that belongs to this torch
    wanted = ["lpips==0.1.4", "pytorch-fid==0.3.0", f"torchvision==0.{minor}.*"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, *wanted], check=True)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *([before] if before else [])]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(client.PYTHON_VARIABLE, sys.executable)
    weights_folder().mkdir(parents=True)
    files = ("alexnet-owt-7be5be79.pth", "pt_inception-2015-12-05-6726825d.pth")
    paths = [str(weights_folder() / it) for it in files]
    subprocess.run([sys.executable, "-c", RANDOM, *paths], check=True)


def test_more_noise_is_further_away(
    libraries: None, film: Callable[..., Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    clean: Any = rng.integers(60, 180, (3, 64, 64, 3))
    scores: dict[str, list[float]] = {"lpips": [], "fid": []}
    film(tmp_path / "dense" / "0.png", clean.astype(np.uint8), "a cat", 0)
    for noise in (0, 10, 40):
        hurt = (clean + rng.normal(0, noise, clean.shape)).clip(0, 255).astype(np.uint8)
        film(tmp_path / f"{noise}" / "0.png", hurt, "a cat", 0)
        *_, found = evaluate(
            [tmp_path / f"{noise}"], reference=tmp_path / "dense", metrics=list(scores)
        )
        assert isinstance(found, Report)
        assert found.status == "ok", found.remarks()
        for name, values in scores.items():
            values.append(found.totals[name].mean or 0.0)
    for values in scores.values():
        assert values[0] == pytest.approx(0, abs=1e-6) and values[0] < values[1] < values[2]
