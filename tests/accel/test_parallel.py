"""Two processes make what one makes: dense, by every method, with policies, of every family."""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang
from ranked import disagreeing, guided, made, replicas, stock_again

from kinora.accel.attach import accelerate
from kinora.accel.attach.parallel import plans_by_head, refusal
from kinora.accel.calibration import Tally, observed_steps
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import METHODS
from kinora.accel.recipe import from_table
from kinora.accel.site import Site
from kinora.kernels.merging import KeyMerge

from .conftest import Build

ULYSSES = {"parallel": {"ulysses": 2}}
GRID = TokenGrid(4, 8, 16)  # of `ltx`
ATTENTION: dict[str, dict[str, Any]] = {
    "blade": {},
    "hierarchical": {"tile": "64x64", "blocks": 2, "branch": 2},
    "kv-merge": {},
    "neighborhood": {"height": 0.9, "width": 0.9},
    "paro": {},
    "permuted-blocks": {},
    "sliding-tile": {"frames": 0.5, "height": 0.5, "width": 0.5},
    "threshold-blocks": {"tile": "64x64", "rule": "top"},
    "top-blocks": {"tile": "64x64", "keep": 0.3},
    "vmoba": {},
    "x-attention": {"threshold": 0.5, "least": 0.0},
    "kv-merge together": {"heads": "shared"},
    "top-blocks by-head": {"tile": "64x64", "keep": 0.3, "budget": "by-head"},
    "vmoba global": {"scope": "global", "keep": 0.25},
}


@pytest.fixture(scope="module")
def pair() -> Generator[Gang, None, None]:
    """Two ranks."""
    gang = Gang(2)
    yield gang
    gang.close()


