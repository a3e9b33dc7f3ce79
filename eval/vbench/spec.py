"""What VBench consists of: dimensions, ranges, weights of scores, and files of weights.

Ranges and weights are those of the leaderboard (`scripts/constant.py` of Vchitect/VBench), file
names those that the packages look for under their caches (those that they read from torch's are
linked there). Where a published address is dead or has moved, the one that the repository's head
uses stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..weights import WeightFile

_USED = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension: its group, range and weight in the total, and what it needs.

    `custom` says whether it means anything of videos of other prompts. `note` is what must be said
    beside its score. `images` says whether it compares with the images that videos were made from;
    `by_prompt` whether it scores all videos of a prompt as one. Without a weight it is in no total.
    """

    name: str
    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    files: tuple[WeightFile, ...] = ()
    packages: tuple[str, ...] = ()
    custom: bool = False
    note: str = ""
    images: bool = False
    by_prompt: bool = False


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
    "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/"
    "sa_0_4_vit_l_14_linear.pth",
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
FLICKER = "temporal_flickering"
STILL_FILES = (_RAFT,)
"""What the filter for still videos needs."""
STILL_SAMPLES = 25
"""Videos of each prompt that VBench asks for where they are filtered, to score five."""
DIMENSIONS: dict[str, Dimension] = {it.name: it for it in _ALL}
"""Of VBench."""

_COTRACKER = (
    WeightFile(
        "cotracker_model/cotracker2.pth",
        "https://huggingface.co/facebook/cotracker/resolve/main/cotracker2.pth",
        "about 180 MB", "CC BY-NC 4.0",
    ),
    WeightFile(
        "cotracker_model/facebookresearch_co-tracker_main/hubconf.py",
        "https://github.com/facebookresearch/co-tracker", "under 100 MB", "CC BY-NC 4.0",
    ),
)  # fmt: skip
_DREAMSIM = WeightFile(
    "dreamsim_model/ensemble_lora/adapter_config.json",
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
    "dreamsim_ensemble_checkpoint.zip",
    "about 1.3 GB", "MIT",
)  # fmt: skip
_SHARED = ("subject_consistency", "background_consistency", "motion_smoothness",
           "dynamic_degree", "aesthetic_quality", "imaging_quality")  # fmt: skip

_ALL_I2V = (
    Dimension("i2v_subject", "i2v", 0.1462, files=(_DINO, _DINO_CODE), images=True),
    Dimension(
        "i2v_background", "i2v", 0.2615, files=(_DREAMSIM, _DINO, _DINO_CODE),
        packages=("dreamsim",), images=True,
    ),
    Dimension(
        "camera_motion", "i2v", weight=0.1, files=_COTRACKER,
        packages=("vbench2_beta_i2v.third_party.cotracker",),
    ),
    *(replace(DIMENSIONS[name], custom=False) for name in _SHARED),
    replace(DIMENSIONS["temporal_flickering"], weight=0.0, custom=False),
)  # fmt: skip
I2V_DIMENSIONS: dict[str, Dimension] = {it.name: it for it in _ALL_I2V}
"""Of VBench-I2V, which leaves flickering out of its totals."""

_HUB = "https://huggingface.co"
_DRIVE = "https://drive.google.com/uc?export=download&id="
_LLAVA = WeightFile(
    "lmms-lab/LLaVA-Video-7B-Qwen2/config.json", f"{_HUB}/lmms-lab/LLaVA-Video-7B-Qwen2",
    "about 16 GB", "Apache-2.0",
)  # fmt: skip
_QWEN = WeightFile(
    "Qwen/Qwen2.5-7B-Instruct/config.json", f"{_HUB}/Qwen/Qwen2.5-7B-Instruct",
    "about 15 GB", "Apache-2.0",
)  # fmt: skip
_ARCFACE = WeightFile(
    "arcface/resnet18_110.pth", f"{_DRIVE}1m387vGTQ4GW4I4PQfBsCC-Y9aEp6zjvy", None, None
)
_RETINAFACE = WeightFile(
    "retinaface_model/retinaface_resnet50_2020-07-20-f168fae3c.zip",
    "https://github.com/ternaus/retinaface/releases/download/0.01/"
    "retinaface_resnet50_2020-07-20-f168fae3c.zip",
    "about 100 MB", "MIT",
)  # fmt: skip
_VGG = WeightFile(
    "vgg_model/vgg19-dcbb9e9d.pth", "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "about 570 MB", "BSD-3-Clause",
)  # fmt: skip
_INSTANCES = WeightFile(
    "instance_anomaly_detector/model/config.json",
    "https://drive.google.com/drive/folders/106rnzZvH-VUKkz8dMPFflD6tqtbSgXwh", None, None,
)  # fmt: skip
_ANATOMY = (
    WeightFile(
        "YOLO-World/yolo_world_v2_xl_obj365v1_goldg_cc3mlite_pretrain-5daf1395.pth",
        f"{_DRIVE}1qo-K1kum7yiEwIlN1TWDvABXX6qriUen", None, "GPL-3.0",
    ),
    *(
        WeightFile(f"anomaly_detector/{part}.pth", f"{_DRIVE}{key}", None, None)
        for part, key in (
            ("human", "1mlSURYOi_vN9ST1wzEhJaVO6-ZoES8UT"),
            ("face", "1e2qTjrtsYlkWLql0qj8DqaNZ09KuV8Qo"),
            ("hand", "1j3QeAcAtdLe5BFgK-c33UaHV6-iUto0i"),
        )
    ),
)  # fmt: skip
_ASK = (_LLAVA,)
_ASK_TWO = (_LLAVA, _QWEN)

_ALL_2 = (
    Dimension("Diversity", "creativity", files=(_VGG,), by_prompt=True),
    Dimension("Composition", "creativity", files=_ASK),
    Dimension("Motion_Rationality", "commonsense", files=_ASK),
    Dimension("Instance_Preservation", "commonsense", files=(_INSTANCES,)),
    Dimension("Dynamic_Spatial_Relationship", "controllability", files=_ASK),
    Dimension("Dynamic_Attribute", "controllability", files=_ASK),
    Dimension("Motion_Order_Understanding", "controllability", files=_ASK_TWO),
    Dimension("Human_Interaction", "controllability", files=_ASK_TWO),
    Dimension("Complex_Landscape", "controllability", files=_ASK_TWO),
    Dimension("Complex_Plot", "controllability", files=_ASK_TWO),
    Dimension("Camera_Motion", "controllability", files=_COTRACKER),
    Dimension("Human_Anatomy", "human_fidelity", files=_ANATOMY, custom=True),
    Dimension("Human_Identity", "human_fidelity", files=(_ARCFACE, _RETINAFACE), custom=True),
    Dimension("Human_Clothes", "human_fidelity", files=_ASK, custom=True),
    Dimension("Mechanics", "physics", files=_ASK),
    Dimension("Thermotics", "physics", files=_ASK),
    Dimension("Material", "physics", files=_ASK),
    Dimension("Multi-View_Consistency", "physics", files=(_RAFT, *_COTRACKER), custom=True),
)
DIMENSIONS_2: dict[str, Dimension] = {it.name: it for it in _ALL_2}
"""Of VBench-2.0, all of equal weight within their group, and groups of equal weight."""
