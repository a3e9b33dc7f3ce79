"""Wan from an image and with two experts; batches and both ways of guidance."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.calibration import Tally, observed_steps
from kinora.accel.errors import AccelerationError
from kinora.accel.methods import Paro, TopBlocks
from kinora.accel.methods.paro import ParoObserver
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site
from kinora.accel.wrappers import Reuse, Within

Build = Callable[[str], Any]
GRID = 3 * 16 * 16
SIZE = {"width": 128, "height": 128, "num_frames": 9, "output_type": "latent"}


def library() -> Any:
    """diffusers, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


def sparse(method: TopBlocks | None = None) -> Recipe:
    return Recipe(attention=method or TopBlocks(keep=0.5, tile="64x64"), when="always")


class Spied(NamedTuple):
    """A recipe, where it was asked for a plan, and how many items the queries had there."""

    recipe: Recipe
    sites: list[Site]
    items: list[int]


def spying() -> Spied:
    seen: list[Site] = []
    items: list[int] = []

    class Spy(TopBlocks):
        """Notes them."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
            seen.append(site)
            items.append(len(q))
            return super().plan(q, k, site)

    return Spied(sparse(Spy(keep=0.5, tile="64x64")), seen, items)


def denoiser(**changes: Any) -> Any:
    """A transformer of two layers."""
    given: dict[str, Any] = {
        "patch_size": (1, 1, 1),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    return library().WanTransformer3DModel(**{**given, **changes}).eval()


def components(folder: Path) -> dict[str, Any]:
    """Of the tiny pipeline, without its denoiser."""
    pipe = library().DiffusionPipeline.from_pretrained(folder)
    return {name: it for name, it in pipe.components.items() if not name.startswith("transformer")}


def image_encoder() -> dict[str, Any]:
    """Tokens of an image, four and one for the whole."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    side = {"height": 16, "width": 16}
    return {
        "image_encoder": transformers.CLIPVisionModel(config).eval(),
        "image_processor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size=side, do_rescale=False
        ),
    }


def run(pipe: Any, steps: int = 4, **given: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(0), "prompt": "a red circle"}
    return pipe(num_inference_steps=steps, **{**SIZE, **seeded, **given})[0]


@pytest.fixture
def experts(wan_folder: Path) -> Any:
    """Wan 2.2: the first expert has the noisier half of the timesteps."""
    torch.manual_seed(0)
    return library().WanPipeline(
        **components(wan_folder),
        transformer=denoiser(),
        transformer_2=denoiser(),
        boundary_ratio=0.8,
    )


@pytest.fixture(params=["2.1", "2.2", "2.2 with 5 B"])
def from_image(request: pytest.FixtureRequest, wan_folder: Path) -> Any:
    """Wan 2.1 attends to tokens of the image besides; 2.2 has two experts, or a time per token."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"scheduler": library().FlowMatchEulerDiscreteScheduler()}
    if request.param == "2.1":
        options |= image_encoder()
        options["transformer"] = denoiser(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    elif request.param == "2.2":
        options |= {"transformer": denoiser(in_channels=12), "boundary_ratio": 0.8}
        options["transformer_2"] = denoiser(in_channels=12)
    else:
        # Its pipeline expands times as patches of 2 x 2 need.
        options |= {"transformer": denoiser(patch_size=(1, 2, 2)), "expand_timesteps": True}
    return library().WanImageToVideoPipeline(**{**components(wan_folder), **options})


def test_from_an_image_self_attention_alone_is_sparse(from_image: Any) -> None:
    given: dict[str, Any] = {
        "image": torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    }
    dense = run(from_image, **given)
    recipe, seen, _ = spying()
    with accelerate(from_image, recipe) as session:
        out = run(from_image, **given)
    ran = session.receipt.attention
    assert ran is not None and not ran.dense
    assert ran.kernels == {"cpu": 4 * 2 * 2} and session.receipt.steps == 4
    patch = from_image.transformer.config.patch_size[1]
    assert {site.grid.tokens for site in seen} == {GRID // patch**2}
    assert [site.step for site in seen] == [step for step in range(4) for _ in range(4)]
    assert 1e-7 < (out - dense).norm() / dense.norm() < 0.1
    assert torch.equal(run(from_image, **given), dense)


def test_from_an_image_dense_calls_are_bitwise_the_stock_ones(from_image: Any) -> None:
    given: dict[str, Any] = {
        "image": torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    }
    dense = run(from_image, **given)
    with accelerate(from_image, Recipe(attention=TopBlocks(keep=1.0))):
        assert torch.equal(run(from_image, **given), dense)


def test_experts_are_told_apart_and_steps_are_those_of_the_schedule(experts: Any) -> None:
    dense = run(experts, steps=6)
    recipe, seen, _ = spying()
    with accelerate(experts, recipe) as session:
        out = run(experts, steps=6)
    timesteps = experts.scheduler.timesteps
    expert = [0 if t >= 800 else 1 for t in timesteps]
    assert set(expert) == {0, 1}
    assert [(it.step, it.branch, it.layer, it.expert) for it in seen] == [
        (step, branch, layer, expert[step])
        for step in range(6)
        for branch in range(2)
        for layer in range(2)
    ]
    assert all((it.steps, it.layers) == (6, 2) for it in seen)
    ran = session.receipt.attention
    assert ran is not None and ran.layers == 4 and None not in ran.density_by_layer
    assert ran.layer_names == [
        f"{part}.blocks.{layer}.attn1"
        for part in ("transformer", "transformer_2")
        for layer in range(2)
    ]
    assert 1e-7 < (out - dense).norm() / dense.norm() < 0.1


def test_windows_and_plans_go_across_experts(experts: Any) -> None:
    made: list[tuple[int, int]] = []

    class Spy(TopBlocks):
        """Notes steps and experts."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
            made.append((site.step, site.expert))
            return super().plan(q, k, site)

    method = Within(
        method=Reuse(method=Spy(keep=0.5, tile="64x64"), every=100), from_step=0.2, from_layer=1
    )
    with accelerate(experts, Recipe(attention=method, when="always")) as session:
        run(experts, steps=6)
    ran = session.receipt.attention
    assert ran is not None and ran.dense["in the first 20% of the steps"] == 2 * 2 * 2
    switch = next(i for i, t in enumerate(experts.scheduler.timesteps) if t < 800)
    # Each expert makes its own, one for each branch, when it comes first.
    assert made == [(2, 0)] * 2 + [(switch, 1)] * 2


