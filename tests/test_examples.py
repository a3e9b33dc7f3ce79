"""The examples: named so that they can run where they lie, and they run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda it: it.name)
def test_an_example_hides_no_module(example: Path):
    # The folder of a script comes first on the path of imports.
    assert importlib.util.find_spec(example.stem) is None


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda it: it.name)
def test_an_example_runs(example: Path, tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "ran: " in ended.stdout and any(tmp_path.iterdir())
