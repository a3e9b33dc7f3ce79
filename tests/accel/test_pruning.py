"""Steps on some tokens alone, in every family, against blocks that keep their own outputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

from kinora.accel.attach import accelerate
from kinora.accel.attach.blocks import BLOCKS, Kept
from kinora.accel.attach.families import FAMILIES
from kinora.accel.attach.pruning import cache_bytes
from kinora.accel.policies import Sada, Sign
from kinora.accel.policies.pruning import Pruner, PruningPolicy
from kinora.accel.receipt import StepsReceipt
from kinora.accel.recipe import Recipe
from kinora.accel.steps import Compute, Decision, Schedule, Step

from .conftest import LOOPS, SIZES, Loop, euler

STEPS = 14
LETTERS = "C" * 5 + "pppCppp" + "C" * 2


class Always(PruningPolicy):
    """A criterion by which steps 5 to 11 are unstable, and tokens where the sample is positive."""

    name: ClassVar[str] = "always"

    def start(self, schedule: Schedule) -> Any:
        """See `StepPolicy`."""
        del schedule
        return AlwaysRun(self)


class AlwaysRun:
    def __init__(self, policy: Always) -> None:
        self.pruner = Pruner(policy)

    def decide(self, step: Step, sample: torch.Tensor | None) -> Decision:
        decision: Decision = Compute()
        if sample is not None and 5 <= step.index < 12:
            decision = self.pruner.unstable(lambda: sample, skips=0)
        return self.pruner.decided(decision)

    def observe(self, *_: Any, **__: Any) -> None:
        pass

    def errors(self) -> list[float]:
        return []


def pruned(**options: Any) -> Recipe:
    return Recipe(steps=Always(prune=True, **options))


def run(
    model: Any, recipe: Recipe, *, strict: bool = False, **given: Any
) -> tuple[torch.Tensor, StepsReceipt]:
    with accelerate(model, recipe, strict=strict) as session:
        out = model(steps=STEPS, **given)
    assert session.receipt.policy is not None
    return out, session.receipt.policy


def stacks(model: Any) -> list[list[Any]]:
    """The blocks of each stack."""
    denoiser = model.denoiser
    named = dict(denoiser.named_modules())
    found = BLOCKS[type(denoiser).__name__].stacks(denoiser)
    return [[named[name] for name in it.names] for it in found]


def test_where_all_tokens_are_kept_it_is_the_whole_step(model: Any):
    """A cell of one token keeps every one: bit for bit, through all the cutting."""
    full = model(steps=STEPS)
    out, told = run(model, pruned(prune_cell=1))
    assert told.pattern == LETTERS and told.kept == 1.0
    assert torch.equal(out, full)


def test_fewer_tokens_are_another_step_and_the_receipt_says_how_many(model: Any):
    full = model(steps=STEPS)
    out, told = run(model, pruned())
    assert told.pattern == LETTERS and told.evaluations == STEPS
    assert told.kept is not None and 0.2 < told.kept < 0.95
    assert out.isfinite().all() and not torch.equal(out, full)
    fewer, less = run(model, pruned(prune_threshold=100.0))
    # Anchors alone: of nine tokens one, and more at the edges.
    assert less.kept is not None and 1 / 9 <= less.kept < 0.25
    assert not torch.equal(fewer, out)
    assert f"6 of these steps ran on {less.kept:.0%} of the tokens" in "\n".join(less.words())


class Literal:
    """The paper's rule, written out: each block runs on the kept rows, and keeps its own output.

    `shadowed` puts it on all blocks, with the tokens that a session has kept in each step.
    """

    def __init__(self, model: Any, rows: list[torch.Tensor | None]) -> None:
        self.model, self.rows, self.step, self.calls = model, rows, -1, 0
        self.blocks = BLOCKS[type(model.denoiser).__name__]
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    @contextmanager
    def shadowed(self) -> Generator[None, None, None]:
        with contextlib.ExitStack() as stack:
            denoiser, scheduler = self.model.denoiser, self.model.scheduler
            for place, block in enumerate(it for blocks in stacks(self.model) for it in blocks):
                inner = block.forward
                block.forward = self.forward(place, inner, type(block).forward)
                stack.callback(block.__dict__.pop, "forward")
            begin = denoiser.register_forward_pre_hook(self.begin)
            stack.callback(begin.remove)
            step, count = type(scheduler).step, iter(range(1, STEPS + 1))

            def stepped(this: Any, *args: Any, **kwargs: Any) -> Any:
                self.step, self.calls = next(count), 0
                return step(this, *args, **kwargs)

            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(type(scheduler), "step", stepped)
            patch.setattr(stepped, "__signature__", inspect.signature(step), raising=False)
            self.step = 0
            yield

    def begin(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, place: int, inner: Any, of: Any) -> Callable[..., Any]:
        signature = inspect.signature(of)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(None, *args, **kwargs)
            rows, key = self.rows[self.step], (self.calls, place)
            states = given.arguments["hidden_states"]
            if rows is not None:
                first = FAMILIES[type(self.model.denoiser).__name__].text_first
                kept = Kept(rows, states.shape[1], first)
                given.arguments["hidden_states"] = states[:, rows]
                for name, cut in self.blocks.cuts.items():
                    if name in given.arguments:
                        given.arguments[name] = cut(given.arguments[name], kept)
            result = inner(*given.args[1:], **given.kwargs)
            at = self.blocks.place
            out = result if at is None else result[at]
            if rows is not None:
                whole = self.kept[key].clone()
                whole[:, rows] = out
                out = whole
            self.kept[key] = out
            return out if at is None else tuple(out if i == at else x for i, x in enumerate(result))

        return forward


def test_one_output_of_a_stack_is_as_good_as_one_of_each_block(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    from kinora.accel.attach import pruning

    seen, chosen = list[torch.Tensor](), pruning.kept_tokens

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(chosen(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(pruning, "kept_tokens", noted)
    out, told = run(model, pruned())
    monkeypatch.undo()
    assert len(seen) == told.pattern.count("p") == 6, "once a step, whatever the guidance"
    order = iter(seen)
    rows = [next(order) if letter == "p" else None for letter in told.pattern]
    with Literal(model, rows).shadowed():
        expected = model(steps=STEPS)
    assert torch.equal(out, expected)


def masked(rows: torch.Tensor, tokens: int, *, text_first: bool) -> Callable[..., torch.Tensor]:
    """torch's attention, whose self-attention looks at no other picture's tokens than `rows`."""
    stock = F.scaled_dot_product_attention

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, **given: Any
    ) -> torch.Tensor:
        keys = key.shape[-2]
        if query.shape[-2] == keys >= tokens:
            start = keys - tokens if text_first else 0
            seen = torch.ones(keys, dtype=torch.bool)
            seen[start : start + tokens] = False
            seen[start + rows] = True
            attn_mask = seen[None, None, None] if attn_mask is None else attn_mask & seen
        return stock(query, key, value, attn_mask=attn_mask, **given)

    return attention


def timed(build: Callable[[str], Any]) -> Loop:
    """Wan with a time for each token, as its 5B has them."""
    denoiser = build("wan").transformer
    times = torch.linspace(100, 900, 3 * 8 * 16)[None]
    text = torch.randn(1, 6, denoiser.config.text_dim)
    given = {"encoder_hidden_states": text, "timestep": times}
    return Loop(denoiser, euler(), (1, denoiser.config.in_channels, 3, 8, 16), given)


DITS = [it for it in (*SIZES, *LOOPS) if it not in ("sdxl", "unet")]


@pytest.mark.parametrize("family", [*DITS, "wan timed"])
def test_kept_tokens_have_their_true_places(
    build: Callable[[str], Any], family: str, monkeypatch: pytest.MonkeyPatch
):
    """They come out as from blocks that run on all tokens, whose keys are the kept ones alone."""
    from kinora.accel.attach import pruning

    model, found = timed(build) if "timed" in family else build(family), dict[str, Any]()
    (blocks,), place = stacks(model), BLOCKS[type(model.denoiser).__name__].place
    chosen = pruning.kept_tokens
    text_first = FAMILIES[type(model.denoiser).__name__].text_first

    def choose(*args: Any, **kwargs: Any) -> torch.Tensor:
        found["rows"] = chosen(*args, **kwargs)
        return found["rows"]

    def enters(_: Any, args: Any, kwargs: Any) -> None:
        found.setdefault("given", []).append((args, kwargs))

    def leaves(_block: Any, _args: Any, result: Any) -> None:
        found["out"] = result if place is None else result[place]

    monkeypatch.setattr(pruning, "kept_tokens", choose)
    handles = [
        model.denoiser.register_forward_pre_hook(enters, with_kwargs=True),
        blocks[-1].register_forward_hook(leaves),
    ]

    def broken(step: int) -> None:
        if step == 5:  # the first that is pruned
            raise KeyboardInterrupt

    with accelerate(model, pruned()), pytest.raises(KeyboardInterrupt):
        model(steps=STEPS, callback=broken)
    args, kwargs = found["given"][-1]
    out, rows = found["out"], found["rows"]
    with torch.no_grad():
        model.denoiser(*args, **kwargs)
        tokens = found["out"].shape[1]
        patch = masked(rows, tokens, text_first=text_first)
        monkeypatch.setattr(F, "scaled_dot_product_attention", patch)
        model.denoiser(*args, **kwargs)
    for handle in handles:
        handle.remove()
    assert out.shape[1] == len(rows) < tokens
    torch.testing.assert_close(out, found["out"][:, rows], rtol=1e-4, atol=1e-5)


def test_only_kept_tokens_go_through_the_blocks(model: Any):
    """Seen are the tokens of every block in every call."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        counts.append(given["hidden_states"].shape[1])

    every = [it for blocks in stacks(model) for it in blocks]
    handles = [it.register_forward_pre_hook(count, with_kwargs=True) for it in every]
    _, told = run(model, pruned())
    for handle in handles:
        handle.remove()
    tokens, calls = max(counts), len(counts) // len(every)
    assert calls == told.calls and counts.count(tokens) == len(every) * calls * 8 // 14
    fewer = [it for it in counts if it < tokens]
    assert told.kept == pytest.approx(sum(fewer) / len(fewer) / tokens)


