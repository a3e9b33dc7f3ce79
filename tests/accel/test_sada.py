"""SADA against its formulas, written out for each kind of sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.policies import Sada
from kinora.accel.policies.skipping import lagrange
from kinora.accel.steps import Schedule, Skip, Step

from .sampling import SAMPLERS, Network, mixture, run, sampler

KINDS = [name for name in SAMPLERS if name != "flow euler reversed"]


def derivative(
    schedule: Schedule, index: int, x: torch.Tensor, x0: torch.Tensor, *, v: bool
) -> torch.Tensor:
    """§2 of the paper: of the noise, of v, or of the velocity; x of constant variance."""
    level = schedule.levels[index]
    if schedule.flow:
        return (x - x0) / level.sigma
    scale = (level.alpha**2 + level.sigma**2) ** 0.5
    a, s, b = level.alpha / scale, level.sigma / scale, level.rate
    noise = (x - a * x0) / s
    return b * a / (2 * s) * (a * noise - s * x0) if v else -b / 2 * x + b / (2 * s) * noise


def literal(
    schedule: Schedule, trace: list[tuple[int, torch.Tensor, torch.Tensor]], after: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """<x' - x^, D2> and x^, from (step, x, x0) of the last three, in the scale of the equation."""
    ys = [derivative(schedule, i, x, x0, v=False) for i, x, x0 in trace]
    index, x, _ = trace[-1]
    h = schedule.levels[index].time - schedule.levels[index + 1].time
    estimate = x - 5 / 6 * h * ys[2] - 5 / 6 * h * ys[1] + 2 / 3 * h * ys[0]
    second = ys[2] - 2 * ys[1] + ys[0]
    return float(((after - estimate) * second).sum()), estimate


def scale_of(schedule: Schedule, index: int) -> float:
    level = schedule.levels[index]
    return 1.0 if schedule.flow else (level.alpha**2 + level.sigma**2) ** 0.5


@pytest.mark.parametrize("name", KINDS)
def test_each_decision_before_the_lagrange_step_is_the_papers(name: str):
    """What is decided is not done, so that each decision is from three evaluated steps."""
    steps, scheduler = 40, sampler(name, 40)
    schedule = schedule_of(scheduler)
    policy = Sada(lagrange_step=1)
    ran: Any = policy.start(schedule)
    level = schedule.levels[0]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3)) * (
        level.alpha + level.sigma
    )
    trace: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    left, decided, held = None, list[bool](), torch.zeros(())
    for index, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        decision = ran.decide(Step(index, steps), left)
        skipped = isinstance(decision, Skip)
        scaled = x / scale_of(schedule, index)
        if index in policy.window(steps):
            inner, estimate = literal(schedule, trace[-3:], scaled)
            assert skipped == (inner < 0)
            decided.append(skipped)
            if skipped:
                # The last noise, or velocity, of the estimate.
                x0 = schedule.estimate(decision.output, x, index)
                a, s = (
                    it / scale_of(schedule, index)
                    for it in (schedule.levels[index].alpha, schedule.levels[index].sigma)
                )
                expected = estimate - s * held if schedule.flow else (estimate - s * held) / a
                if "v" not in name.split()[1:]:
                    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)
        x0 = mixture(schedule, index, x)
        output = schedule.output(x0, x, index)
        trace.append((index, scaled, x0))
        last = schedule.levels[index]
        held = (x - x0) / last.sigma if schedule.flow else (x - last.alpha * x0) / last.sigma
        ran.observe(Step(index, steps), output, x, computed=True)
        x = left = scheduler.step(output, t, x, return_dict=False)[0]
    assert len(decided) == len(policy.window(steps)) and True in decided


def test_the_derivative_of_v_is_that_of_the_noise():
    schedule = schedule_of(sampler("ddim v", 20))
    x, x0 = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    for index in range(20):
        torch.testing.assert_close(
            derivative(schedule, index, x, x0, v=True), derivative(schedule, index, x, x0, v=False)
        )


Keep = Callable[[Schedule, int, torch.Tensor, torch.Tensor], None]


