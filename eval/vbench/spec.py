"""What VBench consists of: dimensions, ranges, weights of scores, and files of weights.

Ranges and weights are those of the leaderboard (`scripts/constant.py` of Vchitect/VBench), file
names those that package 0.1.5 looks for under `VBENCH_CACHE_DIR`. Where a published address is dead
or has moved, the one that the repository's head uses stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VERSION = "0.1.5"
SAMPLES = 5
"""Videos of each prompt that the package looks for, named `PROMPT-0` to `PROMPT-4`."""
_USED = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file, its path under VBench's cache; `size` and `licence` are None where not known."""

    path: str
    url: str
    size: str | None
    licence: str | None


@dataclass(frozen=True, slots=True)
class Dimension:
    """One of the 16: its group, range and weight in the total, and what it needs.

    `custom` says whether it means anything of videos of other prompts. `note` is what must be said
    beside its score.
    """

    name: str
    group: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    files: tuple[WeightFile, ...] = ()
    packages: tuple[str, ...] = ()
    custom: bool = False
    note: str = ""


_VIT_B = WeightFile(
    "clip_model/ViT-B-32.pt",
    f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "about 350 MB", "MIT",
)  # fmt: skip
_VIT_L = WeightFile(
    "clip_model/ViT-L-14.pt",
    f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "about 930 MB", "MIT",
)  # fmt: skip
_DINO = WeightFile(
    "dino_model/dino_vitbase16_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "about 340 MB", "Apache-2.0",
)  # fmt: skip
_DINO_CODE = WeightFile(
    "dino_model/facebookresearch_dino_main/hubconf.py",
    "https://github.com/facebookresearch/dino", "under 1 MB", "Apache-2.0",
)  # fmt: skip
_AMT = WeightFile(
    "amt_model/amt-s.pth",
    "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
    "about 12 MB", "CC BY-NC 4.0",
)  # fmt: skip
_RAFT = WeightFile(
    "raft_model/models/raft-things.pth",
    "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip", "about 80 MB", "BSD-3-Clause",
)  # fmt: skip
_LAION = WeightFile(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    "under 1 MB", "MIT",
)  # fmt: skip
_MUSIQ = WeightFile(
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/"
    "musiq_spaq_ckpt-358bb6af.pth",
    "about 110 MB", "not for commercial use (pyiqa)",
)  # fmt: skip
_GRIT = WeightFile(
    "grit_model/grit_b_densecap_objectdet.pth",
    f"{_USED}/grit_b_densecap_objectdet.pth", None, "MIT",
)  # fmt: skip
_TAG2TEXT = WeightFile(
    "caption_model/tag2text_swin_14m.pth",
    "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
    "about 4.5 GB", "Apache-2.0",
)  # fmt: skip
_UMT = WeightFile(
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
    f"{_USED}/l16_ptk710_ftk710_ftk400_f16_res224.pth", None, None,
)  # fmt: skip
_VICLIP = (
    WeightFile(
        "ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{_USED}/ViClip-InternVid-10M-FLT.pth", None, None
    ),
    WeightFile(
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "about 1.4 MB", "MIT",
    ),
)  # fmt: skip
_DETECTRON = ("detectron2",)

_ALL = (
    Dimension("subject_consistency", "quality", 0.1462, files=(_DINO, _DINO_CODE), custom=True),
    Dimension("background_consistency", "quality", 0.2615, files=(_VIT_B,), custom=True),
    Dimension(
        "temporal_flickering", "quality", 0.6293, custom=True,
        note="temporal_flickering without the filter for still videos: motion counts as flicker",
    ),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975, files=(_AMT,), custom=True),
    Dimension("dynamic_degree", "quality", weight=0.5, files=(_RAFT,), custom=True),
    Dimension("aesthetic_quality", "quality", files=(_VIT_L, _LAION), custom=True),
    Dimension("imaging_quality", "quality", files=(_MUSIQ,), custom=True),
    Dimension("object_class", "semantic", files=(_GRIT,), packages=_DETECTRON),
    Dimension("multiple_objects", "semantic", files=(_GRIT,), packages=_DETECTRON),
    Dimension("human_action", "semantic", files=(_UMT,)),
    Dimension("color", "semantic", files=(_GRIT,), packages=_DETECTRON),
    Dimension(
        "spatial_relationship", "semantic", files=(_GRIT,), packages=_DETECTRON,
        note="spatial_relationship tells horizontal from vertical, but neither left from right nor "
        "one object from the other",
    ),
    Dimension("scene", "semantic", 0.0, 0.8222, files=(_TAG2TEXT,)),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, files=(_VIT_B,)),
    Dimension("temporal_style", "semantic", 0.0, 0.364, files=_VICLIP, custom=True),
    Dimension("overall_consistency", "semantic", 0.0, 0.364, files=_VICLIP, custom=True),
)  # fmt: skip
DIMENSIONS: dict[str, Dimension] = {it.name: it for it in _ALL}
