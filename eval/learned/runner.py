# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#     "lpips==0.1.4",
#     "pytorch-fid==0.3.0",
#     "torch>=2.11,<2.14",
#     "torchvision>=0.26",
#     "numpy>=2",
# ]
# ///
"""Takes what LPIPS, FID and FVD need of frames, where their libraries can be imported.

    uv run --script --locked runner.py --metric lpips --weights ~/.cache/torch/hub/checkpoints

A script of its own: nothing of Kinora can be imported here. It answers lines of JSON on stdin with
lines on stdout, the first of which says whether it is ready:

    {"frames": "a.npy", "reference": "b.npy"}   → {"values": [0.1, …]}     LPIPS of each frame
    {"frames": "a.npy", "out": "features.npy"}  → {"features": 33}         of FID or FVD

`frames` are `[F, height, width, 3]` uint8.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description="Takes what LPIPS, FID and FVD need of frames.")
    parser.add_argument("--metric", choices=("lpips", "fid", "fvd"), required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for the log
    try:
        take, device = _loaded(asked)
    except ImportError as error:
        return _answer(answers, {"environment": f"{sys.executable} cannot import {error.name}"})
    except Exception as error:  # whatever a library comes up with
        return _answer(answers, {"error": _line(error)})
    _answer(answers, {"ready": True, "device": device, "versions": _versions()})
    for line in sys.stdin:
        try:
            answer = take(json.loads(line))
        except Exception as error:
            answer = {"error": _line(error)}
        _answer(answers, answer)
    return 0


def _loaded(asked: argparse.Namespace) -> tuple[Callable[[dict[str, str]], dict[str, Any]], str]:
    import torch

    device = asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    load = {"lpips": _lpips, "fid": _inception, "fvd": _i3d}[asked.metric]
    return load(asked.weights, device), name


def _lpips(_: Path, device: str) -> Callable[[dict[str, str]], dict[str, Any]]:
    """AlexNet, frames in −1 … 1, as the library's authors have it."""
    import torch

    model: Any = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).to(device)

    def take(request: dict[str, str]) -> dict[str, Any]:
        made, reference = _frames(request["frames"]), _frames(request["reference"])
        values: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(made), _BATCH):
                pair = (
                    it[start : start + _BATCH].to(device) / 127.5 - 1 for it in (made, reference)
                )
                values += model(*pair).flatten().tolist()
        return {"values": values}

    return take


def _inception(_: Path, device: str) -> Callable[[dict[str, str]], dict[str, Any]]:
    """The 2048 features that FID is of, of each frame."""
    import torch

    inception: Any = importlib.import_module("pytorch_fid.inception").InceptionV3
    model: Any = inception([inception.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()

    def features(frames: Any) -> Any:
        parts = [
            model(frames[start : start + _BATCH].to(device) / 255)[0].flatten(1).cpu()
            for start in range(0, len(frames), _BATCH)
        ]
        return torch.cat(parts)

    return _kept(features)


def _i3d(weights: Path, device: str) -> Callable[[dict[str, str]], dict[str, Any]]:
    """The 400 values before the softmax of I3D that FVD is of, of a video."""
    import torch

    model: Any = torch.jit.load(str(weights / "i3d_torchscript.pt")).eval().to(device)

    def features(frames: Any) -> Any:
        video = frames.movedim(1, 0)[None].to(device)  # [1, 3, F, height, width]
        return model(video, rescale=True, resize=True, return_features=True).cpu()

    return _kept(features)


def _kept(features: Callable[[Any], Any]) -> Callable[[dict[str, str]], dict[str, Any]]:
    import numpy as np
    import torch

    def take(request: dict[str, str]) -> dict[str, Any]:
        with torch.inference_mode():
            found = features(_frames(request["frames"])).float().numpy()
        np.save(request["out"], found)
        return {"features": len(found)}

    return take


def _frames(path: str) -> Any:
    """`[F, 3, height, width]` float32, 0 to 255."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(path)).movedim(-1, 1).float()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("lpips", "pytorch-fid", "torch", "torchvision"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _line(error: Exception) -> str:
    traceback.print_exc()
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _answer(file: TextIO, told: dict[str, Any]) -> int:
    print(json.dumps(told), file=file, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
