"""The shape of the house: what may import what, and that everything is packaged."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 1, "accel": 2, "pipelines": 3, "eval": 3, "app": 4}
LONGEST_FILE_LINES = 400
KNOWN_TO_EVAL = tuple(
    f"kinora.pipelines.{name}"
    for name in ("world", "media", "sidecar", "latents", "files", "errors")
)

# Outside libraries that each part may import; the standard library always.
LIBRARIES = {
    "kernels": {"torch", "triton", "numpy"},
    "accel": {"torch", "pydantic", "numpy"},
    "accel/attach": {"diffusers"},
    "pipelines": {
        *("torch", "numpy", "diffusers", "transformers", "tokenizers", "safetensors", "pydantic"),
        "pydantic_core",  # part of pydantic: its errors
        *("imageio", "av", "PIL", "psutil", "huggingface_hub"),
    },
    "pipelines/batch": {"pyarrow"},
    "eval": {"torch", "numpy", "cv2", "av"},
    "eval/learned": {"transformers"},
    "app/bench": {"triton"},
    "app": {
        *("typer", "rich", "gradio", "fastapi", "uvicorn", "torch", "numpy", "PIL"),
        "starlette",  # part of fastapi: its errors
    },
}


def sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, relative ones resolved from the checkout root."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            # `from .. import x` and `from . import x` import modules: name each of them.
            module = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join(["kinora", *above, name]) for name in module)
        elif isinstance(node, ast.ImportFrom) and node.module == "kinora":
            yield from (f"kinora.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def may_import(part: str, wanted: str) -> bool:
    """Whether a file of `part` may import the module `wanted` (`kinora.…`) of ours."""
    other = wanted.split(".")[1]
    if other == part or FLOORS[other] < FLOORS[part]:
        # Scores know the world and what is on disk, and nothing else, of the floor they share with
        # the pipelines.
        return part != "eval" or other == "eval"
    return part == "eval" and wanted.startswith(KNOWN_TO_EVAL)


@pytest.mark.parametrize("part", FLOORS)
def test_imports_point_down(part: str):
    upward = [
        f"{module_name(path)} imports {name}"
        for path in sources(part)
        for name in imports(path)
        if name.startswith("kinora.") and not may_import(part, name)
    ]
    assert not upward


@pytest.mark.parametrize(
    ("part", "wanted", "allowed"),
    [
        ("app", "kinora.pipelines.generate", True),
        ("pipelines", "kinora.accel.grid", True),
        ("eval", "kinora.pipelines.world.render", True),
        ("eval", "kinora.pipelines.media", True),
        ("eval", "kinora.pipelines.generate", False),
        ("pipelines", "kinora.eval.world", False),
        ("kernels", "kinora.accel.grid", False),
        ("accel", "kinora.app.cli", False),
    ],
)
def test_the_rule_of_imports(part: str, wanted: str, allowed: bool):
    assert may_import(part, wanted) is allowed


def test_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = tmp_path / "kernels" / "deep" / "file.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "from ...app import cli\nfrom . import near\nfrom ..plan import P\nimport av\n"
        "from kinora import app\nfrom kinora.eval import world"
    )
    found = ["kinora.app", "kinora.kernels.deep.near", "kinora.kernels.plan", "av"]
    found += ["kinora.app", "kinora.eval"]
    assert list(imports(source)) == found


@pytest.mark.parametrize("part", FLOORS)
def test_each_part_keeps_to_its_libraries(part: str):
    allowed = LIBRARIES[part] | set(sys.stdlib_module_names) | {"kinora"}
    strangers = {
        f"{module_name(path)} imports {name}"
        for path in sources(part)
        for name in imports(path)
        if name.split(".")[0] not in allowed | LIBRARIES.get(f"{part}/{path.parent.name}", set())
    }
    assert not strangers


def test_no_init_in_the_five_folders():
    # A regular package called `kernels` on sys.path would hide Hugging Face's.
    assert not [part for part in FLOORS if (ROOT / part / "__init__.py").exists()]


def test_every_folder_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for part in FLOORS for path in sources(part)}
    folders |= {ROOT / part for part in FLOORS}
    expected = {".".join(("kinora", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(settings["packages"]) == expected


def test_bare_imports_of_our_names_are_banned():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "TID251" in settings["select"]
    assert set(settings["flake8-tidy-imports"]["banned-api"]) == set(FLOORS)


def test_huggingface_kernels_is_not_hidden():
    # Whatever `kernels` is here, it is not ours, even with the checkout on sys.path.
    import importlib.util

    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def test_no_file_is_too_long():
    parts = (*FLOORS, "tests", "benchmarks", "examples")
    long = {
        str(path.relative_to(ROOT)): lines
        for part in parts
        if (ROOT / part).exists()
        for path in sources(part)
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE_LINES
    }
    assert not long
