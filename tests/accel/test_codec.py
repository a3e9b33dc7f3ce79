"""Outputs, x0 and noise levels: formulas, and that diffusers' samplers mean what the table says."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinora.accel.attach.schedulers import refusal, refused_arguments, schedule_of
from kinora.accel.codec import PREDICTIONS, Codec, Level, Prediction
from kinora.accel.policies import Pattern, Sada
from kinora.accel.steps import Schedule


def diffusers() -> Any:
    """The library, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


def clean_and_noise(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(1, 4, 6, 5, generator=generator, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(1, 4, 6, 5, generator=generator, dtype=torch.float64)


def truth(
    prediction: Prediction, x0: torch.Tensor, noise: torch.Tensor, level: Level
) -> torch.Tensor:
    """The output of a network that knows both."""
    scale = (level.alpha**2 + level.sigma**2) ** 0.5
    return {
        "epsilon": noise,
        "v_prediction": (level.alpha * noise - level.sigma * x0) / scale,
        "sample": x0,
        "flow_prediction": noise - x0,
        "reverse_flow": x0 - noise,
    }[prediction]


@given(
    prediction=st.sampled_from(PREDICTIONS),
    alpha=st.floats(1e-2, 10),
    sigma=st.floats(1e-2, 100),
)
@settings(max_examples=60, deadline=None)
def test_an_output_says_the_x0_it_was_made_of_and_back(
    prediction: Prediction, alpha: float, sigma: float
):
    codec, level = Codec(prediction), Level(alpha, sigma, time=0.5)
    x0, noise = clean_and_noise()
    sample = alpha * x0 + sigma * noise
    output = truth(prediction, x0, noise, level)
    close: Any = {"rtol": 1e-9, "atol": 1e-9 * max(1, sigma / alpha)}
    torch.testing.assert_close(codec.x0(output, sample, level), x0, **close)
    torch.testing.assert_close(codec.output(x0, sample, level), output, **close)
    torch.testing.assert_close(codec.velocity(x0, sample, level), noise - x0, **close)


def test_half_precision_is_computed_in_float32():
    codec, level = Codec("epsilon"), Level(0.6, 0.8, time=0.5)
    x0, noise = (it.bfloat16() for it in clean_and_noise())
    assert codec.x0(noise, x0, level).dtype == codec.output(x0, noise, level).dtype == torch.float32


def dpm(**options: Any) -> Any:
    return diffusers().DPMSolverMultistepScheduler(**options)


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SERVED: dict[str, Any] = {
    "dpm++ eps": lambda: dpm(),
    "dpm++ v karras": lambda: dpm(prediction_type="v_prediction", use_karras_sigmas=True),
    "dpm++ sample": lambda: dpm(prediction_type="sample"),
    "dpm++ flow": lambda: dpm(**FLOW, flow_shift=3.0),
    "dpm++ eps of flow": lambda: dpm(use_flow_sigmas=True),
    "unipc eps": lambda: diffusers().UniPCMultistepScheduler(),
    "unipc v": lambda: diffusers().UniPCMultistepScheduler(prediction_type="v_prediction"),
    "unipc flow": lambda: diffusers().UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
    "euler eps": lambda: diffusers().EulerDiscreteScheduler(),
    "euler v": lambda: diffusers().EulerDiscreteScheduler(prediction_type="v_prediction"),
    "euler sample karras": lambda: diffusers().EulerDiscreteScheduler(
        prediction_type="sample", use_karras_sigmas=True
    ),
    "ddim eps": lambda: diffusers().DDIMScheduler(),
    "ddim v": lambda: diffusers().DDIMScheduler(prediction_type="v_prediction"),
    "ddim sample": lambda: diffusers().DDIMScheduler(prediction_type="sample"),
    "ddim v from pure noise": lambda: diffusers().DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "cogvideox ddim v": lambda: diffusers().CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "pndm eps": lambda: diffusers().PNDMScheduler(skip_prk_steps=True),
    "flow euler": lambda: diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow euler reversed": lambda: diffusers().FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}


@pytest.fixture(params=SERVED)
def served(request: pytest.FixtureRequest) -> Any:
    scheduler = SERVED[request.param]()
    scheduler.set_timesteps(20)  # of 1000: where that does not divide, DDIM leaves its levels
    return scheduler


def test_a_sampler_that_gets_the_truth_stays_on_the_levels(served: Any):
    """Samples are alpha x0 + sigma n at every step, if and only if outputs mean what is said."""
    schedule = schedule_of(served)
    assert schedule.codec is not None and not schedule.why_raw
    assert len(schedule.levels) == len(served.timesteps)
    x0, noise = (it.float() for it in clean_and_noise())
    sample = schedule.levels[0].alpha * x0 + schedule.levels[0].sigma * noise
    for t, level in zip(served.timesteps, schedule.levels, strict=True):
        expected = level.alpha * x0 + level.sigma * noise
        error = (sample - expected).abs().max() / (level.alpha + level.sigma)
        # They compute in float32, and divide by alpha where it is small.
        assert error < 1e-3
        if hasattr(served, "scale_model_input"):
            served.scale_model_input(sample, t)
        output = truth(schedule.codec.prediction, x0, noise, level).float()
        sample = served.step(output, t, sample, return_dict=False)[0]
    assert (sample - x0).abs().max() < 0.1


def test_levels_go_from_noise_to_the_picture_in_one_time(served: Any):
    schedule = schedule_of(served)
    shares, times = [it.share for it in schedule.levels], [it.time for it in schedule.levels]
    assert shares == sorted(shares, reverse=True) and times == sorted(times, reverse=True)
    assert 0.9 < shares[0] <= 1 and 0 < times[-1] < 0.3 and times[0] <= 1
    if schedule.flow:
        assert all(it.alpha + it.sigma == pytest.approx(1) and it.time == it.share
                   for it in schedule.levels)  # fmt: skip
    else:
        assert all(it.rate > 0 for it in schedule.levels)


def test_one_noise_level_is_one_whatever_the_scale_of_the_sample():
    """Euler's samples grow, those of the others do not."""
    made = [SERVED[name]() for name in ("euler eps", "dpm++ eps", "ddim eps")]
    found: list[Schedule] = []
    for scheduler in made:
        scheduler.set_timesteps(timesteps=[900, 700, 400, 100]) if scheduler is made[0] else None
        if scheduler is not made[0]:
            scheduler.timesteps = torch.tensor([900, 700, 400, 100])
            if scheduler is made[1]:
                products = scheduler.alphas_cumprod[scheduler.timesteps]
                scheduler.sigmas = ((1 - products) / products).sqrt()
        found.append(schedule_of(scheduler))
    for levels in zip(*(it.levels for it in found), strict=True):
        assert len({round(it.share, 5) for it in levels}) == 1
        assert len({round(it.time, 5) for it in levels}) == 1
        assert len({round(it.rate, 4) for it in levels}) == 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: diffusers().LMSDiscreteScheduler(),
            "what LMSDiscreteScheduler makes of",
        ),
        (lambda: dpm(prediction_type="flow_prediction"), "flow_prediction is not known for these"),
        (lambda: dpm(prediction_type="v_prediction", use_flow_sigmas=True), "v_prediction is not"),
        (lambda: diffusers().DDIMScheduler(rescale_betas_zero_snr=True), "at pure noise"),
    ],
)
def test_outputs_of_which_nothing_is_known_are_taken_as_they_come(make: Any, told: str):
    scheduler = make()
    scheduler.set_timesteps(12)
    schedule = schedule_of(scheduler)
    assert schedule.codec is None and not schedule.flow and told in schedule.why_raw
    x, m = clean_and_noise()
    assert torch.equal(schedule.estimate(m, x, 3), m) and torch.equal(schedule.output(m, x, 3), m)
    shares = [it.share for it in schedule.levels]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 12
    assert refusal(scheduler, Pattern()) is None
    assert f"sada must know x0, but {schedule.why_raw}" in str(refusal(scheduler, Sada()))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "draws new noise in each step"),
        ("CogVideoXDPMScheduler", {}, "draws new noise"),
        ("DDPMScheduler", {}, "draws new noise"),
        ("DDPMWuerstchenScheduler", {}, "draws new noise"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "draws new noise"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "draws new noise"),
        ("HeunDiscreteScheduler", {}, "takes several evaluations for a step"),
        ("DPMSolverSinglestepScheduler", {}, "takes several evaluations"),
        ("PNDMScheduler", {}, "takes several evaluations"),
        ("FlowMatchHeunDiscreteScheduler", {}, "takes several evaluations"),
        ("LCMScheduler", {}, "is for models of few steps"),
        ("TCDScheduler", {}, "is for models of few steps"),
        ("PiflowScheduler", {}, "is for models of few steps"),
    ],
)
def test_samplers_that_cannot_be_foretold_are_refused(
    name: str, options: dict[str, Any], told: str
):
    told_by = refusal(getattr(diffusers(), name)(**options), Pattern())
    assert told_by is not None and told in told_by and "leave the step policy out" in told_by


