"""Each text is encoded once for a model, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.pipelines.encoding import Encodings, remembered
from kinora.pipelines.generate import generate
from kinora.pipelines.models import Shelf
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run

SIZES: dict[str, dict[str, int]] = {
    "wan": {"width": 32, "height": 32, "frames": 5},
    "cogvideox": {"width": 32, "height": 32, "frames": 9},
    "flux": {"width": 32, "height": 32, "frames": 1},
    "sdxl": {"width": 32, "height": 32, "frames": 1},
}


def made(folder: Path, family: str, output: Path, prompt: str, shelf: Shelf, seed: int = 0) -> str:
    """The hash of the frames."""
    asked = {"model": str(folder), "device": "cpu", "output": f"{output}/", **SIZES[family]}
    request = Request.model_validate({"prompt": prompt, "steps": 2, "seed": seed, **asked})
    *_, run = generate(request, shelf=shelf)
    assert isinstance(run, Run)
    return run.outputs[0].frames_sha256


@pytest.mark.parametrize("family", SIZES)
def test_frames_are_those_of_texts_that_are_encoded_anew(
    model_folders: dict[str, Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shelf = model_folders[family], Shelf()
    calls: list[str] = []
    rows = [("a red circle", 0), ("a red circle", 1), ("a blue square", 0), ("a red circle", 0)]
    hashes: list[str] = []
    of = Encodings.of

    def counted(self: Encodings, key: Any, encode: Any) -> Any:
        def run() -> Any:
            calls.append(key[0])
            return encode()

        return of(self, key, run)

    monkeypatch.setattr(Encodings, "of", counted)
    counts: list[int] = []
    for prompt, seed in rows:
        hashes.append(made(folder, family, tmp_path, prompt, shelf, seed))
        counts.append(len(calls))
    assert counts[0] > 0 and counts[0] == counts[1] < counts[2] == counts[3]
    alone = [made(folder, family, tmp_path, prompt, Shelf(), seed) for prompt, seed in rows]
    assert hashes == alone and hashes[0] == hashes[3] != hashes[1]


class Encoder(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"states": input_ids.double() * scale}


class Pipe:
    def __init__(self) -> None:
        self.text_encoder = Encoder().eval()


def test_what_a_caller_changes_is_its_own() -> None:
    pipe, ids = Pipe(), torch.arange(4)
    forward = pipe.text_encoder.forward
    with remembered(pipe, Encodings()):
        for _ in range(3):
            states = pipe.text_encoder(ids)["states"]
            assert torch.equal(states, ids.double())
            states += 1
        assert torch.equal(pipe.text_encoder(ids, scale=2.0)["states"], 2 * ids.double())
        assert torch.equal(pipe.text_encoder(ids + 1)["states"], ids.double() + 1)
    assert pipe.text_encoder.forward == forward


def test_no_more_is_kept_than_is_allowed() -> None:
    kept, made = Encodings(most=100), list[int]()

    def of(key: int, numbers: int) -> None:
        def encode() -> torch.Tensor:
            made.append(key)
            return torch.zeros(numbers, dtype=torch.uint8)

        kept.of(key, encode)

    for key, numbers in ((1, 40), (2, 40), (1, 40), (3, 40), (1, 40), (2, 40), (4, 101), (4, 101)):
        of(key, numbers)
    assert made == [1, 2, 3, 2, 4, 4], "2 was used before 1, and 4 is too large"
