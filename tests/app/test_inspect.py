"""`kinora inspect`: from a prompt to a picture of a plan."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinora.accel.grid import TokenGrid
from kinora.accel.inspection import View
from kinora.accel.site import Site
from kinora.app.picture import drawn
from kinora.kernels.plan import BlockPlan, Tile

Cli = Callable[..., Any]
SMALL = ("--size", "128x128", "--frames", "5", "--steps", "2")
SPARSE = tuple(
    part
    for it in ("method=top-blocks", "tile=64x64", "keep=0.25", "from_step=0")
    for part in ("--set", f"attention.{it}")
)


def view(kept: list[int], *, text: int = 0) -> View:
    """One head, tiles of 8 tokens, the same tiles of keys for all queries."""
    grid = TokenGrid(2, 4, 8)
    tokens = grid.tokens + text
    q, k = torch.randn(2, 1, 1, tokens, 4, generator=torch.Generator().manual_seed(0))
    tiles = -(-tokens // 8)
    mask = torch.zeros(1, 1, tiles, tiles, dtype=torch.bool)
    mask[..., kept] = True
    plan = BlockPlan.from_mask(mask, tile=Tile(8, 8), queries=tokens, keys=tokens)
    return View(Site(grid, 0, 1, 0, 1, text=text), q, k, plan)


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def hues(it: View) -> tuple[int, int]:
    """Blue and red pixels, those of the legend too."""
    picture = pixels(drawn(it, [0], (0, 0, 0), []))
    warmth = picture[..., 0] - picture[..., 2]
    return int((warmth < -10).sum()), int((warmth > 5).sum())


def test_what_is_kept_is_blue_and_what_is_left_out_is_red():
    """Pixels count tiles, beside a legend that is always the same."""
    (one, _), (two, most), (other_two, _), (eight, none) = (
        hues(view(kept)) for kept in ([0], [0, 1], [0, 3], list(range(8)))
    )
    assert two == pytest.approx(other_two, rel=0.05)
    assert eight - one == pytest.approx(7 * (two - one), rel=0.05)
    assert most > 5 * none


def test_frames_that_are_kept_are_where_they_belong():
    """Of two frames of four tiles each, the second: the picture of the first has no blue."""
    picture = pixels(drawn(view([4, 5, 6, 7]), [0], (0, 0, 0), []))
    right = picture[:-60, 380:]  # without the tiles and the legend
    blue = np.nonzero((right[..., 0] - right[..., 2] < -10).any(0))[0]
    warm = np.nonzero((right[..., 0] - right[..., 2] > 5).any(0))[0]
    assert warm.max() < blue.min()


def test_text_adds_a_strip_and_a_head_a_row():
    def height(it: View, heads: list[int]) -> int:
        return pixels(drawn(it, heads, (1, 2, 3), ["title"])).shape[0]

    alone, beside = view([0, 1]), view([0, 1], text=300)
    assert height(alone, [0, 0]) > 1.5 * height(alone, [0])
    few, many = (pixels(drawn(it, [0], (1, 2, 3), []))[:-60, 380:] for it in (alone, beside))
    assert (many < 250).any(-1).sum() > (few < 250).any(-1).sum()


def test_it_draws_a_call_and_says_what_it_holds(cli: Cli, wan_folder: Path) -> None:
    asked = ("inspect", "a red circle", "--model", wan_folder, *SMALL, *SPARSE)
    called = cli(*asked, "--layer", 1, "--step", 1)
    assert called.status == 0, called.err
    path, title, words, head, *rows = called.out.splitlines()
    assert path == "top-blocks-layer1-step1.png" and "layer 1 (0 to 1), step 1 (0 to 1)" in title
    assert "tokens 2×16×16" in title and "keep 0.25" in words
    assert head.split()[:3] == ["head", "density", "recall"] and len(rows) == 2
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 700 and image.height > 500
    again = cli(*asked, "--layer", 1, "--step", 1, "--head", 1, "--query", "0,2,3", "--json")
    told = again.last
    assert told["path"] == "top-blocks-layer1-step1-2.png" and told["query"] == [0, 2, 3]
    assert (told["grid"], told["tile"], told["text"]) == ([2, 16, 16], [64, 64], 0)
    (only,) = told["heads"]
    assert only["head"] == 1 and only["density"] == 0.25
    assert 0 < only["recall"] <= only["recall_at_best"] <= 1
    with Image.open(path) as one, Image.open(told["path"]) as other:
        assert other.height < one.height


def test_it_looks_also_where_the_recipe_would_run_dense(cli: Cli, wan_folder: Path) -> None:
    called = cli("inspect", "--model", wan_folder, *SMALL, "--json")
    assert called.status == 0 and "accelerates nothing here" in called.err
    assert "; drawn is what its method would keep" in called.err
    assert called.last["recipe"]["attention"]["method"] == "blade"


def test_a_step_that_is_dense_is_told_before_anything_is_loaded(cli: Cli, wan_folder: Path) -> None:
    """And not by that the recipe accelerates nothing, as blade, which would lose here, does."""
    called = cli("inspect", "--model", wan_folder, *SMALL, "--step", 0)
    assert called.status == 2 and called.err.splitlines() == [
        "kinora: layer 1 at step 0 runs dense in the first 20% of the steps; "
        "the nearest sparse one is layer 1 at step 1"
    ]


@pytest.mark.parametrize("family", ["cogvideox", "flux"])
def test_it_draws_calls_with_text(cli: Cli, model_folders: dict[str, Path], family: str) -> None:
    frames = 9 if family == "cogvideox" else 1
    size = ("--size", "128x128", "--frames", frames, "--steps", "1")
    model = model_folders[family]
    called = cli(
        "inspect", "a red circle", "--model", model, *size, *SPARSE, "--json", "-o", "a.png"
    )
    assert called.status == 0, called.err
    assert called.last["text"] > 0 and called.last["path"] == "a.png" and Path("a.png").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--layer", 2), "the layer must be 0 to 1, not 2"),
        (("--layer", -1), "the layer must be 0 to 1, not -1"),
        (("--step", 2), "the step must be 0 to 1, not 2"),
        (("--head", 0, "--head", 7), "the head must be 0 to 1, not 7"),
        (("--query", "2,0,0"), "the frame of the query must be 0 to 1, not 2"),
        (("--query", "1,16,0"), "the row of the query must be 0 to 15, not 16"),
        (("--query", "1,2"), "must be FRAME,ROW,COLUMN, such as 4,8,8, not '1,2'"),
        (("--output", "a.jpg"), "--output a.jpg must end in .png"),
        (("--output", "there.png"), "there.png is there already: name another file"),
        (("--output", "nowhere/a.png"), "nowhere: make it first"),
        (("--recipe", "dense"), "no plan to look at: choose another --recipe"),
        (("--recipe", ""), "no recipe ''"),
        (
            ("--step", 0),
            "in the first 20% of the steps; the nearest sparse one is layer 1 at step 1",
        ),
        (("--set", "attention.method=paro"), "make one with `kinora calibrate`"),
        (
            ("--set", "attention.method=top-blocks", "--set", "attention.keep=1", "--step", "1"),
            "because keep 1 is all of 8 tiles; nowhere in this run is it sparse",
        ),
        (("--set", "attention.method=kv-merge"), "merges keys and keeps no tiles"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, wan_folder: Path, given: tuple[object, ...], told: str
) -> None:
    Path("there.png").touch()
    called = cli("inspect", "a", "--model", wan_folder, *SMALL, *given)
    assert called.status == 2 and told in called.complaint, called.err
    assert [it.name for it in Path().iterdir()] == ["there.png"]


def test_a_step_that_is_skipped_has_no_plan(cli: Cli, wan_folder: Path) -> None:
    given = ("--model", wan_folder, "--size", "128x128", "--frames", "5", "--steps", "12", *SPARSE)
    called = cli("inspect", "a", *given, "--set", "steps.policy=pattern", "--step", 5)
    assert called.status == 2 and "step 5 is skipped by pattern (" in called.complaint


def test_a_layer_that_is_reused_has_no_plan(cli: Cli, wan_folder: Path) -> None:
    given = ("--model", wan_folder, "--size", "128x128", "--frames", "5", "--steps", "12", *SPARSE)
    cache = ("--set", "steps.policy=taylorseer", "--set", "steps.use_lite_mode=true")
    called = cli("inspect", "a", *given, *cache, "--step", 5, "--layer", 1)
    assert called.status == 2 and "layer 1 is reused in step 5 by taylorseer" in called.complaint


def test_a_model_without_such_attention_is_refused(cli: Cli, unknown_folder: Path) -> None:
    called = cli("inspect", "a", "--model", unknown_folder, "--size", "32x32", "--frames", "5")
    assert called.status == 2 and "PixArtTransformer2DModel" in called.complaint
