"""The start of the page: torch comes when something needs it, whole, and for all threads once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

_PAGE = """
import os, sys, tempfile
from pathlib import Path
from kinora.app.ui import later, server
from kinora.app.ui.guard import Access
from kinora.pipelines.jobs import Jobs
before = len(sys.meta_path)
later.defer(*server.LATER)
later.without_stubs()
server.application(Jobs(tempfile.mkdtemp()), Access(None), Path(tempfile.mkdtemp()))
heavy = ("torch._C", "pandas.core", "diffusers", "transformers")
print("loaded:", [name for name in heavy if name in sys.modules])
import torch
import gradio.component_meta as meta
print("stubs:", meta.create_or_modify_pyi.__name__, len(sys.meta_path) == before)
print("then:", torch.ones(2).sum().item(), type(torch).__name__)
os._exit(0)
"""


def run(script: str, *, path: Path | None = None) -> str:
    """What a fresh Python prints."""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=path
    )
    return found.stdout


def test_the_page_stands_before_torch_is_imported() -> None:
    assert run(_PAGE).splitlines() == [
        "loaded: []",
        "stubs: <lambda> True",
        "then: 2.0 module",
    ]


_THREADS = """
import sys, threading
sys.path.insert(0, ".")
from kinora.app.ui import later
later.defer("slow", "nowhere", "json")
import slow, json
assert slow.__name__ == "slow" and "begun" not in sys.modules
found = []
threads = [threading.Thread(target=lambda: found.append(slow.late)) for _ in range(8)]
for it in threads: it.start()
for it in threads: it.join()
import slow.part
print(found == [8] * 8, slow.part.whole, slow.times, "nowhere" in sys.modules)
"""


def test_threads_wait_for_a_module_that_one_of_them_runs(tmp_path: Path) -> None:
    package = tmp_path / "slow"
    package.mkdir()
    lines = ("import sys, time", "sys.modules['begun'] = sys", "times = globals().get('times', 0)")
    body = ("times += 1", "early = 1", "from . import part", "time.sleep(0.3)", "late = 8")
    (package / "__init__.py").write_text("\n".join((*lines, *body)))
    (package / "part.py").write_text("import slow\nwhole = slow.early")
    assert run(_THREADS, path=tmp_path) == "True 1 1 False\n"


_BROKEN = """
import sys
sys.path.insert(0, ".")
from kinora.app.ui import later
later.defer("broken")
import broken
for _ in range(2):
    try: broken.anything
    except ImportError as error: print(error)
"""


def test_a_module_that_fails_says_so_each_time(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('no such library')")
    assert run(_BROKEN, path=tmp_path) == 2 * "no such library\n"