def test_an_expert_that_never_runs_has_no_density(experts: Any) -> None:
    experts.register_to_config(boundary_ratio=0.0)
    with accelerate(experts, sparse()) as session:
        run(experts, steps=2)
    ran = session.receipt.attention
    assert ran is not None and ran.density_by_layer[2:] == [None, None]


@pytest.mark.parametrize(
    ("family", "latents", "branches", "items"),
    [
        ("wan", (4, 3, 16, 16), {0, 1}, 2),
        ("cogvideox", (3, 4, 16, 16), {0}, 4),
        ("sdxl", (4, 32, 64), {0}, 4),
        ("flux", (256, 16), {0}, 2),
    ],
)
def test_a_batch_is_what_its_items_are_alone(
    build: Build, family: str, latents: tuple[int, ...], branches: set[int], items: int
) -> None:
    """Guidance calls once more (Wan), doubles the batch, or is an input of the model (Flux)."""
    model = build(family)
    pipe, recipe = model.pipe, spying()
    pipe.set_progress_bar_config(disable=True)
    given = {**model.arguments, "num_inference_steps": 2, "output_type": "latent"}
    prompts = ["a red circle", "a blue square"]
    noise = torch.randn(2, *latents, generator=torch.Generator().manual_seed(3))
    with accelerate(pipe, recipe.recipe):
        both = pipe(prompts, latents=noise, **given)[0]
        assert {site.branch for site in recipe.sites} == branches
        assert set(recipe.items) == {items}
        alone = [
            pipe(prompt, latents=noise[i : i + 1], **given)[0] for i, prompt in enumerate(prompts)
        ]
    assert (both - torch.cat(alone)).norm() < 1e-5 * both.norm()


def test_paro_learns_of_each_expert_in_its_turn(experts: Any, tmp_path: Path) -> None:
    observer = ParoObserver(tally := Tally(keep=0.4))
    with accelerate(experts, Recipe(attention=observer, when="always")):
        run(experts, steps=8)
    assert observer.last is not None
    made = tally.finish("two", observer.last)
    assert (made.experts, made.layers, len(made.orders)) == (2, 2, 4)
    expert = [0 if t >= 800 else 1 for t in experts.scheduler.timesteps]
    turns = [expert[step] for step in observed_steps(8)]
    last = turns.index(1) - 1
    assert turns[0] == 0 and turns[-1] == 1 and last >= 0
    for layer in (0, 1):  # what has no turn borrows the nearest that had one
        assert torch.equal(made.mask(3, layer), made.mask(last, layer))
        assert torch.equal(made.mask(0, 2 + layer), made.mask(last + 1, 2 + layer))
        assert not torch.equal(made.mask(3, layer), made.mask(3, 2 + layer))
    path = tmp_path / "paro.npz"
    path.write_bytes(made.to_bytes())
    recipe = Recipe(attention=Paro(calibration=str(path)), when="always")
    with accelerate(experts, recipe) as session:
        run(experts, steps=8)
    ran = session.receipt.attention
    assert ran is not None and not ran.dense and ran.density < 0.6
    one = dataclasses.replace(made, experts=1, orders=made.orders[:2], packed=made.packed[:, :2],
                              incoherence=made.incoherence[:2])  # fmt: skip
    path.write_bytes(one.to_bytes())
    with accelerate(experts, recipe), pytest.raises(AccelerationError, match="has one denoiser"):
        run(experts, steps=8)
