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
"""Runs a package of VBench, one dimension a call, in an environment where it can be imported.

    uv run --script --locked runner.py about --suite vbench --out about.json
    python runner.py score --suite vbench --dimension temporal_flickering --info info.json \
        --videos videos --mode vbench_standard --out out

A script of its own: nothing of Kinora can be imported here. Exit status 0, 1 for an error of the
package and 2 for an environment without it; `--out` then says which, in one line.
"""

from __future__ import annotations

import argparse
import functools
import importlib
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
PACKAGES = {
    "vbench": ("vbench", "VBench", "VBench_full_info.json"),
    "vbench-i2v": ("vbench2_beta_i2v", "VBenchI2V", "vbench2_i2v_full_info.json"),
    "vbench2": ("vbench2", "VBench2", "VBench2_full_info.json"),
}
"""By suite: what is imported, its class, and its list of prompts."""
_RATIO = "1-1"  # a name for the folder of images, whatever their sides
_BROKEN = "operator torchvision::nms does not exist"


class NoEnvironment(Exception):  # noqa: N818
    """The package, or what a dimension needs besides, is not installed here."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the VBench package.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("about", help="which package this is, and where its prompts are")
    score = commands.add_parser("score", help="score a folder of videos in one dimension")
    still = commands.add_parser("still", help="which videos of a folder are still, by its filter")
    for command in (about, score, still):
        command.add_argument("--suite", choices=PACKAGES, required=True)
        command.add_argument("--out", type=Path, required=True)
    score.add_argument("--dimension", required=True)
    score.add_argument("--packages", nargs="*", default=[], help="what the dimension imports")
    score.add_argument("--info", type=Path, help="VBench_full_info.json")
    score.add_argument("--images", type=Path, help="folder of images that videos begin with")
    for command in (score, still):
        command.add_argument("--caches", type=Path, required=True, help="folder of weights")
        command.add_argument("--videos", type=Path, required=True)
        command.add_argument("--device", default="auto")
    score.add_argument("--prompts", type=Path, help="JSON of prompts by file name")
    score.add_argument("--mode", choices=("vbench_standard", "custom_input"), required=True)
    asked = parser.parse_args(argv)
    told = asked.out if asked.command == "about" else asked.out / "runner.json"
    try:
        if asked.command == "about":
            found = _about(asked.suite)
        else:
            found = _score(asked) if asked.command == "score" else _still(asked)
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


def _about(suite: str) -> dict[str, Any]:
    # Without importing it, which takes seconds and wants all it needs.
    package, _, listed = PACKAGES[suite]
    info = _folder(package) / listed
    return {"info": str(info) if info.is_file() else None, "versions": _versions()}


def _folder(package: str) -> Path:
    """Where a package lies. Raises `NoEnvironment`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NoEnvironment(f"{sys.executable} cannot import {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def _score(asked: argparse.Namespace) -> dict[str, Any]:
    # The packages load checkpoints as torch did before 2.6; they are their own.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    for name in ("out", "videos", "caches", "info", "images", "prompts"):
        given = getattr(asked, name)
        setattr(asked, name, given and given.absolute())
    package, kind, _ = PACKAGES[asked.suite]
    _link_hub(asked.caches)
    shimmed = _import_torchvision()
    import torch

    missing = [it for it in (package, *asked.packages) if not _is_there(it)]
    if missing:
        raise NoEnvironment(f"{sys.executable} cannot import {', '.join(missing)}")
    module: Any = importlib.import_module(package)
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asked.out.mkdir(parents=True, exist_ok=True)
    _enter(asked, package)
    prompts = json.loads(asked.prompts.read_text()) if asked.prompts else []
    how: dict[str, Any] = {"prompt_list": prompts, "mode": asked.mode}
    if asked.suite == "vbench-i2v":
        how = {"resolution": _RATIO}
    began = time.perf_counter()
    runner = getattr(module, kind)(torch.device(device), str(asked.info or ""), str(asked.out))
    runner.evaluate(
        videos_path=str(asked.videos),
        name=asked.dimension,
        dimension_list=[asked.dimension],
        local=True,  # of files among the weights, which were looked for before
        **how,
    )
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torchvision_shimmed": shimmed,
        "versions": _versions(),
    }


def _still(asked: argparse.Namespace) -> dict[str, Any]:
    """Which videos the package's filter for still ones keeps, by name."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    shimmed = _import_torchvision()
    import torch

    if not _is_there("vbench"):
        raise NoEnvironment(f"{sys.executable} cannot import vbench")
    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module: Any = importlib.import_module("vbench.cli.static_filter")
    module.DEVICE = device  # it takes frames there whatever it was given
    torch.load = functools.partial(torch.load, map_location=device)
    options = argparse.Namespace(
        model=str(asked.caches / "raft_model" / "models" / "raft-things.pth"),
        small=False, mixed_precision=False, alternate_corr=False,
    )  # fmt: skip
    kept = module.StaticFilter(options, device)
    names = sorted(it.name for it in asked.videos.iterdir())
    flags = {name: bool(kept.infer(str(asked.videos / name))) for name in names}
    return {"still": flags, "torchvision_shimmed": shimmed}


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def _enter(asked: argparse.Namespace, package: str) -> None:
    """Go to the folder whose files the package names by relative paths."""
    if package == "vbench2":
        os.chdir(_folder(package).parent)
    elif asked.suite == "vbench-i2v":
        folder = asked.out / "here"
        images = folder / package / "data" / "crop" / _RATIO
        images.parent.mkdir(parents=True)
        if asked.images:
            images.symlink_to(asked.images)
        (folder / "models").symlink_to(asked.caches / "dreamsim_model")
        os.chdir(folder)


def _link_hub(caches: Path) -> None:
    """torch.hub reads these from its own cache, whatever path the packages name."""
    home = Path(os.environ.get("TORCH_HOME") or os.path.expanduser("~/.cache/torch")) / "hub"
    for name, place in {
        "dino_model/dino_vitbase16_pretrain.pth": "checkpoints/dino_vitbase16_pretrain.pth",
        "dino_model/facebookresearch_dino_main": "facebookresearch_dino_main",
        "cotracker_model/cotracker2.pth": "checkpoints/cotracker2.pth",
        "cotracker_model/facebookresearch_co-tracker_main": "facebookresearch_co-tracker_main",
        "vgg_model/vgg19-dcbb9e9d.pth": "checkpoints/vgg19-dcbb9e9d.pth",
        "retinaface_model/retinaface_resnet50_2020-07-20-f168fae3c.zip": (
            "checkpoints/retinaface_resnet50_2020-07-20-f168fae3c.zip"
        ),
    }.items():
        source, link = caches / name, home / place
        if source.exists() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)  # one to weights that have moved
            link.symlink_to(source)


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
    for name in (
        "vbench",
        "vbench2",
        "torch",
        "torchvision",
        "transformers",
        "numpy",
        "decord",
        "decord2",
    ):
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
