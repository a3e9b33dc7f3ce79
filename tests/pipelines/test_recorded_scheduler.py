"""A record names the scheduler and its settings: runs by an edited one are told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kinora.eval.clips import find
from kinora.eval.runs import differences
from kinora.pipelines import sidecar
from kinora.pipelines.decode import decode
from kinora.pipelines.events import Notice
from kinora.pipelines.generate import generate
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run
from kinora.pipelines.sidecar import Record


def made(folder: Path, output: Path, **options: Any) -> tuple[Record, list[str]]:
    request = Request.model_validate(
        {"prompt": "a red circle", "model": str(folder), "width": 32, "height": 32, "frames": 5,
         "steps": 2, "output": f"{output}/", "keep_latents": True}
    )  # fmt: skip
    *events, last = generate(request, **options)
    assert isinstance(last, Run)
    (clip,), _ = find([output])
    assert clip.record is not None
    return clip.record, [it.text for it in events if isinstance(it, Notice)]


@pytest.fixture
def edited(wan_folder: Path, tmp_path: Path) -> Path:
    """The same weights with another setting of the scheduler."""
    folder = tmp_path / "edited"
    shutil.copytree(wan_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert config["flow_shift"] != 7.0
    file.write_text(json.dumps({**config, "flow_shift": 7.0}))
    return folder


def test_an_edited_scheduler_is_another_sampler(
    wan_folder: Path, edited: Path, tmp_path: Path
) -> None:
    one, _ = made(wan_folder, tmp_path / "one")
    same, _ = made(wan_folder, tmp_path / "same")
    other, _ = made(edited, tmp_path / "other")
    assert one.model.scheduler == other.model.scheduler is not None
    assert one.model == same.model and one.model.fingerprint == other.model.fingerprint
    told = list(differences(other, one))
    assert any(f"{one.model.scheduler} with settings" in it for it in told)
    assert not any("settings" in it for it in differences(same, one))


def test_a_repeat_by_an_edited_scheduler_is_told(
    wan_folder: Path, edited: Path, tmp_path: Path
) -> None:
    original, _ = made(wan_folder, tmp_path / "one")
    asked = original.request.model_copy(update={"model": str(edited)})
    original = original.model_copy(update={"request": asked})
    _, notices = made(edited, tmp_path / "again", original=original)
    assert any("the scheduler or its settings" in it for it in notices)


def test_decoded_latents_keep_their_scheduler(wan_folder: Path, tmp_path: Path) -> None:
    record, _ = made(wan_folder, tmp_path / "one")
    (latents,) = (tmp_path / "one").glob("*.safetensors")
    *_, last = decode(latents, output=f"{tmp_path / 'again'}/")
    assert isinstance(last, Run)
    (clip,), _ = find([tmp_path / "again"])
    assert clip.record is not None and clip.record.model.scheduler == record.model.scheduler
    assert clip.record.model.scheduler_sha256 == record.model.scheduler_sha256


def test_earlier_records_are_read_and_say_nothing_of_it(wan_folder: Path, tmp_path: Path) -> None:
    record, _ = made(wan_folder, tmp_path / "one")
    content = json.loads(record.to_text())
    for name in ("scheduler", "scheduler_sha256"):
        del content["model"][name]
    earlier = sidecar.parse(json.dumps(content), Path("earlier.json"))
    assert earlier.model.scheduler is None
    assert not list(differences(earlier, record)) and not list(differences(record, earlier))
    assert not sidecar.differences(earlier, record.model, record.machine)
