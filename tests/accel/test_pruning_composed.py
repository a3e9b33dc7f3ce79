"""Pruned steps beside attention methods, experts and guidance that changes; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate, blocks, pruning
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site
from kinora.accel.steps import Compute, Schedule
from kinora.accel.wrappers import Reuse

from .conftest import Loop, diffusers
from .test_pruning import LETTERS, STEPS, Always, pruned, run
from .test_skipping_pipelines import PIPELINES, Made, music, stable_diffusion_3

Build = Callable[[str], Any]
DENSE = "between the kept tokens of a pruned step"


@pytest.fixture(params=["wan", "flux", "cogvideox", "unet"])
def model(request: pytest.FixtureRequest, build: Build) -> Any:
    return build(request.param)


def sparse(**options: Any) -> Recipe:
    method = TopBlocks(keep=0.5, tile="64x64")
    return Recipe(attention=Reuse(method=method, every=3), when="always", steps=Always(**options))


def test_attention_between_kept_tokens_is_dense_and_told(model: Any):
    with accelerate(model, sparse(prune=True), strict=True) as session:
        out = model(steps=STEPS)
    told, ran = session.receipt.attention, session.receipt.policy
    assert told is not None and ran is not None and ran.pattern == LETTERS
    counted = sum(it.sees != "other" for it in _attentions(model))
    at_top = sum(it.sees != "other" and it.halvings == 0 for it in _attentions(model))
    calls = ran.calls // STEPS
    assert told.calls == STEPS * calls * counted and not told.fallbacks
    assert told.dense[DENSE] == 6 * calls * at_top
    # What is not pruned, as a UNet's coarser levels, keeps its plans in these steps.
    assert sum(told.kernels.values()) == told.calls - told.dense[DENSE] - sum(
        count for reason, count in told.dense.items() if reason != DENSE
    )
    assert out.isfinite().all()


def _attentions(model: Any) -> list[Any]:
    from kinora.accel.attach.families import FAMILIES

    return FAMILIES[type(model.denoiser).__name__].attentions(model.denoiser)


def test_a_plan_is_as_old_as_the_steps_that_used_it(build: Build, monkeypatch: pytest.MonkeyPatch):
    """With `every = 3`: made in steps 0 and 3, and in 8, the second that uses it after 4."""
    made: list[Site] = []
    plan = TopBlocks.plan

    def noted(self: Any, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
        made.append(site)
        return plan(self, q, k, site)

    monkeypatch.setattr(TopBlocks, "plan", noted)
    model = build("ltx")
    with accelerate(model, sparse(prune=True)) as session:
        model(steps=STEPS)
    assert session.receipt.policy is not None and session.receipt.policy.pattern == LETTERS
    whole = [i for i, letter in enumerate(LETTERS) if letter == "C"]
    assert [it.step for it in made if it.layer == 0] == whole[::3]


def test_levels_of_a_unet_that_are_not_pruned_plan_as_without(
    build: Build, monkeypatch: pytest.MonkeyPatch
):
    made: list[Site] = []
    plan = TopBlocks.plan

    def noted(self: Any, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
        made.append(site)
        return plan(self, q, k, site)

    monkeypatch.setattr(TopBlocks, "plan", noted)
    with accelerate(model := build("unet"), sparse(prune=True)):
        model(steps=STEPS)
    by_grid: dict[int, set[int]] = {}
    for it in made:
        by_grid.setdefault(it.grid.tokens, set()).add(it.step)
    whole = [i for i, letter in enumerate(LETTERS) if letter == "C"]
    assert by_grid[2048] == set(whole[::3])
    assert by_grid[512] == set(range(0, STEPS, 3))


@dataclass
class Late(Loop):
    """A pipeline that calls once more from step 6 on, and with one item instead of two from 11."""

    def __call__(self, steps: int = 3, seed: int = 0, callback: Any = None) -> torch.Tensor:
        del callback
        x = torch.randn(self.latents, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            with torch.no_grad():
                outs = [self.called(x, t, 2 if i < 11 else 1)]
                if i >= 6:
                    outs.append(self.called(x, t, 1))
            x = self.scheduler.step(sum(outs) / len(outs), t, x, return_dict=False)[0]
        return x

    def called(self, x: torch.Tensor, t: torch.Tensor, items: int) -> torch.Tensor:
        given = {k: torch.cat([v] * items) if torch.is_tensor(v) else v
                 for k, v in self.arguments.items()}  # fmt: skip
        given |= {"hidden_states": torch.cat([x] * items), "timestep": t.expand(items)}
        return self.transformer(**given, return_dict=False)[0][:1]


def test_a_branch_of_which_nothing_is_kept_runs_on_all_tokens(build: Build):
    """One that begins in a pruned step, and one whose batch has changed in one."""
    loop = build("sd3")
    late = Late(loop.transformer, loop.scheduler, loop.latents, loop.arguments)
    tokens: list[tuple[int, int]] = []

    def count(_: Any, __: Any, kwargs: Any) -> None:
        tokens.append(tuple(kwargs["hidden_states"].shape[:2]))

    handle = loop.transformer.transformer_blocks[1].register_forward_pre_hook(
        count, with_kwargs=True
    )
    out, told = run(late, pruned())
    handle.remove()
    assert told.pattern == LETTERS == "CCCCCpppCpppCC" and out.isfinite().all()
    of_step = [[tokens.pop(0) for _ in range(1 if i < 6 else 2)] for i in range(STEPS)]
    assert not tokens
    for step, calls in enumerate(of_step):
        whole = [count == 512 for _, count in calls]
        if LETTERS[step] == "C":
            assert all(whole)
        elif step == 5:
            assert whole == [False]
        elif step == 6:
            assert whole == [False, True], "nothing is kept of the new branch"
        elif step == 11:
            assert calls[0][0] == 1 and whole == [True, False]
        else:
            assert whole == [False, False]


def test_each_expert_keeps_its_own(model_folders: dict[str, Path]):
    lib = diffusers()
    pipe = lib.DiffusionPipeline.from_pretrained(model_folders["wan"])
    torch.manual_seed(0)
    other = type(pipe.transformer).from_config(dict(pipe.transformer.config)).eval()
    pipe = lib.WanPipeline(**{**pipe.components, "transformer_2": other}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)

    def made() -> torch.Tensor:
        return pipe(
            "a red circle", height=64, width=64, num_frames=5, num_inference_steps=24,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    full = made()
    with accelerate(pipe, pruned(prune_cell=1)) as session:
        assert torch.equal(made(), full)
    ran = session.receipt.policy
    switch = sum(t >= 900 for t in pipe.scheduler.timesteps)
    assert ran is not None and 5 < switch < 11
    assert ran.pattern[5:switch] == "p" * min(3, switch - 5) + "C" * max(0, switch - 8)
    assert ran.pattern[switch] == "C", "the first of an expert is whole"
    with accelerate(pipe, pruned()):
        once, again = made(), made()
    assert torch.equal(once, again) and not torch.equal(once, full)


@pytest.mark.parametrize("make", PIPELINES, ids=lambda it: it.__name__)
def test_guidance_of_each_kind_keeps_a_past_of_its_own(
    make: Callable[[Build, Any], Made], build: Build, model_folders: dict[str, Path]
):
    """In one batch, in calls of its own, and by skipped layers in a third call."""
    vae = diffusers().AutoencoderKL.from_pretrained(model_folders["sdxl"] / "vae")
    pipe, given = make(build, vae)
    pipe.set_progress_bar_config(disable=True)
    if make is not music:
        given |= {"height": 64, "width": 64}
    if make is stable_diffusion_3:
        given["skip_layer_guidance_stop"] = 0.7  # after step 9, which is pruned

    def made() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        fixed: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
        return pipe(generator=generator, **fixed, **given)[0]

    full = made()
    with accelerate(pipe, pruned(prune_cell=1)) as session:
        out = made()
    told = session.receipt.policy
    assert told is not None and told.pattern == LETTERS and torch.equal(out, full)
    with accelerate(pipe, pruned(prune_threshold=100.0)) as session:
        once, again = made(), made()
    told = session.receipt.policy
    assert told is not None and told.kept is not None and told.kept < 0.6
    assert once.isfinite().all() and torch.equal(once, again) and not torch.equal(once, full)


@pytest.mark.parametrize("first", [True, False])
def test_text_beside_the_tokens_stays(first: bool):
    kept = blocks.Kept(torch.tensor([0, 3]), 4, text_first=first)
    value = torch.arange(7)
    expected = [0, 1, 2, 3, 6] if first else [0, 3, 4, 5, 6]
    assert kept.of(value, 0).tolist() == expected
    assert [it.tolist() for it in kept.of((value, value), 0)] == [expected] * 2
    assert kept.of(None, 0) is None and torch.equal(kept.of(value[:1], 0), value[:1])
    with pytest.raises(AccelerationError, match=r"given \[3\] for 4 tokens"):
        kept.of(value[:3], 0)


# --- refused ----------------------------------------------------------------------------------


def refused(model: Any, told: str, *, in_run: bool = False) -> None:
    """Before the run or at its first call, and what is left is as it was."""
    before = [set(vars(it)) for it in model.denoiser.modules()]
    with pytest.raises(AccelerationError, match=told) as caught, accelerate(model, pruned()):
        if not in_run:
            pytest.fail("it was let in")
        model(steps=STEPS)
    assert "leave steps.prune out" in str(caught.value) and "\n" not in str(caught.value)
    assert [set(vars(it)) - {"_diffusers_hook"} for it in model.denoiser.modules()] == [
        it - {"_diffusers_hook"} for it in before
    ]


def test_blocks_that_are_not_known_are_refused(build: Build):
    model = build("sd3")
    model.transformer = diffusers().PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        norm_num_groups=4, cross_attention_dim=16, caption_channels=16, sample_size=16,
        use_additional_conditions=False,
    )  # fmt: skip
    refused(model, "PixArtTransformer2DModel cannot be pruned: its blocks are not known, only")


def test_a_first_frame_that_is_treated_otherwise_is_refused(build: Build):
    model = build("hunyuan")
    model.transformer.register_to_config(image_condition_type="token_replace")
    refused(model, "treat the tokens of the first frame otherwise")


def test_pictures_in_layers_and_unets_without_transformers_are_refused(build: Build):
    model = build("qwen")
    model.transformer.register_to_config(use_layer3d_rope=True)
    refused(model, "it has layers of pictures")
    none = diffusers().UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpBlock2D",) * 2, mid_block_type=None, cross_attention_dim=8,
        layers_per_block=1, attention_head_dim=2,
    )  # fmt: skip
    model = build("unet")
    model.unet = none
    refused(model, "UNet2DConditionModel cannot be pruned: it has no transformer blocks")


@pytest.mark.parametrize("part", ["denoiser", "block"])
def test_what_is_compiled_is_refused(build: Build, part: str, monkeypatch: pytest.MonkeyPatch):
    model = build("ltx")
    module = model.transformer if part == "denoiser" else model.transformer.transformer_blocks[1]
    monkeypatch.setitem(vars(module), "_compiled_call_impl", module._call_impl)
    refused(model, "LTXVideoTransformer3DModel cannot be pruned: it is compiled")


def test_several_processes_and_chunks_are_refused(build: Build):
    model = build("wan")
    model.transformer._parallel_config = SimpleNamespace()
    refused(model, "shared by several processes")
    model = build("sd3")
    model.transformer.enable_forward_chunking(chunk_size=2, dim=1)
    refused(model, r"chunks of one size: call disable_forward_chunking\(\)")


def test_residuals_between_blocks_are_refused(build: Build):
    """Those of a ControlNet beside a transformer, and masks of IP adapters."""
    model = build("sd3")
    model.arguments["block_controlnet_hidden_states"] = [torch.zeros(1, 128 * 4, 20)] * 2
    refused(model, "is given block_controlnet_hidden_states, which is of all tokens", in_run=True)
    model = build("unet")
    model.arguments["cross_attention_kwargs"] = {"ip_adapter_masks": torch.zeros(1)}
    refused(model, "is given ip_adapter_masks", in_run=True)


def test_more_tokens_than_the_grid_are_refused(build: Build):
    """Flux with a second picture beside that which is made."""
    model = build("ltx")
    model.arguments["height"] = 4
    model.arguments["video_coords"] = torch.zeros(1, 3, 512)
    refused(model, r"given 512 tokens, which are no grid of 256", in_run=True)


def test_what_the_device_has_no_room_for_is_refused_with_the_figure(
    build: Build, monkeypatch: pytest.MonkeyPatch
):
    model = build("ltx")
    needed = 512 * 16 * 4
    monkeypatch.setattr(pruning, "_left", lambda _: needed - 1)
    refused(model, r"pruning keeps 0\.00 GB of tokens for each call of LTX.*0\.00 GB", in_run=True)
    monkeypatch.setattr(pruning, "_left", lambda _: needed)
    assert run(model, pruned())[1].cache_bytes == needed
    config = model.transformer.config
    grid = TokenGrid(1, 1000, 1000)
    found = pruning.cache_bytes("LTXVideoTransformer3DModel", config, grid, 2, items=2)
    assert found == 10**6 * 16 * 2 * 2


class Calm(Always):
    """No step of it is unstable."""

    def start(self, schedule: Schedule) -> Any:
        """See `StepPolicy`."""
        ran = super().start(schedule)
        ran.decide = lambda *_: Compute()
        return ran


def test_a_run_in_which_nothing_was_pruned_says_so(build: Build):
    _, told = run(build("ltx"), Recipe(steps=Calm(prune=True)))
    assert told.pattern == "C" * STEPS and told.kept is None
    assert "inert: no step was pruned: none was unstable right after" in "\n".join(told.words())
    _, off = run(build("ltx"), Recipe(steps=Calm()))
    assert not off.inert


def test_strict_refuses_a_run_in_which_nothing_was_pruned(build: Build):
    model = build("ltx")
    with pytest.raises(AccelerationError, match=r"strict: no step was pruned.*--no-strict"):
        run(model, Recipe(steps=Calm(prune=True)), strict=True)
    _, told = run(model, Recipe(steps=Calm()), strict=True)
    assert told.pattern == "C" * STEPS
    assert run(model, pruned(), strict=True)[1].kept
