"""Step policies on every family: what the scheduler gets, and what is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.errors import AccelerationError
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import TopBlocks
from kinora.accel.policies import Pattern, Sada, Shadow
from kinora.accel.policies.skipping import lagrange
from kinora.accel.receipt import Receipt
from kinora.accel.recipe import Recipe, changed, find
from kinora.accel.site import Site
from kinora.accel.steps import Compute, Schedule, Skip, Step, StepPolicy
from kinora.accel.wrappers import Reuse, Within

from .sampling import spied

Build = Callable[[str], Any]
STEPS = 16
LETTERS = "CCCCsCsCsCsCsCCC"
"""Of the policy `Pattern()` in so many steps."""


class EverySecond(StepPolicy):
    """Repeats what the scheduler got last, in every second step."""

    name: ClassVar[str] = "every-second"

    def start(self, schedule: Schedule) -> Any:
        return _EverySecond()


class _EverySecond:
    def __init__(self) -> None:
        self.last: torch.Tensor | None = None

    def decide(self, step: Step, sample: torch.Tensor | None) -> Compute | Skip:
        if step.index % 2 == 0:
            return Compute()
        assert self.last is not None and sample is not None
        return Skip(self.last)

    def observe(self, step: Step, output: Any, sample: Any, *, computed: bool) -> None:
        assert sample.shape == output.shape
        self.last = output

    def errors(self) -> list[float]:
        return []


def counted(module: Any) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_skipped_step_gives_the_scheduler_what_the_policy_says(model: Any):
    """Guidance, batched or not, hands on exactly the policy's output."""
    calls = counted(model.denoiser)
    with spied(model.scheduler) as got:
        model(steps=4)
        dense, _ = len(calls), got.clear()
        calls.clear()
        with accelerate(model, Recipe(steps=EverySecond())) as session:
            model(steps=4)
    outputs = [output for output, _ in got]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[1], outputs[2])
    assert len(calls) == dense // 2
    assert (session.receipt.steps, session.receipt.skipped) == (4, 2)
    assert session.receipt.words() == [
        "asked: steps by every-second",
        f"ran: 2 of 4 steps evaluated in {len(calls)} calls of the denoiser, 2 skipped: CsCs",
    ]


def test_what_stands_for_a_step_is_told_from_guided_outputs(model: Any):
    """Worked out again from what the scheduler got: x0 on a line through the last two evaluated."""
    calls = counted(model.denoiser)
    with spied(model.scheduler) as got:
        full = model(steps=STEPS)
        stock, _ = len(calls), got.clear()
        calls.clear()
        with accelerate(model, Recipe(steps=Pattern())) as session:
            out = model(steps=STEPS)
            schedule = schedule_of(model.scheduler)
    assert not schedule.why_raw
    x0s = [schedule.estimate(m, x, i) for i, (m, x) in enumerate(got)]
    shares = [it.share for it in schedule.levels]
    real = [i for i, letter in enumerate(LETTERS) if letter == "C"]
    for index in (i for i, letter in enumerate(LETTERS) if letter == "s"):
        nodes = [i for i in real if i < index][-2:]
        weights = lagrange([shares[i] for i in nodes], shares[index])
        x0 = sum((w * x0s[i] for w, i in zip(weights, nodes, strict=True)), torch.zeros(()))
        output, sample = got[index]
        torch.testing.assert_close(output, schedule.output(x0, sample, index), rtol=1e-3, atol=1e-3)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS and ran.evaluations == 11
    assert ran.calls == len(calls) == stock * 11 // STEPS
    assert ran.mean_error is not None and ran.max_error is not None
    assert 0 < ran.mean_error <= ran.max_error
    assert not torch.equal(out, full) and out.isfinite().all()


