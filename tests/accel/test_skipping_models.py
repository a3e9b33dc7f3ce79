"""Step policies on pipelines with a ControlNet, with two experts, and of denoisers not known."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.methods import TopBlocks
from kinora.accel.policies import Pattern
from kinora.accel.recipe import Recipe

from .test_pruning import Always

Folders = dict[str, Path]
STEPS = 16
LETTERS = "CCCCsCsCsCsCsCCC"


def library() -> Any:
    """diffusers, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


def components(folder: Path) -> dict[str, Any]:
    return library().DiffusionPipeline.from_pretrained(folder).components


def run(pipe: Any, **given: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    fixed = {"prompt": "a red circle", "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(generator=torch.Generator().manual_seed(0), **{**fixed, **given})[0]


def counted(module: Any) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(params=["one", "two"])
def controlled(request: pytest.FixtureRequest, model_folders: Folders) -> Any:
    """SDXL with one ControlNet, or two whose results are added."""
    parts = components(model_folders["sdxl"])
    torch.manual_seed(0)
    made: list[Any] = []
    for _ in range(1 if request.param == "one" else 2):
        net = library().ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(4, 8)
        )
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        made.append(net.eval())
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    return library().StableDiffusionXLControlNetPipeline(
        **{name: parts[name] for name in (*names, "scheduler")},
        controlnet=made[0] if request.param == "one" else made,
        add_watermarker=False,
    )


@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnet_is_skipped_with_its_denoiser(controlled: Any, guess: bool):
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    several = hasattr(controlled.controlnet, "nets")
    given: dict[str, Any] = {
        "image": [picture, picture] if several else picture,
        "guess_mode": guess,
        "height": 32,
        "width": 32,
    }
    nets = list(controlled.controlnet.nets) if several else [controlled.controlnet]
    calls, evaluated = [counted(net) for net in nets], counted(controlled.unet)
    full = run(controlled, **given)
    assert [len(it) for it in calls] == [STEPS] * len(nets) and len(evaluated) == STEPS
    plain = run(controlled, **{**given, "controlnet_conditioning_scale": 0.0})
    assert not torch.equal(full, plain), "the ControlNet does something here"
    for it in (*calls, evaluated):
        it.clear()
    with accelerate(controlled, Recipe(steps=Pattern())) as session:
        out = run(controlled, **given)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS
    assert [len(it) for it in calls] == [11] * len(nets) and len(evaluated) == 11
    assert out.isfinite().all() and not torch.equal(out, full)

    # Its results are for evaluated steps only: called in all, they change nothing.
    control = controlled.controlnet
    with accelerate(controlled, Recipe(steps=Pattern())):
        entry = vars(control).pop("_compiled_call_impl")
        assert torch.equal(run(controlled, **given), out)
        vars(control)["_compiled_call_impl"] = entry
    assert torch.equal(run(controlled, **given), full)


def test_a_controlnet_beside_a_unet_goes_on_in_pruned_steps(controlled: Any):
    several = hasattr(controlled.controlnet, "nets")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = {"image": [picture, picture] if several else picture, "height": 32, "width": 32}
    full, calls = run(controlled, **given), counted(controlled.unet)
    with accelerate(controlled, Recipe(steps=Always(prune=True, prune_cell=1))) as session:
        assert torch.equal(run(controlled, **given), full)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern.count("p") == 6 and len(calls) == STEPS


def test_a_recipe_for_attention_leaves_a_controlnet_alone(controlled: Any):
    recipe = Recipe(attention=TopBlocks(keep=0.5, tile="64x64"), when="always")
    with accelerate(controlled, recipe):
        assert "_compiled_call_impl" not in vars(controlled.controlnet)


def expert(layers: int = 1) -> Any:
    return library().WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
    )


def test_what_one_expert_did_says_nothing_of_the_other(model_folders: Folders):
    """The first three steps of each are evaluated; nothing is told from the other's outputs."""
    parts = components(model_folders["wan"])
    torch.manual_seed(0)
    pipe = library().WanPipeline(
        **{**parts, "transformer": expert().eval(), "transformer_2": expert().eval()},
        boundary_ratio=0.8,
    )
    first, second = counted(pipe.transformer), counted(pipe.transformer_2)
    given: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 24}
    with accelerate(pipe, Recipe(steps=Pattern(from_step=0.0))) as session:
        out = run(pipe, **given)
        again = run(pipe, **given)
    switch = sum(t >= 800 for t in pipe.scheduler.timesteps)
    ran = session.receipt.policy
    assert ran is not None and 3 < switch < 18
    assert ran.pattern[:3] == ran.pattern[switch : switch + 3] == ran.pattern[-3:] == "CCC"
    assert ran.pattern[3:switch].count("s") >= 1 and ran.pattern[switch:].count("s") >= 3
    assert len(first) == 4 * ran.pattern[:switch].count("C")
    assert len(second) == 4 * ran.pattern[switch:].count("C")
    # In the second run both have run before, which must not show.
    assert torch.equal(out, again)


@pytest.fixture
def pixart(model_folders: Folders) -> Any:
    """A denoiser of no known family, whose pipeline drops half of its channels, a variance."""
    text, vae = components(model_folders["cogvideox"]), components(model_folders["sdxl"])["vae"]
    torch.manual_seed(0)
    denoiser = library().PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        patch_size=2,
        use_additional_conditions=False,
    )
    return library().PixArtAlphaPipeline(
        tokenizer=text["tokenizer"],
        text_encoder=text["text_encoder"],
        vae=vae,
        transformer=denoiser.eval(),
        scheduler=library().DPMSolverMultistepScheduler(),
    )


def test_any_denoiser_can_be_skipped(pixart: Any):
    given: dict[str, Any] = {
        "height": 32,
        "width": 32,
        "clean_caption": False,
        "use_resolution_binning": False,
        "max_sequence_length": 20,
    }
    calls, full = counted(pixart.transformer), run(pixart, **given)
    calls.clear()
    with accelerate(pixart, Recipe(steps=Pattern())) as session:
        out = run(pixart, **given)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS and len(calls) == ran.calls == 11
    assert not torch.equal(out, full) and out.isfinite().all()
    with (
        pytest.raises(AccelerationError, match="attention of PixArtTransformer2DModel cannot"),
        accelerate(pixart, Recipe(attention=TopBlocks(), steps=Pattern())),
    ):
        pytest.fail("its attention is not known")


@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_of_any_strength_hands_on_one_output(
    model_folders: Folders, guidance: float, rescale: float
):
    """Without guidance, with it, and with its spread rescaled, of several pictures at once."""
    pipe = library().DiffusionPipeline.from_pretrained(model_folders["sdxl"])
    with accelerate(pipe, Recipe(steps=Pattern())) as session:
        out = run(
            pipe, height=32, width=32, guidance_scale=guidance, guidance_rescale=rescale,
            num_images_per_prompt=2,
        )  # fmt: skip
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS and out.shape[0] == 2


def test_a_compiled_denoiser_is_skipped_too(
    model_folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    pipe = library().DiffusionPipeline.from_pretrained(model_folders["wan"])
    given: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}
    with accelerate(pipe, Recipe(steps=Pattern())):
        expected = run(pipe, **given)
    calls: list[int] = []
    call: Callable[..., Any] = pipe.transformer._call_impl
    compiled = lambda *a, **k: (calls.append(1), call(*a, **k))[1]  # noqa: E731
    monkeypatch.setitem(vars(pipe.transformer), "_compiled_call_impl", compiled)
    with accelerate(pipe, Recipe(steps=Pattern())):
        assert torch.equal(run(pipe, **given), expected)
    assert len(calls) == 2 * 11
