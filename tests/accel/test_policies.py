"""What the policies decide and what stands for a skipped step, on samplers without a network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.codec import Codec, Level
from kinora.accel.errors import RecipeError
from kinora.accel.methods import ThresholdBlocks, VMoBA, XAttention
from kinora.accel.policies import Easy, Pattern, Shadow, Sign, SkipPolicy
from kinora.accel.policies.sign import stable
from kinora.accel.policies.skipping import EDGE, lagrange
from kinora.accel.steps import Schedule, Skip, Step, StepPolicy

from .sampling import SAMPLERS, Network, mixture, polynomial, run, sampler


def misses(name: str, policy: StepPolicy, network: Network) -> list[float]:
    """By how much x0 is wrong in each skipped step."""
    found: list[float] = []

    def told(schedule: Schedule, index: int, sample: torch.Tensor, output: torch.Tensor) -> None:
        x0 = network(schedule, index, sample)
        found.append(float((schedule.estimate(output, sample, index) - x0).abs().max()))

    run(name, policy, network, on_skip=told)
    return found


def test_words_say_what_is_0_and_what_is_off_though_on_by_default():
    assert "threshold 0" in Easy(threshold=0).words()
    assert "beta 0," in ThresholdBlocks(beta=0).words()
    assert "threshold 0," in XAttention(threshold=0).words()
    assert "shared off" in VMoBA(shared=False).words() and "shared," in VMoBA().words()
    assert "first frame" not in ThresholdBlocks().words()  # off by default


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("reconstruct", "degree"), [("hold", 0), ("linear-x0", 1), ("three-node", 2)]
)
def test_x0_that_is_a_polynomial_in_the_noise_level_is_reproduced(
    name: str, reconstruct: Any, degree: int
):
    policy = Pattern(reconstruct=reconstruct)
    missed = misses(name, policy, polynomial(degree))
    assert len(missed) == 7
    # After a row of evaluated steps a parabola would have too large weights.
    assert max(missed[3:] if reconstruct == "three-node" else missed) < 5e-5
    # One degree more is not, so that this is no accident.
    assert min(misses(name, policy, polynomial(degree + 1))) > 1e-4


@given(
    nodes=st.lists(st.floats(0, 1), min_size=1, max_size=5, unique_by=lambda it: round(it, 2)),
    at=st.floats(-1, 2),
)
@settings(deadline=None)
def test_weights_are_those_of_the_polynomial_through_the_nodes(nodes: list[float], at: float):
    weights = lagrange(nodes, at)
    scale = sum(map(abs, weights))
    assert abs(sum(weights) - 1) < 1e-9 * scale
    degree = len(nodes) - 1
    told = sum(w * node**degree for w, node in zip(weights, nodes, strict=True))
    assert abs(told - at**degree) < 1e-9 * max(1, scale)


def test_weights_that_grow_too_large_drop_the_oldest_node():
    """Three nodes a step apart, three steps on: 10, -15 and 6; two: 4 and -3; so the last alone."""
    steps = 40
    policy = Pattern(pattern="sssC", reconstruct="three-node", from_step=0.1)
    _, letters, _ = run("flow euler", policy, polynomial(0), steps)
    schedule = Schedule(tuple(Level(it / 40, 1 - it / 40, 1 - it / 40) for it in range(40)),
                        Codec("flow_prediction"))  # fmt: skip
    assert letters.startswith("CCCCsss")
    ran = policy.start(schedule)
    x = torch.zeros(1)
    for index in range(4):
        ran.observe(Step(index, steps), torch.full((1,), float(index % 2)), x, computed=True)
    expected = []
    for index in (4, 5, 6):
        decision = ran.decide(Step(index, steps), x)
        assert isinstance(decision, Skip)
        expected.append(float(schedule.estimate(decision.output, x, index)))
        ran.observe(Step(index, steps), decision.output, x, computed=False)
    z2, z3 = 0.0, float(schedule.estimate(torch.ones(1), x, 3))
    line = [(k + 1) * z3 - k * z2 for k in (1, 2)]
    assert expected == pytest.approx([*line, z3], abs=1e-5)


@pytest.mark.parametrize("name", ["dpm++ eps", "unipc flow", "euler eps", "ddim v", "flow euler"])
@pytest.mark.parametrize(
    "policy", [Pattern(), Shadow(), Sign(), Easy(threshold=0.2), Shadow(max_skip=3)]
)
def test_the_ends_are_evaluated_and_the_cap_is_kept(name: str, policy: SkipPolicy):
    full, _, _ = run(name, None, mixture, 40)
    skipped, letters, ran = run(name, policy, mixture, 40)
    window = policy.window(40)
    assert letters[: window.start] == "C" * 8 and letters[-EDGE:] == "CCC"
    most = getattr(policy, "max_skip", 1)
    assert "s" in letters and "s" * (most + 1) not in letters
    least, at_most = policy.computed(40)
    assert least <= letters.count("C") <= at_most
    assert float((skipped - full).norm() / full.norm()) < 0.05
    assert len(ran.errors()) == letters.count("s")


@pytest.mark.parametrize(
    "policy",
    [Shadow(threshold=0), Shadow(max_skip=0), Sign(kappa=-1000), Sign(max_skip=0), Easy(max_skip=0),
     Easy(threshold=0)],
)  # fmt: skip
def test_what_allows_nothing_changes_nothing(policy: SkipPolicy):
    full, _, _ = run("unipc flow", None, mixture)
    same, letters, ran = run("unipc flow", policy, mixture)
    assert letters == "C" * 20 and torch.equal(same, full) and ran.errors() == []


def test_the_pattern_is_what_runs():
    for pattern in ("sC", "Cs", "ssC", "sCsCC"):
        policy = Pattern(pattern=pattern, from_step=0.25)
        _, letters, _ = run("flow euler", policy, mixture, 24)
        repeated = (pattern * 24)[: 24 - 6 - EDGE]
        assert letters == policy.letters(24) == "C" * 6 + repeated + "CCC"
        assert policy.computed(24) == (letters.count("C"),) * 2


@given(steps=st.integers(12, 200), share=st.floats(0, 1), to=st.floats(0, 1))
@settings(deadline=None)
def test_windows_are_shares_and_leave_the_ends(steps: int, share: float, to: float):
    policy = Pattern(from_step=share, to_step=to)
    window = policy.window(steps)
    for index in range(steps):
        inside = share * steps <= index + 1e-6 < to * steps + 2e-6
        assert (index in window) <= inside or abs(to * steps - index) < 1e-5
        assert index not in window or EDGE <= index < steps - EDGE
    assert (policy.refuses(steps) is None) == (len(window) > 0)


def test_a_smaller_error_is_allowed_more_steps():
    counts = [
        run("unipc flow", Shadow(threshold=it, max_skip=3), mixture, 60)[1].count("s")
        for it in (0.0, 0.001, 0.01, 0.1)
    ]
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] < counts[-1]


def test_the_estimated_error_is_near_the_true_one():
    """The true one: the output that was skipped, evaluated all the same."""
    true: list[float] = []

    def compare(schedule: Schedule, index: int, x: torch.Tensor, output: torch.Tensor) -> None:
        right = schedule.output(mixture(schedule, index, x), x, index)
        true.append(float((output - right).norm() / right.norm()))

    _, _, ran = run("flow euler", Pattern(pattern="ssC"), mixture, 60, on_skip=compare)
    told = sum(ran.errors()) / len(ran.errors())
    assert len(true) == len(ran.errors()) and told > 1e-4
    assert 0.5 < told / (sum(true) / len(true)) < 2


@given(seed=st.integers(0, 1000), h=st.floats(1e-3, 1), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_the_criterion_is_the_papers_for_an_euler_step_of_flow_matching(
    seed: int, h: float, scale: float
):
    """<x' - x^, a> = h (<b, a> / 2 - |a|² / 6); the authors' coefficients give -0.375 h |a|²."""
    generator = torch.Generator().manual_seed(seed)
    x, y0, y1, y2 = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    a, b = y0 - 2 * y1 + y2, y1 - y2
    after = x - h * y0
    estimate = x - h * (5 / 6 * y0 + 5 / 6 * y1 - 2 / 3 * y2)
    literal = float((after - estimate) @ a)
    assert literal == pytest.approx(h * float(b @ a / 2 - a @ a / 6), rel=1e-9, abs=1e-12)
    theirs = x - h * (0.625 * y0 + 0.75 * y1 - 0.375 * y2)
    assert float((after - theirs) @ a) == pytest.approx(-0.375 * h * float(a @ a), rel=1e-9)
    assert stable(a, b, 1 / 3) == (literal < 0)
    assert stable(scale * a, scale * b, 1 / 3) == (literal < 0)


def velocities(policy: Sign, values: list[float], shares: list[float]) -> bool:
    """Whether the fourth of these levels would be skipped after three with these velocities."""
    levels = tuple(Level(1 - it, it, it) for it in [0.999, *shares, *[0.01] * 20])
    schedule = Schedule(levels, Codec("flow_prediction"))
    ran = policy.model_copy(update={"from_step": 0.0}).start(schedule)
    for index, value in enumerate(values, start=1):
        ran.observe(Step(index, 24), torch.full((2,), value), torch.zeros(2), computed=True)
    return isinstance(ran.decide(Step(4, 24), torch.zeros(2)), Skip)


@pytest.mark.parametrize("offset", [0.0, 7.0])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_sign_sees_bends_not_scale_or_offset(offset: float, scale: float):
    even = [0.9, 0.8, 0.7, 0.6]
    for last, skips in ((1.5, True), (2.2, False), (4.9, False), (5.1, True)):
        # b = 1, a = last - 2: stable where a < a² / 3, so below 0 or above 3.
        moved = [offset + scale * it for it in (0, 1, last)]
        assert velocities(Sign(), moved, even) is skips


def test_the_sign_takes_gaps_for_what_they_are():
    """A line in sigma has no second difference, however its nodes lie; nothing follows from it."""
    gaps = [0.9, 0.6, 0.5, 0.45]
    assert not velocities(Sign(kappa=1000), [9.0, 6.0, 5.0], gaps)
    # On an even grid the same velocities bend back.
    assert velocities(Sign(), [9.0, 6.0, 5.0], [0.9, 0.8, 0.7, 0.6])


def test_easy_skips_where_the_sample_hardly_moves():
    """Outputs twice the sample: k = 2, so the change is 2 |x - x'| / |m'|."""
    levels = tuple(Level(1 - it / 24, it / 24, it / 24) for it in range(24, 0, -1))
    ran = Easy(threshold=0.1).start(Schedule(levels, Codec("flow_prediction")))
    for index in range(6):
        x = torch.full((3,), 1.0 + index)
        ran.observe(Step(index, 24), 2 * x, x, computed=True)
    last = 6.0
    for moved, skips in ((0.59, True), (0.61, False)):
        x = torch.full((3,), last + moved)
        assert isinstance(ran.decide(Step(6, 24), x), Skip) is skips


@pytest.mark.parametrize(
    ("policy", "steps", "told"),
    [
        (Pattern(), 11, "need 12 steps or more, this run has 11"),
        (Shadow(from_step=0.9), 20, "leave none of 20 steps to skip"),
        (Sign(from_step=0.0, to_step=0.1), 20, "steps.to_step 0.1 leave none of 20 steps"),
    ],
)
def test_runs_that_a_policy_does_not_fit_are_refused_in_one_line(
    policy: StepPolicy, steps: int, told: str
):
    refused = policy.refuses(steps)
    assert refused is not None and told in refused and "\n" not in refused
    assert policy.refuses(50) is None or "0.1" in told
    assert "has 10" in str(Pattern().refuses(50, first=40))


def test_a_mask_says_it_for_each_step(tmp_path: Path):
    path = tmp_path / "mask.txt"
    path.write_text("CCCC ssCC\nssss CCCC\n")
    policy = Pattern(mask=str(path))
    assert policy.refuses(16) is None and policy.computed(16) == (10, 10)
    _, letters, _ = run("flow euler", policy, mixture, 16)
    assert letters == "CCCCssCCssssCCCC"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("C" * 15, "is of 15 steps, the run has 16"),
        ("CCs" + "C" * 13, "skips one of the first or last 3 steps"),
        ("CCCx" + "C" * 12, "has the letter 'x'"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, text: str | None, told: str):
    path = tmp_path / "mask.txt"
    if text is not None:
        path.write_text(text)
    refused = Pattern(mask=str(path)).refuses(16)
    assert refused is not None and told in refused and str(path) in refused and "\n" not in refused
    schedule = schedule_of(sampler("flow euler", 16))
    with pytest.raises(RecipeError, match="the mask"):
        Pattern(mask=str(path)).start(schedule)


def test_reconstructions_are_all_tried_here():
    annotation = SkipPolicy.model_fields["reconstruct"].annotation
    assert set(get_args(annotation)) == {"hold", "linear-x0", "three-node"}
    assert math.isclose(sum(lagrange([0.3, 0.2, 0.1], 0.0)), 1)