@pytest.fixture
def folders(model_folders: dict[str, Path]) -> dict[str, str]:
    return {family: str(path) for family, path in model_folders.items()}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For `paro` on `ltx`, of random heads."""
    site = Site(GRID, layer=0, layers=2, step=0, steps=8)
    tally = Tally(keep=0.3, balance=0.5, sample=1)
    for layer, step in itertools.product(range(2), observed_steps(8)):
        generator = torch.Generator().manual_seed(10 * layer + step)
        q, k = (torch.randn(1, 2, GRID.tokens, 8, generator=generator) for _ in range(2))
        where = Site(GRID, layer=layer, layers=2, step=step, steps=8)
        tally.observe(q, k, where)
    path = tmp_path_factory.mktemp("paro") / "paro.npz"
    path.write_bytes(tally.finish("tiny", site).to_bytes())
    return str(path)


def attention(name: str, calibration: str) -> dict[str, Any]:
    method = name.split()[0]
    more = {"calibration": calibration} if method == "paro" else {}
    return {"method": method, **ATTENTION[name], **more}


def same(pair: Gang, family: str, folder: str, table: dict[str, Any], asked: dict[str, Any],
         steps: int = 3) -> list[dict[str, Any]]:  # fmt: skip
    """That both ranks make what one process makes; the receipts, that of one process first."""
    alone, receipt = made(family, folder, table, steps)
    found = pair.run(made, family, folder, {**table, **asked}, steps)
    for latents, _ in found:
        torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][0], found[1][0])
    return [receipt, *(told for _, told in found)]


@pytest.mark.long
@pytest.mark.parametrize("family", ("wan", "cogvideox", "flux", "ltx", "hunyuan", "qwen"))
def test_tokens_shared(pair: Gang, folders: dict[str, str], family: str) -> None:
    same(pair, family, folders.get(family, ""), {}, ULYSSES)


@pytest.mark.parametrize("name", ATTENTION)
def test_methods_have_the_plans_of_all_heads(pair: Gang, name: str, calibration: str) -> None:
    table = {"attention": attention(name, calibration)}
    alone, *shared = same(pair, "ltx", "", table, ULYSSES)
    assert alone["attention"]["kernels"], "some calls are not dense"
    for told in shared:
        assert told["processes"] == 2
        for key in ("kernels", "dense", "density", "density_by_layer"):
            assert told["attention"][key] == pytest.approx(alone["attention"][key])


def test_every_method_is_tried() -> None:
    assert {it.split()[0] for it in ATTENTION} == set(METHODS)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "hunyuan", "qwen"])
def test_a_method_beside_text(pair: Gang, folders: dict[str, str], family: str) -> None:
    method = {"method": "top-blocks", "keep": 0.3, "every": 2, "tile": "64x64"}
    table = {"attention": method}
    alone, one, _ = same(pair, family, folders.get(family, ""), table, ULYSSES)
    assert alone["attention"]["kernels"]
    assert one["attention"]["density"] == pytest.approx(alone["attention"]["density"], abs=2e-4)


@pytest.mark.parametrize("name", ATTENTION)
def test_which_methods_plan_by_head(name: str, calibration: str) -> None:
    """A head has the plan alone that it has beside others; of some methods it has not."""
    method = from_table({"attention": attention(name, calibration)}).attention
    assert method is not None
    if not plans_by_head(method) and name not in ("kv-merge together", "vmoba global"):
        return  # there is nothing that it would have to be
    site = Site(GRID, layer=1, layers=2, step=2, steps=8)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, GRID.tokens, 8, generator=generator) for _ in range(2))
    q[:, 0] *= 5  # heads that look at few tokens and at many
    alike: list[bool] = []
    for head in (slice(0, 1), slice(1, 2)):
        every, alone = method.start()(q, k, site), method.start()(q[:, head], k[:, head], site)
        assert every is not None and alone is not None
        of_all = every.of_heads(head)
        if isinstance(of_all, KeyMerge):
            assert isinstance(alone, KeyMerge)
            alike.append(torch.equal(of_all.joins, alone.joins))
        else:
            assert not isinstance(alone, KeyMerge)
            alike.append(torch.equal(of_all.token_mask(), alone.token_mask()))
    assert all(alike) == plans_by_head(method)


@pytest.mark.parametrize("policy", ["sada", "shadow", "pattern", "easy", "sign"])
@pytest.mark.parametrize("asked", [{"ulysses": 2}, {"cfg": 2}], ids=str)
def test_policies_decide_alike(pair: Gang, folders: dict[str, str], policy: str,
                               asked: dict[str, int]) -> None:  # fmt: skip
    options = {"shadow": {"threshold": 0.5}, "easy": {"threshold": 0.5}}.get(policy, {})
    table = {"steps": {"policy": policy, **options}}
    alone, one, two = same(pair, "wan", folders["wan"], table, {"parallel": asked}, steps=16)
    assert "s" in alone["policy"]["pattern"]
    assert alone["policy"]["pattern"] == one["policy"]["pattern"] == two["policy"]["pattern"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("wan", {"policy": "taylorseer", "use_lite_mode": True}),
        ("cogvideox", {"policy": "pyramid-attention-broadcast"}),
        ("cogvideox", {"policy": "faster-cache"}),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_caches_that_go_by_steps(
    pair: Gang, folders: dict[str, str], family: str, options: dict[str, Any]
) -> None:
    alone, *shared = same(pair, family, folders[family], {"steps": options}, ULYSSES, steps=16)
    assert "r" in alone["cache"]["pattern"]
    assert all(it["cache"] == alone["cache"] for it in shared)


def test_where_they_would_decide_otherwise_all_evaluate(
    pair: Gang, folders: dict[str, str]
) -> None:
    patterns = pair.run(disagreeing, "wan", folders["wan"])
    assert patterns[0] == patterns[1] and "s" not in patterns[0]


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("method", [None, "top-blocks"])
def test_guidance_shared(pair: Gang, folders: dict[str, str], family: str,
                         method: str | None) -> None:  # fmt: skip
    table = {"attention": {"method": method, "keep": 0.3, "every": 2}} if method else {}
    same(pair, family, folders.get(family, ""), table, {"parallel": {"cfg": 2}})


@pytest.mark.parametrize("asked", [{"cfg": 2}, {"ulysses": 2}], ids=str)
def test_guidance_in_calls_of_its_own(pair: Gang, asked: dict[str, int]) -> None:
    alone = guided(False, None)
    for latents in pair.run(guided, False, asked):
        torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-5)


def test_a_branch_that_is_looked_at_too_early(pair: Gang) -> None:
    with pytest.raises(AssertionError, match="looked at a branch before both were there"):
        pair.run(guided, True, {"cfg": 2})


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux"])
def test_ring(pair: Gang, folders: dict[str, str], family: str) -> None:
    same(pair, family, folders[family], {}, {"parallel": {"ring": 2}})


def test_it_is_stock_again_afterwards(pair: Gang, folders: dict[str, str]) -> None:
    assert all(pair.run(stock_again, "cogvideox", folders["cogvideox"]))


@pytest.mark.long
def test_four_processes_in_every_arrangement(folders: dict[str, str]) -> None:
    gang = Gang(4)
    try:
        table = {"attention": {"method": "top-blocks", "keep": 0.3}}
        for asked in ({"ulysses": 2}, {"ulysses": 2, "cfg": 2}, {"cfg": 2}):
            found = gang.run(replicas, "wan", folders["wan"], {**table, "parallel": asked})
            for rank, (seed, latents) in enumerate(found):
                expected, _ = made("wan", folders["wan"], table, 3, seed)
                torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
                together = asked.get("ulysses", 1) * asked.get("cfg", 1)
                assert seed == rank // together, "each replica makes another video"
        found = gang.run(made, "wan", folders["wan"], {"parallel": {"ring": 2, "ulysses": 2}}, 3)
        alone, _ = made("wan", folders["wan"], {}, 3)
        for latents, _ in found:
            torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-5)
    finally:
        gang.close()


SPARSE = {"method": "top-blocks"}
WAN = {"num_attention_heads": 12}


@pytest.mark.parametrize(
    ("table", "denoiser", "config", "told"),
    [
        ({"ulysses": 5}, "WanTransformer3DModel", WAN, "does not divide the 12 heads .* 2, 3, 4"),
        ({"ulysses": 2}, "MochiTransformer3DModel", WAN, "cannot be shared by processes"),
        ({"ring": 2, "attention": SPARSE}, "WanTransformer3DModel", WAN, "use parallel.ulysses"),
        ({"ring": 2, "dense_kernel": "flash"}, "WanTransformer3DModel", WAN, "logarithms of sums"),
        (
            {"ulysses": 2, "steps": {"policy": "first-block-cache"}},
            "WanTransformer3DModel",
            WAN,
            "in each process for itself",
        ),
        (
            {"ulysses": 2, "steps": {"policy": "mag-cache", "mag_ratios": "1.0 1.0"}},
            "WanTransformer3DModel",
            WAN,
            "adds? to all tokens",
        ),
        (
            {"cfg": 2, "steps": {"policy": "taylorseer"}},
            "WanTransformer3DModel",
            WAN,
            "in each process for itself",
        ),
        (
            {"ulysses": 2, "steps": {"policy": "sada", "prune": True}},
            "WanTransformer3DModel",
            WAN,
            "steps.prune leaves out tokens",
        ),
        (
            {"cfg": 2, "attention": {**SPARSE, "branches": "shared"}},
            "WanTransformer3DModel",
            WAN,
            "each branch is in another process",
        ),
        (
            {"ulysses": 2},
            "HunyuanVideoTransformer3DModel",
            {"num_attention_heads": 24, "image_condition_type": "token_replace"},
            "treat tokens by their place",
        ),
    ],
)
def test_refused(table: dict[str, Any], denoiser: str, config: dict[str, Any], told: str) -> None:
    factors = {key: table.pop(key) for key in ("ulysses", "ring", "cfg") if key in table}
    recipe = from_table({**table, "parallel": factors})
    assert re.search(told, refusal(recipe, denoiser, config) or "")


def test_alone_it_says_how_to_start(build: Build) -> None:
    told = pytest.raises(AccelerationError, match="torchrun --nproc-per-node 2")
    with told, accelerate(build("ltx"), from_table(ULYSSES)):
        pass


@pytest.mark.parametrize(
    ("family", "asked", "told"),
    [
        ("wan", {"ulysses": 3}, "does not divide"),
        ("hunyuan", {"ring": 2}, "some tokens are masked"),
        ("flux", {"cfg": 2}, "is called once a step"),
        ("ltx", {"cfg": 2}, "is called for one"),
    ],
)
def test_refused_together(
    pair: Gang, folders: dict[str, str], family: str, asked: dict[str, int], told: str
) -> None:
    with pytest.raises(AssertionError, match=told):
        pair.run(made, family, folders.get(family, ""), {"parallel": asked}, 3)