@pytest.mark.parametrize(
    "policy",
    [
        Pattern(),
        *(pytest.param(it, marks=pytest.mark.long) for it in (Shadow(threshold=10), Sada())),
    ],
    ids=str,
)
def test_runs_do_not_know_of_each_other_broken_off_ones_neither(build: Build, policy: StepPolicy):
    for family in ("wan", "sdxl"):
        model = build(family)
        full = model(steps=STEPS)
        with accelerate(model, Recipe(steps=policy)) as session:
            first = model(steps=STEPS)
            told = session.receipt
            assert told.skipped > 3

            def stop(step: int) -> None:
                if step == 9:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                model(steps=STEPS, callback=stop)
            assert torch.equal(model(steps=STEPS), first)
            assert session.receipt == told
            assert not torch.equal(model(steps=STEPS, seed=1), first)
            assert torch.equal(model(steps=STEPS), first)
        assert torch.equal(model(steps=STEPS), full)
        with accelerate(build(family), Recipe(steps=policy)) as fresh:
            assert torch.equal(fresh.pipe(steps=STEPS), first)


def test_what_allows_nothing_is_bitwise_the_stock_pipeline(model: Any):
    full = model(steps=12)
    with accelerate(model, Recipe(steps=Shadow(threshold=0))) as session:
        assert torch.equal(model(steps=12), full)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == "C" * 12 and ran.mean_error is None


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sdxl"])
def test_half_precision_is_handed_on_as_it_is(build: Build, family: str):
    """Pipelines cast: of what was rounded once, more than that is no difference."""
    model = build(family)
    model.pipe.to(torch.bfloat16)
    with accelerate(model, Recipe(steps=Pattern())) as session:
        assert model(steps=STEPS).isfinite().all()
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS


class Spy(TopBlocks):
    """Notes where plans are made."""

    made: ClassVar[list[Site]] = []

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
        self.made.append(site)
        return super().plan(q, k, site)


def planned(model: Any, method: AttentionMethod, policy: StepPolicy) -> tuple[list[int], Receipt]:
    """Steps in which layer 0 was planned."""
    Spy.made.clear()
    with accelerate(model, Recipe(attention=method, steps=policy, when="always")) as session:
        model(steps=STEPS)
    return [it.step for it in Spy.made if it.layer == 0], session.receipt


def test_skipped_steps_make_no_plans_and_do_not_age_them(build: Build):
    """Evaluated are 4, 6, 8, … of a run that skips 5, 7, …: every third of those plans anew."""
    model, spy = build("ltx"), Spy(keep=0.5, tile="64x64")
    real = [i for i, letter in enumerate(LETTERS) if letter == "C"]
    steps, receipt = planned(model, spy, Pattern())
    assert steps == real and receipt.attention is not None
    assert receipt.attention.calls == 2 * len(real)
    steps, _ = planned(model, Reuse(method=spy, every=3), Pattern())
    assert steps == real[::3]


def test_attention_and_steps_share_one_window(build: Build):
    """Both count the steps of the schedule: dense where all are evaluated, sparse from there on."""
    for share in (0.25, 0.5):
        spy = Within(method=Spy(keep=0.5, tile="64x64"), from_step=share)
        steps, receipt = planned(build("ltx"), spy, Pattern(from_step=share))
        assert receipt.policy is not None
        first = receipt.policy.pattern.index("s")
        assert first == share * STEPS and steps[0] == first + 1
        assert receipt.attention is not None
        assert receipt.attention.dense == {f"in the first {share:.0%} of the steps": 2 * first}


def test_a_run_that_begins_in_the_middle_needs_a_past_of_its_own(build: Build):
    model = build("ltx")
    with accelerate(model, Recipe(steps=Pattern())) as session:
        for begin, skips in ((8, True), (26, False)):
            model.scheduler.set_timesteps(32)
            model.scheduler.set_begin_index(begin)
            x, given = torch.randn(model.latents), model.arguments

            def go(x: torch.Tensor, given: Any, begin: int) -> None:
                for t in model.scheduler.timesteps[begin:]:
                    with torch.no_grad():
                        out = model.transformer(
                            hidden_states=x, timestep=t.expand(len(x)), **given, return_dict=False
                        )[0]
                    x = model.scheduler.step(out, t, x, return_dict=False)[0]

            if skips:
                go(x, given, begin)
                ran = session.receipt.policy
                assert ran is not None and ran.pattern.startswith("CCCsC")
                assert ran.pattern.endswith("CCC") and len(ran.pattern) == 32 - begin
            else:
                with pytest.raises(AccelerationError, match="12 steps or more, this run has 6"):
                    go(x, given, begin)


