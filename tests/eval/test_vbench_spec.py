"""What is written down of VBench: notes of its dimensions, and the lock of its environment."""

from __future__ import annotations

import tomllib

from kinora.eval.vbench import client
from kinora.eval.vbench.spec import DIMENSIONS


def test_left_and_right_are_told_to_be_one() -> None:
    """T10."""
    assert "neither left from right" in DIMENSIONS["spatial_relationship"].note


def test_the_lock_is_of_the_script() -> None:
    """T12: and takes the wheel, whose source refuses machines without a GPU."""
    header = client.RUNNER.read_text().partition("# ///\n")[0].partition("# /// script\n")[2]
    wanted = tomllib.loads("\n".join(it.removeprefix("#")[1:] for it in header.splitlines()))
    assert wanted["tool"]["uv"]["no-build-package"] == ["vbench"]
    lock = tomllib.loads(client.LOCK.read_text())
    locked = {it["name"]: it for it in lock["package"]}
    assert locked["vbench"]["version"] == "0.1.5" and locked["vbench"]["wheels"]
    assert int(locked["setuptools"]["version"].partition(".")[0]) < 81
    named = {it["name"] for it in lock["manifest"]["requirements"]}
    assert named == {it.partition(">")[0].partition("=")[0] for it in wanted["dependencies"]}