def watched() -> tuple[dict[int, torch.Tensor], Keep, dict[int, torch.Tensor], Network]:
    """x0 of skipped steps with what keeps it, and of evaluated ones with the network."""
    told: dict[int, torch.Tensor] = {}
    x0s: dict[int, torch.Tensor] = {}

    def keep(schedule: Schedule, index: int, x: torch.Tensor, output: torch.Tensor) -> None:
        told[index] = schedule.estimate(output, x, index)

    def network(schedule: Schedule, index: int, x: torch.Tensor) -> torch.Tensor:
        x0s[index] = mixture(schedule, index, x)
        return x0s[index]

    return told, keep, x0s, network


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_the_lagrange_step_on_one_of_four_is_evaluated(name: str):
    told, keep, x0s, network = watched()
    policy = Sada(max_interval=4)
    out, letters, ran = run(name, policy, network, 50, on_skip=keep)
    flow = ran.schedule.flow
    start = 20 if flow else 24
    assert ran.start == start and ran.kept.maxlen == (3 if flow else 4)
    assert letters[:11] == "C" * 11 and letters[48:] == "CC"
    assert [i for i in range(start + 1, 48) if letters[i] == "C"] == list(range(start + 1, 48, 4))
    least, most = policy.computed(50)
    assert least <= letters.count("C") <= most
    nodes = [i for i in range(1, 38, 4)][-ran.kept.maxlen :]
    assert all(i in x0s for i in nodes if i > start)
    if nodes[0] > start:
        times = [ran.schedule.levels[i].time for i in nodes]
        weights = lagrange(times, ran.schedule.levels[39].time)
        expected = sum(w * x0s[i] for w, i in zip(weights, nodes, strict=True))
        assert isinstance(expected, torch.Tensor)
        torch.testing.assert_close(told[39], expected, rtol=1e-3, atol=1e-3)
    assert out.isfinite().all() and len(ran.errors()) == letters.count("s")


def test_of_one_term_the_last_kept_x0_is_held():
    told, keep, x0s, network = watched()
    policy = Sada(lagrange_terms=1)
    _, letters, _ = run("flow euler", policy, network, 50, on_skip=keep)
    assert letters[21:48] == "CsssCsssCsssCsssCsssCsssCss"
    for index in (22, 24, 47):
        kept = x0s[(index - 1) // 4 * 4 + 1]
        torch.testing.assert_close(told[index], kept, rtol=1e-3, atol=1e-3)
    least, most = policy.computed(50)
    assert least <= letters.count("C") <= most


@pytest.mark.parametrize(("steps", "at"), [(50, 24), (25, 12), (30, 16), (16, 8)])
def test_the_lagrange_step_is_a_multiple_of_its_interval(steps: int, at: int):
    assert Sada().lagrange_from(steps, flow=False) == at
    assert Sada(lagrange_step=1).lagrange_from(steps, flow=False) == steps


def test_the_papers_numbers_at_fifty_steps():
    """Eleven dense steps, then those that decide, then eight: 19 to 33 evaluations."""
    policy = Sada()
    assert policy.window(50) == range(11, 48)
    assert policy.computed(50)[1] == 11 + 14 + 8
    assert policy.refuses(50) is None and policy.needs_x0()


@pytest.mark.parametrize(
    ("policy", "steps", "told"),
    [
        (Sada(), 10, "need 12 steps or more, this run has 10"),
        (Sada(from_step=0.9), 20, "leave none of 20 steps to skip"),
        (Sada(from_step=0.0, to_step=0.05), 20, "steps.to_step 0.05 leave none"),
    ],
)
def test_windows_that_do_not_fit_are_refused(policy: Sada, steps: int, told: str):
    assert told in str(policy.refuses(steps))


@pytest.mark.parametrize("change", [lambda it: it, lambda it: 3 * it])
def test_no_skip_is_longer_than_the_interval(change: Callable[[int], int]):
    for most in (0, 1, 2, 3):
        policy = Sada(max_interval=most, lagrange_every=8, lagrange_step=0.3)
        _, letters, _ = run("dpm++ eps", policy, mixture, change(20))
        assert "s" * (most + 1) not in letters and ("s" in letters) == (most > 0)


def test_two_runs_are_one():
    first, second = (run("unipc flow", Sada(), mixture, 40)[0] for _ in range(2))
    assert torch.equal(first, second)