def test_latents_that_are_changed_between_steps_are_refused(build: Build):
    model = build("ltx")
    with accelerate(model, Recipe(steps=Pattern())):
        step = model.scheduler.step

        def moved(out: Any, t: Any, x: torch.Tensor, return_dict: bool) -> Any:
            return step(out, t, x + 0.1, return_dict=return_dict)

        loop = type(model)(model.transformer, model.scheduler, model.latents, model.arguments)
        loop.scheduler = type("Moved", (), {
            "set_timesteps": model.scheduler.set_timesteps,
            "timesteps": property(lambda _: model.scheduler.timesteps),
            "step": staticmethod(moved),
        })()  # fmt: skip
        with pytest.raises(AccelerationError, match="changes the latents between its steps"):
            loop(steps=STEPS)


def test_guidance_that_is_not_affine_is_refused(build: Build):
    model = build("ltx")
    with accelerate(model, Recipe(steps=Pattern())):
        step = model.scheduler.step

        def squared(out: torch.Tensor, t: Any, x: torch.Tensor, return_dict: bool) -> Any:
            return step(out + out**2, t, x, return_dict=return_dict)

        loop = type(model)(model.transformer, None, model.latents, model.arguments)
        loop.scheduler = type("Squared", (), {
            "set_timesteps": model.scheduler.set_timesteps,
            "timesteps": property(lambda _: model.scheduler.timesteps),
            "step": staticmethod(squared),
        })()  # fmt: skip
        with pytest.raises(AccelerationError, match="guidance is not affine"):
            loop(steps=STEPS)


def test_samplers_that_draw_noise_are_refused_before_anything_runs(build: Build):
    import importlib

    diffusers: Any = importlib.import_module("diffusers")
    model = build("sdxl")
    model.pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()
    with (
        pytest.raises(AccelerationError, match="draws new noise in each step"),
        accelerate(model.pipe, Recipe(steps=Pattern())),
    ):
        pytest.fail("before it runs")
    model = build("unet")
    with (
        accelerate(model, Recipe(steps=Pattern())),
        pytest.raises(AccelerationError, match=r"eta is 0\.5, which draws new noise"),
    ):
        t = torch.tensor(1)
        model.scheduler.set_timesteps(20)
        x = torch.randn(model.latents)
        out = model.denoiser(x, t, **model.arguments).sample
        model.scheduler.step(out, t, x, eta=0.5)


def test_of_an_unknown_scheduler_outputs_are_taken_as_they_come(build: Build):
    import importlib

    diffusers: Any = importlib.import_module("diffusers")
    model = build("sdxl")
    model.pipe.scheduler = diffusers.LMSDiscreteScheduler()
    with accelerate(model.pipe, Recipe(steps=Pattern())) as session:
        assert model(steps=STEPS).isfinite().all()
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS
    assert "LMSDiscreteScheduler makes of an output is not known" in ran.raw
    assert any(line.startswith("fell back: outputs are") for line in session.receipt.words())
    with (
        accelerate(model.pipe, Recipe(steps=Pattern()), strict=True),
        pytest.raises(AccelerationError, match="strict: outputs would be extrapolated"),
    ):
        model(steps=STEPS)
    with (
        pytest.raises(AccelerationError, match="sada must know x0"),
        accelerate(model.pipe, Recipe(steps=Sada())),
    ):
        pytest.fail("before it runs")


def test_a_receipt_is_read_again_and_older_ones_too(build: Build):
    model = build("flux")
    with accelerate(model.pipe, changed(find("dense"), ["steps.policy=easy"])) as session:
        model(steps=STEPS)
    receipt = session.receipt
    assert Receipt.model_validate_json(receipt.model_dump_json()) == receipt
    assert receipt.recipe["steps"]["policy"] == "easy" and receipt.policy is not None
    content = receipt.model_dump(mode="json")
    del content["policy"]
    assert Receipt.model_validate(content).policy is None
