"""Which library each metric is of, and its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..weights import WeightFile

CLIP_MODEL = "openai/clip-vit-large-patch14"
CLIP_SIZE, CLIP_LICENCE = "about 1.7 GB", "MIT"
FEW_FRAMES, FEW_VIDEOS = 2048, 256
"""Below these FID and FVD say more of the number of features than of the videos."""


@dataclass(frozen=True, slots=True)
class Library:
    """What the runner imports for a metric, and the files that it loads."""

    package: str
    files: tuple[WeightFile, ...]


LIBRARIES: dict[str, Library] = {
    "lpips": Library("lpips", (
        WeightFile(
            "alexnet-owt-7be5be79.pth",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "about 240 MB", "BSD-3-Clause",
        ),
    )),
    "fid": Library("pytorch_fid", (
        WeightFile(
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
            "about 95 MB", "Apache-2.0",
        ),
    )),
    "fvd": Library("torch", (
        WeightFile(
            "i3d_torchscript.pt",
            "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
            "about 50 MB", "Apache-2.0 (of kinetics-i3d, which it was made from)",
        ),
    )),
}  # fmt: skip


def weights_folder() -> Path:
    """Where torch keeps weights, in which the libraries look."""
    home = os.environ.get("TORCH_HOME") or "~/.cache/torch"
    return Path(home).expanduser().absolute() / "hub" / "checkpoints"


@dataclass(frozen=True, slots=True)
class Tools:
    """What the user may name: a CLIP checkpoint (folder, or name in the cache of the Hugging Face
    hub), an interpreter that has the libraries, and a device."""

    clip: str = CLIP_MODEL
    python: str | None = None
    device: str = "auto"
