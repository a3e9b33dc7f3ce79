"""Paired differences and the 99 % rule, and totals that hide nothing."""

from __future__ import annotations

import math
import random

import pytest

from kinora.eval.paired import mean_interval, paired, verdict
from kinora.eval.result import Result, failed, ok, skipped, total


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng, held = random.Random(0), 0
    for trial in range(200):
        low, high = mean_interval([rng.gauss(3, 2) for _ in range(40)], trial)
        held += low <= 3 <= high
    assert 180 <= held <= 199


def test_pairing_is_what_makes_a_small_difference_sure() -> None:
    rng = random.Random(1)
    dense = [rng.uniform(10, 30) for _ in range(60)]
    fast = [it - rng.uniform(0.0, 0.4) for it in dense]
    found = paired(fast, dense)
    assert found.n == 60 and found.low <= found.mean <= found.high < 0
    assert found.mean == pytest.approx(math.fsum(fast) / 60 - math.fsum(dense) / 60)
    shuffled = paired(fast, dense[::-1])
    assert shuffled.mean == pytest.approx(found.mean)
    assert shuffled.high - shuffled.low > 10 * (found.high - found.low)


@pytest.mark.parametrize(
    ("fast", "dense", "kept", "sure"),
    [
        ([1.0] * 9, [1.0] * 9, True, True),
        ([0.99] * 9, [1.0] * 9, True, True),  # exactly the share
        ([0.98] * 9, [1.0] * 9, False, True),
        ([0.60, 0.80] * 8, [0.70, 0.70] * 8, True, False),
        ([0.0, 1.0], [1.0, 1.0], False, False),
    ],
)
def test_the_rule_of_99_in_100(
    fast: list[float], dense: list[float], kept: bool, sure: bool
) -> None:
    found = verdict(fast, dense)
    assert (found.kept, found.sure) == (kept, sure)
    assert found.ratio == pytest.approx(sum(fast) / sum(dense))


def test_there_is_no_verdict_without_something_to_keep() -> None:
    assert verdict([], []).kept is None and "no pairs" in verdict([], []).reason
    nothing = verdict([0.0, 0.1], [0.0, 0.0])
    assert nothing.kept is None and nothing.ratio is None and "mean is 0" in nothing.reason
    with pytest.raises(ValueError, match="2 scores cannot be paired with 1"):
        verdict([1, 2], [1])
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError):
            mean_interval(wrong)


def test_a_total_is_null_unless_all_are_there() -> None:
    whole = total([ok(1.0), ok(2.0), ok(3.0)])
    assert (whole.status, whole.mean, whole.n, whole.asked) == ("ok", 2.0, 3, 3)
    for other in (failed("broken"), skipped("no prompt"), Result("partial", 9.0, "2 of 375")):
        part = total([ok(1.0), other, ok(3.0)])
        assert part.mean is None and part.low is None and part.partial_mean == 2.0
        assert part.status == "partial" and other.reason in part.reason
    none = total([failed("broken")])
    assert none.status == "failed" and none.mean is None and none.partial_mean is None


def test_what_is_not_asked_of_a_clip_is_no_gap() -> None:
    found = total([ok(1.0), skipped("not asked", applies=False)])
    assert (found.status, found.mean, found.asked) == ("ok", 1.0, 1)
    assert total([skipped("not asked", applies=False)]).reason == "not asked"


@pytest.mark.parametrize(
    "given",
    [
        {"status": "ok"},
        {"status": "ok", "score": 1.0, "reason": "why"},
        {"status": "failed", "score": 1.0, "reason": "why"},
        {"status": "skipped"},
        {"status": "fine", "score": 1.0},
        {"status": "ok", "score": math.nan},
    ],
    ids=str,
)
def test_a_result_is_one_of_four(given: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Result.from_json(given)


def test_a_result_survives_its_json() -> None:
    for result in (ok(0.5, "lossy", frames=[1.0]), skipped("x", applies=False), failed("y")):
        assert Result.from_json(result.to_json()) == result
