"""Which steps are pruned, and which tokens of these are kept."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.errors import AccelerationError, RecipeError
from kinora.accel.grid import TokenGrid
from kinora.accel.policies import POLICIES, Sada, Sign
from kinora.accel.policies.pruning import Pruner, PruningPolicy
from kinora.accel.recipe import from_table
from kinora.accel.steps import Compute, Decision, Prune, Skip, Step
from kinora.accel.tokens import kept_tokens

from .sampling import mixture, sampler

GRIDS = [TokenGrid(1, 9, 9), TokenGrid(2, 7, 11), TokenGrid(3, 1, 4), TokenGrid(1, 1, 1)]


def scores(grid: TokenGrid, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """`[B, C, F, H, W]`, as many as tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, grid.frames, grid.height, grid.width, generator=generator)


def flags(rows: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    found = torch.zeros(grid.tokens, dtype=torch.bool)
    found[rows] = True
    return found.reshape(grid.frames, grid.height, grid.width)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("cell", [1, 2, 3, 5, 64])
def test_each_cell_of_each_frame_has_one_anchor(grid: TokenGrid, cell: int):
    rows = kept_tokens(Prune(-scores(grid).abs(), cell, 1.0), grid, seed=3)
    assert torch.equal(rows, rows.unique()), "ascending, none twice"
    kept = flags(rows, grid)
    down, right = range(0, grid.height, cell), range(0, grid.width, cell)
    for frame, y, x in itertools.product(range(grid.frames), down, right):
        assert kept[frame, y : y + cell, x : x + cell].sum() == 1
    assert len(rows) == grid.frames * len(down) * len(right)


def test_anchors_are_drawn_anew_and_reach_every_token():
    grid, prune = TokenGrid(1, 7, 8), Prune(-torch.ones(1, 4, 1, 7, 8), 3, 1.0)
    draws = [kept_tokens(prune, grid, seed=it) for it in range(60)]
    assert torch.equal(draws[5], kept_tokens(prune, grid, seed=5))
    assert len({tuple(it.tolist()) for it in draws}) > 50
    assert torch.stack([flags(it, grid) for it in draws]).any(dim=0).all()
    before = torch.get_rng_state()
    kept_tokens(prune, grid, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the pipeline's own noise is its own"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7])
def test_unstable_tokens_are_kept(grid: TokenGrid, threshold: float):
    given = scores(grid)
    mean = given.mean(dim=1)[0]
    unstable = mean >= threshold * mean.abs().mean()
    rows = kept_tokens(Prune(given, 64, threshold), grid, seed=0)
    anchors = kept_tokens(Prune(-given.abs(), 64, 1.0), grid, seed=0)
    assert torch.equal(flags(rows, grid), unstable | flags(anchors, grid))
    # The sum of all decides a step, and that of a token a token, whatever the scale.
    assert torch.equal(rows, kept_tokens(Prune(7 * given, 64, threshold), grid, seed=0))


def test_a_higher_threshold_keeps_fewer_and_none_at_all_loses():
    grid = TokenGrid(2, 12, 12)
    counts = [
        len(kept_tokens(Prune(scores(grid), 4, it), grid, seed=0)) for it in (-100, -1, 0, 1, 100)
    ]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5
    assert counts[0] == grid.tokens and counts[-1] == 2 * 9


def test_a_patch_is_one_token_as_if_it_were_packed():
    """`[B, C, F, 2H, 2W]`, `[B, F, C, 2H, 2W]` and `[B, L, 4C]` of the same numbers."""
    grid, given = TokenGrid(2, 4, 5), scores(TokenGrid(2, 8, 10), 1)
    packed = given.unflatten(4, (5, 2)).unflatten(3, (4, 2)).permute(0, 2, 3, 5, 1, 4, 6)
    packed = packed.flatten(4).flatten(1, 3)
    one, two, three = (
        kept_tokens(Prune(it, 3, 0.0), grid, seed=0, channels=channels)
        for it, channels in ((given, 1), (given.transpose(1, 2), 2), (packed, 1))
    )
    assert torch.equal(one, two) and torch.equal(one, three)


def test_of_several_videos_a_token_is_kept_for_all_that_one_keeps():
    grid, given = TokenGrid(2, 6, 6), scores(TokenGrid(2, 6, 6), batch=2)
    # The threshold is of what all of them are; 0 is the same for one.
    both = flags(kept_tokens(Prune(given, 3, 0.0), grid, seed=0), grid)
    each = [flags(kept_tokens(Prune(it[None], 3, 0.0), grid, seed=0), grid) for it in given]
    assert torch.equal(both, each[0] | each[1]) and not torch.equal(both, each[0])
    alike = given[:1].expand(2, -1, -1, -1, -1)
    assert torch.equal(flags(kept_tokens(Prune(alike, 3, 0.0), grid, seed=0), grid), each[0])


def test_behind_a_convolution_a_quarter_of_its_tokens_makes_one_unstable():
    grid, given = TokenGrid(1, 8, 8), -torch.ones(1, 4, 8, 8)
    given[..., 0, 0] = 1.0  # one of four
    given[..., 4:6, 4:6] = 1.0
    rows = kept_tokens(Prune(given, 64, 0.0), grid, seed=0, halvings=1)
    anchor = kept_tokens(Prune(-given.abs(), 64, 0.0), grid, seed=0, halvings=1)
    assert set(rows.tolist()) == {0, 10} | set(anchor.tolist())
    odd = kept_tokens(Prune(scores(TokenGrid(1, 7, 5))[:, :, 0], 1, 0.0), TokenGrid(1, 7, 5),
                      seed=0, halvings=1)  # fmt: skip
    assert odd.tolist() == list(range(4 * 3))


@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 7, 10), (1, 4, 8, 10), (1, 39, 16), (1, 4, 1, 4, 5), (1, 4, 2, 3, 8, 10)]
)
def test_a_sample_that_is_no_such_grid_is_refused(shape: tuple[int, ...]):
    with pytest.raises(AccelerationError, match=r"cannot be cut into a grid of 2×4×5 tokens"):
        kept_tokens(Prune(torch.zeros(shape), 3, 0.0), TokenGrid(2, 4, 5), seed=0)