def test_every_scheduler_that_is_named_is_there_or_unknown_to_this_diffusers():
    from kinora.accel.attach import schedulers

    named = schedulers._MULTISTEP, schedulers._DDIM, schedulers._STOCHASTIC, schedulers._FEW_STEPS  # pyright: ignore[reportPrivateUsage]
    for name in (it for names in named for it in names):
        assert hasattr(diffusers(), name), name


def test_every_scheduler_that_draws_in_its_step_is_named_or_does_so_only_if_asked():
    """By the source of its step; those that are asked by an argument or an option are looked at."""
    from kinora.accel.attach import schedulers

    asked = {
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    }
    named = {*schedulers._STOCHASTIC, *schedulers._FEW_STEPS}  # pyright: ignore[reportPrivateUsage]
    # Without their libraries some are stand-ins, which have no step.
    every = {it for it in dir(diffusers()) if it.endswith("Scheduler")} - named
    drawing = {it for it in every if draws(vars(getattr(diffusers(), it)).get("step"))}
    assert drawing <= asked


def draws(step: Any) -> bool:
    """Whether the source of a function makes random numbers."""
    made = (
        "randn_tensor(",
        "torch.randn(",
        "torch.rand(",
        "torch.randint(",
        "multinomial(",
        "gumbel",
    )
    return step is not None and any(it in inspect.getsource(step) for it in made)


@pytest.mark.parametrize(
    ("given_arguments", "told"),
    [
        ({"eta": 0.5}, "eta is 0.5, which draws new noise"),
        ({"s_churn": 1.0}, "s_churn is 1"),
        ({"per_token_timesteps": torch.zeros(3)}, "each token a timestep of its own"),
        ({"eta": 0.0, "s_churn": 0, "per_token_timesteps": None}, None),
        ({"eta": None}, None),
    ],
)
def test_arguments_of_a_step_that_cannot_be_foretold_are_refused(
    given_arguments: dict[str, Any], told: str | None
):
    refused = refused_arguments(given_arguments)
    assert refused == told if told is None else told in str(refused)
