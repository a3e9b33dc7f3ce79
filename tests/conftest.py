"""Fixtures for the whole suite: tiny random pipelines of four families, saved once a session."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

# Tiny tensors on two cores that others use too: a second thread costs more than it gives, and waits
# for the first in a loop. Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when it is imported whether it runs its kernels in Python. On a GPU: 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Its releases announce a change of default that means nothing here.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right", "over", "black")
SIZES: dict[str, tuple[int, int, int]] = {
    "wan": (32, 32, 5),
    "cogvideox": (32, 32, 9),
    "flux": (32, 32, 1),
    "sdxl": (32, 32, 1),
}
"""Family → a small (width, height, frames) that it takes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now is left out of garbage collections, of which reading a video is one.

    In a process with all tests they took half a second each.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Some extensions report a leak of what is frozen as Python ends."""
    gc.unfreeze()


def diffusers() -> Any:
    """The library, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


def transformers() -> Any:
    """The library, untyped."""
    return importlib.import_module("transformers")


def word_tokenizer(length: int) -> Any:
    """A tokenizer that knows `WORDS` and nothing else."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def byte_tokenizer(length: int) -> Any:
    """A tokenizer that can spell anything, as those of real models can."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(("<pad>", "</s>", *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )


def t5_encoder(kind: str) -> Any:
    """A one-layer T5 or UMT5 encoder of width 16."""
    config = getattr(transformers(), f"{kind}Config")(
        vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return getattr(transformers(), f"{kind}EncoderModel")(config).eval()


def clip_encoder(*, projection: bool) -> Any:
    """A one-layer CLIP text encoder of width 16."""
    config = transformers().CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return getattr(transformers(), name)(config).eval()


def image_vae(channels: int) -> Any:
    """A two-level image autoencoder: two pixels a latent."""
    return diffusers().AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        shift_factor=0.1,
    )


def wan() -> Any:
    """A WanPipeline with a vocabulary of words, like `kinora-tiny`."""
    return diffusers().WanPipeline(
        tokenizer=word_tokenizer(32),
        text_encoder=t5_encoder("UMT5"),
        transformer=diffusers().WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        ),
        vae=diffusers().AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=diffusers().UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def cogvideox() -> Any:
    """A CogVideoXPipeline."""
    return diffusers().CogVideoXPipeline(
        tokenizer=byte_tokenizer(226),
        text_encoder=t5_encoder("T5"),
        transformer=diffusers().CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            max_text_seq_length=226,
        ),
        vae=diffusers().AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers().CogVideoXDDIMScheduler(),
    )


def flux() -> Any:
    """A FluxPipeline."""
    return diffusers().FluxPipeline(
        scheduler=diffusers().FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(4),
        text_encoder=clip_encoder(projection=False),
        tokenizer=byte_tokenizer(77),
        text_encoder_2=t5_encoder("T5"),
        tokenizer_2=byte_tokenizer(512),
        transformer=diffusers().FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def sdxl() -> Any:
    """A StableDiffusionXLPipeline."""
    return diffusers().StableDiffusionXLPipeline(
        vae=image_vae(4),
        text_encoder=clip_encoder(projection=False),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer=byte_tokenizer(77),
        tokenizer_2=byte_tokenizer(77),
        unet=diffusers().UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + 16,
            cross_attention_dim=32,
            norm_num_groups=4,
        ),
        scheduler=diffusers().EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def wan_from_image() -> Any:
    """A WanImageToVideoPipeline as of 2.1: an image is encoded to five tokens besides."""
    parts = wan().components
    config = parts["transformer"].config
    vision = transformers().CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    side = {"height": 16, "width": 16}
    parts["transformer"] = diffusers().WanTransformer3DModel.from_config(
        config, in_channels=12, image_dim=16, added_kv_proj_dim=24
    )
    parts["image_encoder"] = transformers().CLIPVisionModel(vision).eval()
    parts["image_processor"] = transformers().CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size=side
    )
    known = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    known += ("image_encoder", "image_processor")
    return diffusers().WanImageToVideoPipeline(**{name: parts[name] for name in known})


BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "cogvideox": cogvideox,
    "flux": flux,
    "sdxl": sdxl,
}


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def chromium() -> Generator[Any, None, None]:
    """Chromium without a window, driven by Playwright, whose loop other modules do without."""
    driven = "the browser is driven by Playwright: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=driven)
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("there is no Chromium to drive: apt-get install -y chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder of a tiny random pipeline, saved as safetensors."""
    import torch

    root = tmp_path_factory.mktemp("models")
    folders: dict[str, Path] = {}
    for family, build in BUILDERS.items():
        torch.manual_seed(0)
        folders[family] = root / family
        build().save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def from_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline that makes videos from an image."""
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("from-image") / "wan-i2v"
    wan_from_image().save_pretrained(folder)
    return folder


@pytest.fixture
def unknown_folder(wan_folder: Path, tmp_path: Path) -> Path:
    """The tiny Wan pipeline with a denoiser of a class of which nothing is known."""
    path = tmp_path / "unknown"
    shutil.copytree(wan_folder, path)
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("WanTransformer3DModel", "PixArtTransformer2DModel"))
    return path


@pytest.fixture(scope="session")
def wan_folder(model_folders: dict[str, Path]) -> Path:
    """The tiny Wan pipeline: the one most tests use."""
    return model_folders["wan"]
