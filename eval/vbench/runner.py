# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "vbench==0.1.5",
#     "torch>=2.11,<2.14",
#     "torchvision>=0.26",
#     "decord2>=3.4; platform_machine == 'aarch64'",
# ]
#
# [tool.uv]
# # clip imports pkg_resources, which setuptools 81 no longer has; decord has no wheel for aarch64.
# override-dependencies = ["setuptools>=77.0.3,<81", "decord; platform_machine != 'aarch64'"]
# # Built from source, it refuses a machine without a GPU.
# no-build-package = ["vbench"]
# ///
"""Runs the VBench package, one dimension a call, in an environment where it can be imported.

    uv run --script --locked runner.py about --out about.json
    python runner.py score --dimension temporal_flickering --info info.json --videos videos \
        --mode vbench_standard --out out

A script of its own: nothing of Kinora can be imported here. Exit status 0, 1 for an error of the
package and 2 for an environment without it; `--out` then says which, in one line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ERROR, NO_ENVIRONMENT = 1, 2
_BROKEN = "operator torchvision::nms does not exist"


class NoEnvironment(Exception):  # noqa: N818
    """The package, or what a dimension needs besides, is not installed here."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the VBench package.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("about", help="which package this is, and where its prompts are")
    score = commands.add_parser("score", help="score a folder of videos in one dimension")
    for command in (about, score):
        command.add_argument("--out", type=Path, required=True)
    score.add_argument("--dimension", required=True)
    score.add_argument("--packages", nargs="*", default=[], help="what the dimension imports")
    score.add_argument("--info", type=Path, help="VBench_full_info.json")
    score.add_argument("--videos", type=Path, required=True)
    score.add_argument("--prompts", type=Path, help="JSON of prompts by file name")
    score.add_argument("--mode", choices=("vbench_standard", "custom_input"), required=True)
    score.add_argument("--device", default="auto")
    asked = parser.parse_args(argv)
    told = asked.out if asked.command == "about" else asked.out / "runner.json"
    try:
        found = _about() if asked.command == "about" else _score(asked)
    except NoEnvironment as error:
        _write(told, {"status": "environment", "error": str(error)})
        return NO_ENVIRONMENT
    except (Exception, SystemExit) as error:  # whatever the package comes up with
        traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _write(told, {"status": "error", "error": line})
        return ERROR
    _write(told, {"status": "done", **found})
    return 0


def _about() -> dict[str, Any]:
    # Without importing it, which takes seconds and wants all it needs.
    spec = importlib.util.find_spec("vbench")
    if spec is None or not spec.submodule_search_locations:
        raise NoEnvironment(f"{sys.executable} cannot import vbench")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {"info": str(folder / "VBench_full_info.json"), "versions": _versions()}


def _score(asked: argparse.Namespace) -> dict[str, Any]:
    # The package 0.1.5 loads checkpoints as torch did before 2.6; they are its own.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    _link_dino()
    shimmed = _import_torchvision()
    import torch

    missing = [it for it in ("vbench", *asked.packages) if importlib.util.find_spec(it) is None]
    if missing:
        raise NoEnvironment(f"{sys.executable} cannot import {', '.join(missing)}")
    vbench: Any = importlib.import_module("vbench")
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = json.loads(asked.prompts.read_text()) if asked.prompts else []
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    package = vbench.VBench(torch.device(device), str(asked.info or ""), str(asked.out))
    package.evaluate(
        videos_path=str(asked.videos),
        name=asked.dimension,
        prompt_list=prompts,
        dimension_list=[asked.dimension],
        local=True,  # of files under VBENCH_CACHE_DIR, which were looked for before
        mode=asked.mode,
    )
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torchvision_shimmed": shimmed,
        "versions": _versions(),
    }


def _link_dino() -> None:
    """torch.hub reads DINO's weights from its own cache, whatever path the package names."""
    base = os.environ.get("VBENCH_CACHE_DIR") or os.path.expanduser("~/.cache/vbench")
    weights = Path(base) / "dino_model" / "dino_vitbase16_pretrain.pth"
    if not weights.exists():
        return
    home = Path(os.environ.get("TORCH_HOME") or os.path.expanduser("~/.cache/torch"))
    link = home / "hub" / "checkpoints" / weights.name
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(weights)


def _import_torchvision() -> bool:
    """Import torchvision; True if it had to be helped.

    Its wheels for CUDA, beside a torch for CPUs, fail on import because operators that they compile
    are not there. With their names declared, all else works, and using them raises.
    """
    try:
        importlib.import_module("torchvision")
        return False
    except ImportError as error:
        raise NoEnvironment(f"{sys.executable} cannot import torchvision ({error})") from None
    except RuntimeError as error:
        if _BROKEN not in str(error):
            raise
    import torch

    for name in [it for it in sys.modules if it.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # what it declares goes with it
    importlib.import_module("torchvision")
    return True


_kept: list[Any] = []


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vbench", "torch", "torchvision", "transformers", "numpy", "decord", "decord2"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