def test_what_is_kept_is_as_large_as_was_predicted(model: Any):
    denoiser, (_, told) = model.denoiser, run(model, pruned())
    family = FAMILIES[type(denoiser).__name__]
    given: dict[str, Any] = {}
    handle = denoiser.register_forward_pre_hook(
        lambda _m, args, kwargs: given.update(
            inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
        ),
        with_kwargs=True,
    )
    model(steps=2)
    handle.remove()
    grid = family.grid(denoiser.config, given)
    items = given[family.latents].shape[0] * told.calls // STEPS
    predicted = cache_bytes(family.denoiser, denoiser.config, grid, 4, items=items)
    assert told.cache_bytes == predicted > 0


@pytest.mark.parametrize("family", ["wan", "flux", "unet"])
def test_runs_leave_nothing_behind(build: Callable[[str], Any], family: str):
    model = build(family)
    full, before = model(steps=STEPS), attached(model)
    recipe = pruned()
    fresh, _ = run(model, recipe)
    assert attached(model) == before and torch.equal(model(steps=STEPS), full)

    def broken(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with accelerate(model, recipe):
        assert attached(model) != before
        first = model(steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            model(steps=STEPS, callback=broken, seed=1)
        assert torch.equal(model(steps=STEPS), first) and torch.equal(first, fresh)
    assert attached(model) == before


def attached(model: Any) -> list[Any]:
    modules = list(model.denoiser.modules())
    # Pipelines themselves leave diffusers' empty registry of hooks on the denoiser.
    return [set(vars(it)) - {"_diffusers_hook"} for it in modules] + [
        (len(it._forward_pre_hooks), len(it._forward_hooks)) for it in modules
    ]


@pytest.mark.parametrize("policy", [Sign, Sada])
def test_off_it_is_the_policy_as_it_was(build: Callable[[str], Any], policy: type[PruningPolicy]):
    model = build("ltx")
    out, told = run(model, Recipe(steps=policy()))
    same, again = run(model, Recipe(steps=policy(prune_cell=5, prune_interval=2)))
    assert torch.equal(out, same) and told.pattern == again.pattern
    assert "p" not in told.pattern and told.kept is None and told.cache_bytes == 0
    assert "prune" not in told.asked
