"""The page of step policies is what the definitions say, and the command line says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.accel.facts import facts
from kinora.accel.options import options_of
from kinora.accel.policies import POLICIES
from kinora.accel.steps import StepPolicy
from kinora.app.policies_page import page

Cli = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_policies_is_up_to_date() -> None:
    assert (DOCS / "policies.md").read_text(encoding="utf-8") == page(), (
        "make it again: python -m kinora.app.policies_page > docs/policies.md"
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=str)
def test_every_policy_says_what_it_is(policy: type[StepPolicy]) -> None:
    found = facts(policy)
    assert found.name == policy.name and found.short.endswith(".")
    ours = found.source.startswith("ours")
    assert ours == (not found.papers) == (not found.licence)
    assert all(paper in found.source for paper in found.papers), "Source names the papers"
    assert {it.name for it in found.options} == {it.name for it in options_of(policy)}
    told = page().partition(f"\n## {policy.name}\n")[2].partition("\n## ")[0]
    for part in (*found.rule, *found.differs.values(), found.licence, found.use_when):
        assert part in told
    for it in found.options:
        assert f"| `{it.name}` |" in told and it.allowed() in told


def test_the_command_line_tells_the_same(cli: Cli) -> None:
    every = cli("policies", "--json").last["policies"]
    assert [it["name"] for it in every] == list(POLICIES)
    named = {it["name"]: it for it in every}
    assert cli("policies", "show", "sada", "--json").last["policy"] == named["sada"]
    shown = cli("policies", "show", "sada").out
    for told in ("https://arxiv.org/abs/2507.17135", "not as the paper", "lagrange_every"):
        assert told in shown
    ours = cli("policies", "show", "shadow").out
    assert "ours; no paper" in ours and "licence" not in ours and "arxiv" not in ours
    cache = cli("policies", "show", "first-block-cache").out
    assert "diffusers runs it, Apache-2.0" in cache and "written anew" not in cache
    refused = cli("policies", "show", "shado")
    assert refused.status == 2 and "did you mean shadow" in refused.complaint


def test_a_policy_is_chosen_on_the_command_line(cli: Cli, wan_folder: Path) -> None:
    small = ("--model", wan_folder, "--size", "32x32", "--frames", "5", "--steps", "14")
    called = cli("generate", "a red circle", *small, "--set", "steps.policy=pattern")
    assert called.status == 0
    assert "ran: 10 of 14 steps evaluated in 20 calls of the denoiser, 4 skipped" in called.out
    assert "estimated error of what stood for a skipped step" in called.out
    plan = cli("plan", *small, "--set", "steps.policy=pattern")
    assert plan.status == 0 and "10 of 14 steps evaluated" in plan.out
    assert "1.40 times as fast" in plan.out
    adaptive = cli("plan", *small, "--set", "steps.policy=shadow", "--json").last["parts"][0]
    assert adaptive["verdict"] == "ok" and adaptive["speedup"] is None
    assert adaptive["why"] == "10 to 14 of 14 steps evaluated, as the run goes"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["steps.policy=shado"], "no step policy 'shado' (did you mean shadow?)"),
        (["steps.threshold=0.1"], "dense skips no steps; choose another --recipe or set steps.pol"),
        (["steps.policy=shadow", "steps.threshhold=1"], "did you mean threshold"),
        (["steps.policy=shadow", "steps.threshold=-1"], "steps.threshold must be a number from 0"),
        (["steps.policy=pattern", "steps.pattern=CC"], "steps.pattern is 'CC'; it must be letters"),
        (["steps.policy=sign", "steps.to_step=0.1"], "steps.from_step 0.2 must be below"),
        (["step.policy=sign"], "no part 'step' (did you mean steps?)"),
        (["policy=sign"], "did you mean steps.policy"),
        (["steps.policy=pattern", "steps.mask=none.txt"], "the mask none.txt cannot be read"),
    ],
)
def test_a_policy_that_does_not_fit_is_one_line(
    cli: Cli, wan_folder: Path, settings: list[str], told: str
) -> None:
    given = [part for it in settings for part in ("--set", it)]
    called = cli("generate", "a", "--model", wan_folder, "--size", "32x32", *given)
    assert called.status == 2 and told in called.complaint and not list(Path().iterdir())


def test_a_cache_is_chosen_on_the_command_line(cli: Cli, wan_folder: Path) -> None:
    small = ("--model", wan_folder, "--size", "32x32", "--frames", "5", "--steps", "8")
    chosen = ("--set", "steps.policy=taylorseer", "--set", "steps.use_lite_mode=true")
    called = cli("generate", "a red circle", *small, *chosen)
    assert called.status == 0
    assert "calls of 3 modules reused, in 4 of 8 steps: CCCrCrrr" in called.out
    plan = cli("plan", *small, *chosen, "--json").last["parts"][0]
    assert (plan["verdict"], plan["speedup"]) == ("ok", None)
    assert plan["why"] == "all steps run, modules in them are reused as the run goes"
    why = "taylorseer found no module in WanTransformer3DModel to stand on: set steps.use_lite_mode"
    plan = cli("plan", *small, "--set", "steps.policy=taylorseer", "--json").last["parts"][0]
    assert (plan["verdict"], plan["speedup"]) == ("idle", 1) and plan["why"].startswith(why)
    inert = cli("generate", "a red circle", *small, "--set", "steps.policy=taylorseer")
    assert inert.status == 0 and "inert: taylorseer found no module" in inert.out
    strict = cli("generate", "a", *small, "--set", "steps.policy=taylorseer", "--strict")
    assert strict.status == 2
    assert "strict: steps would not run as asked, taylorseer found no" in strict.complaint


@pytest.mark.parametrize("name", ["faster-cache", "pyramid-attention-broadcast", "mag-cache"])
def test_a_cache_that_is_wrong_is_refused_before_the_model_is_loaded(
    cli: Cli, wan_folder: Path, name: str
) -> None:
    given = ("--model", wan_folder, "--size", "32x32", "--set", f"steps.policy={name}")
    called = cli("generate", "a", *given)
    assert called.status == 2 and "WanTransformer3DModel" in called.complaint
    part = cli("plan", *given, "--json").last["parts"][0]
    assert part["verdict"] == "refused" and part["why"] in called.complaint


def test_too_few_steps_are_refused_before_the_model_is_loaded(cli: Cli, wan_folder: Path) -> None:
    few = ("--model", wan_folder, "--size", "32x32", "--steps", "8", "--set", "steps.policy=sada")
    called = cli("generate", "a", *few)
    assert called.status == 2 and "need 12 steps or more, this run has 8" in called.complaint
    assert "refused" in cli("plan", *few).out