# --- which steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [2, 3, 4, 20])
def test_the_last_of_an_interval_is_whole(interval: int):
    pruner = Pruner(Sada(prune=True, prune_interval=interval))
    letters = ""
    for _ in range(45):
        decision = pruner.decided(pruner.unstable(lambda: torch.zeros(1), skips=0))
        letters += "p" if isinstance(decision, Prune) else "C"
    assert letters == (("p" * (interval - 1) + "C") * 45)[:45]


def test_nothing_is_pruned_after_a_skip_or_where_it_is_off():
    def never() -> torch.Tensor:
        raise AssertionError("the scores are not asked for")

    assert isinstance(Pruner(Sada(prune=True)).unstable(never, skips=1), Compute)
    assert isinstance(Pruner(Sada()).unstable(never, skips=0), Compute)


def rough(schedule: Any, index: int, x: torch.Tensor) -> torch.Tensor:
    """A network that swings from step to step: its curve bends away as often as it bends back."""
    noise = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(7))
    return mixture(schedule, index, x) + sum(
        (it * math.sin((0.5 + 0.2 * i) * index) for i, it in enumerate(noise)), torch.zeros(())
    )


def decisions(name: str, policy: PruningPolicy, steps: int) -> list[Decision]:
    """What is decided in a run in which a pruned step gives what a whole one does."""
    scheduler = sampler(name, steps)
    schedule = schedule_of(scheduler)
    ran = policy.start(schedule)
    level = schedule.levels[0]
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    x, left, found = x * (level.alpha + level.sigma), None, list[Decision]()
    for index, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        found.append(decision := ran.decide(Step(index, steps), left))
        skipped = isinstance(decision, Skip)
        output = decision.output if skipped else schedule.output(
            rough(schedule, index, x), x, index
        )  # fmt: skip
        ran.observe(Step(index, steps), output, x, computed=not skipped)
        x = left = scheduler.step(output, t, x, return_dict=False)[0]
    return found


LETTERS = {Compute: "C", Prune: "p", Skip: "s"}


@pytest.mark.parametrize("name", ["dpm++ eps", "unipc flow", "flow euler", "ddim v"])
@pytest.mark.parametrize(
    "kind", [Sada(max_interval=1, lagrange_step=0.7), Sign(), Sign(max_skip=0), Sada()], ids=str
)
@pytest.mark.parametrize("interval", [2, 4])
def test_pruned_is_what_is_unstable_after_an_evaluated_step(name: str, kind: Any, interval: int):
    asked = kind.model_copy(update={"prune": True, "prune_interval": interval})
    on = decisions(name, asked, 40)
    letters = "".join(LETTERS[type(it)] for it in on)
    off = "".join(LETTERS[type(it)] for it in decisions(name, kind, 40))
    assert letters.replace("p", "C") == off, "no other step is skipped for it"
    assert "sp" not in letters and "p" * interval not in letters
    window = kind.window(40)
    assert "p" not in letters[: window[0]] + letters[window[-1] + 1 :]
    for decision in on:
        if isinstance(decision, Prune):
            # As a step is unstable by the sum of all terms.
            assert decision.scores.double().sum() >= 0
            assert (decision.cell, decision.threshold) == (3, 0.0)
            assert decision.scores.shape == (1, 4, 6, 6)


def test_some_of_these_runs_are_pruned():
    """Else the test above would hold nothing."""
    policies = [Sign(max_skip=0, prune=True), Sada(prune=True)]
    for policy in policies:
        assert any(isinstance(it, Prune) for it in decisions("ddim v", policy, 40))


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("prune", "yes", "must be true or false"),
        ("prune_cell", 0, r"a whole number from 1 to 64 \(tokens\), not 0"),
        ("prune_cell", 2.5, "must be a whole number"),
        ("prune_interval", 1, r"a whole number from 2 to 20 \(steps\), not 1"),
        ("prune_threshold", float("nan"), "must be a number from -100 to 100"),
        ("prune_cells", 3, r"has no option 'prune_cells' \(did you mean prune_cell\?\)"),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, value: Any, told: str):
    for name in ("sada", "sign"):
        with pytest.raises(RecipeError, match=told):
            from_table({"steps": {"policy": name, option: value}})


def test_only_policies_with_a_criterion_have_it():
    assert {name for name, it in POLICIES.items() if issubclass(it, PruningPolicy)} == {
        "sada",
        "sign",
    }
    with pytest.raises(RecipeError, match="shadow has no option 'prune'"):
        from_table({"steps": {"policy": "shadow", "prune": True}})
    assert "prune cell 3" in Sada(prune=True).words() and "prune" not in Sada().words()
