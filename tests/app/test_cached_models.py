"""Models of the registry in the Hugging Face cache: absent, half downloaded, damaged, there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import cards

Cli = Callable[..., Any]
Cache = Callable[..., Path]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")
FETCH = "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers`"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ASK = ("generate", "a", "--model", "wan2.1-1.3b")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to fill it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


@pytest.fixture
def cache(hub: Path, wan_folder: Path) -> Cache:
    """Put files of the tiny pipeline into the cache as those of wan2.1-1.3b; all, or some.

    `listed` are files that the repository has, as newer releases of the library note it. Returns
    the snapshot, whose files are links to blobs, as the library makes them.
    """

    def fill(files: Iterable[str] | None = None, listed: Iterable[str] = ()) -> Path:
        repo, commit = hub / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers", "a" * 40
        snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
        for folder in (snapshot, blobs, repo / "refs"):
            folder.mkdir(parents=True)
        (repo / "refs/main").write_text(commit)
        there = (path for path in wan_folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(wan_folder)) for path in there] if files is None else files
        for number, name in enumerate(names):
            file, blob = snapshot / name, blobs / f"{number:064}"
            file.parent.mkdir(exist_ok=True)
            shutil.copy(wan_folder / name, blob)
            file.symlink_to(blob)
        noted = {name: {"size": 1, "blob_id": "b" * 40, "lfs": None} for name in listed}
        if noted:
            (repo / "trees").mkdir()
            tree = {"format_version": 1, "files": noted}
            (repo / "trees" / f"{commit}.json").write_text(json.dumps(tree))
        return snapshot

    return fill


def test_absent_weights_name_the_download_and_its_size(cli: Cli) -> None:
    called = cli(*ASK)
    assert called.status == 2
    assert FETCH in called.complaint and "29 GB" in called.complaint


@pytest.mark.parametrize("files", [(), ("vae/config.json",), ("model_index.json",)])
@pytest.mark.parametrize("listed", [(), ("model_index.json",)])
def test_an_interrupted_download_is_answered_like_absent_weights(
    cli: Cli, cache: Cache, files: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    cache(files, listed)
    told = f"not whole on this machine: fetch them with {FETCH} (about 29 GB), which keeps the"
    called = cli(*ASK)
    assert called.status == 2
    assert told in called.complaint and "resume" not in called.complaint
    planned = cli("plan", "--model", "wan2.1-1.3b", "--json")
    assert planned.status == 0 and told in planned.last["parts"][0]["why"]


def test_a_file_that_is_still_being_downloaded_is_missing(cli: Cli, cache: Cache) -> None:
    file = cache() / WEIGHTS
    blob = file.resolve()
    blob.rename(blob.with_suffix(".0123abcd.incomplete"))
    for gone in (False, True):  # an old link that leads nowhere, or none yet
        if gone:
            file.unlink()
        called = cli(*ASK)
        assert called.status == 2 and "transformer/ holds no safetensors" in called.complaint
        assert FETCH in called.complaint and "keeps the files" in called.complaint


@pytest.mark.parametrize(
    ("name", "left", "told"),
    [
        (WEIGHTS, -100, "is truncated"),
        (WEIGHTS, 3, "is truncated"),
        ("model_index.json", -20, "cannot be read as JSON"),
        ("vae/config.json", -20, "cannot be read as JSON"),
    ],
)
def test_a_truncated_file_is_named_with_what_replaces_it(
    cli: Cli, cache: Cache, name: str, left: int, told: str
) -> None:
    """A download takes the file that is there for whole: it has to go first."""
    file = cache() / name
    blob = file.resolve()
    blob.write_bytes(blob.read_bytes()[:left])
    called = cli(*ASK, *SMALL)
    assert called.status == 2
    for part in (f"{file} {told}", f"`rm {blob}`, then {FETCH}"):
        assert part in called.complaint, called.complaint
    assert "resume" not in called.complaint and "about 29 GB" not in called.complaint


def test_a_snapshot_that_lacks_what_no_pipeline_needs_is_loaded(cli: Cli, cache: Cache) -> None:
    others = ("README.md", "assets/example.png", "transformer/diffusion_pytorch_model.fp16.bin")
    snapshot = cache(listed=("model_index.json", *others))
    assert not any((snapshot / name).exists() for name in others)
    made = cli(*ASK, *SMALL, "--json")
    assert made.status == 0 and Path(made.last["outputs"][0]["path"]).is_file(), made.err
    planned = cli("plan", "--model", "wan2.1-1.3b", "--json").last
    assert all("not whole" not in part["why"] for part in planned["parts"])


def test_show_says_whether_the_weights_are_here_and_where(
    cli: Cli, cache: Cache, wan_folder: Path
) -> None:
    show = ("models", "show", "wan2.1-1.3b")
    assert f"are not on this machine: fetch them with {FETCH} (about" in cli(*show).out
    assert cli(*show, "--json").last["weights"] is None
    snapshot = cache()
    # Wrapped at any width: paths have no spaces.
    told = "".join(cli(*show).out.split())
    assert f"weightshere:{snapshot}default" in told and "hfdownload" not in told
    assert cli(*show, "--json").last["weights"] == str(snapshot)
    (snapshot / WEIGHTS).resolve().write_bytes(b"abc")
    assert "istruncated" in "".join(cli(*show).out.split())
    for name, path in (("kinora-tiny", cards.find("kinora-tiny").folder), (wan_folder, wan_folder)):
        assert f"here:{path}default" in "".join(cli("models", "show", name).out.split())
