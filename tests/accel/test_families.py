"""Which tokens the self-attention of each family sees, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site
from kinora.accel.wrappers import Reuse

Build = Callable[[str], Any]


def sites(model: Any, steps: int = 1) -> list[tuple[Site, torch.Tensor]]:
    """What a method is asked in a run: sites and queries."""
    seen: list[tuple[Site, torch.Tensor]] = []

    class Spy(TopBlocks):
        """Notes them."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
            seen.append((site, q.clone()))
            return super().plan(q, k, site)

    recipe = Recipe(attention=Spy(keep=0.5, tile="64x64"), when="always")
    with accelerate(model, recipe) as session:
        model(steps=steps)
    ran = session.receipt.attention
    assert ran is not None and ran.calls == len(seen) == sum(ran.kernels.values())
    assert len(ran.layer_names) == ran.layers == len(set(ran.layer_names))
    return seen


VIDEO = TokenGrid(4, 8, 16)
TOKENS: dict[str, tuple[TokenGrid, int, bool, tuple[Any, ...], int]] = {
    "wan": (TokenGrid(3, 16, 16), 0, False, (0, slice(None), 1, 2, 3), 256 + 2 * 16 + 3),
    "cogvideox": (TokenGrid(3, 8, 8), 226, True, (0, 1, slice(None), 4, 6), 226 + 64 + 2 * 8 + 3),
    "flux": (TokenGrid(1, 16, 16), 512, True, (0, 16 + 5), 512 + 16 + 5),
    "ltx": (VIDEO, 0, False, (0, 128 + 3 * 16 + 2), 128 + 3 * 16 + 2),
    "hunyuan": (VIDEO, 5, False, (0, slice(None), 1, 2, 3), 128 + 2 * 16 + 3),
    "qwen": (TokenGrid(1, 16, 32), 7, True, (0, 32 + 5), 7 + 32 + 5),
    "mochi": (VIDEO, 8, False, (0, slice(None), 1, 2, 3), 128 + 2 * 16 + 3),
    "sd3": (TokenGrid(1, 16, 32), 9, False, (0, slice(None), 4, 7), 2 * 32 + 3),
}
"""Of each family: the grid, tokens of text, whether those are first, a place in the latents, and
which query that place is."""


@pytest.mark.parametrize("family", TOKENS)
def test_a_place_in_the_latents_is_the_query_that_the_grid_says(build: Build, family: str) -> None:
    grid, text, first, place, number = TOKENS[family]
    changed = build(family)

    def change(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        latents = given["hidden_states"].clone()
        # No constant, which a norm would take away.
        latents[place] += torch.randn(latents[place].shape)
        return args, {**given, "hidden_states": latents}

    changed.transformer.register_forward_pre_hook(change, with_kwargs=True)
    (site, before), (_, after) = sites(build(family))[0], sites(changed)[0]
    assert (site.grid, site.text, site.text_first or not text) == (grid, text, first or not text)
    assert before.shape[2] == site.tokens
    rows = (before != after).any(3).any(1)[0].nonzero()[:, 0].tolist()
    assert rows == [number] and not site.is_text()[number]


@pytest.mark.parametrize("family", ["hunyuan", "qwen", "cogvideox", "flux", "sd3"])
def test_text_is_where_the_site_says(build: Build, family: str) -> None:
    changed = build(family)

    def change(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        text = given["encoder_hidden_states"]
        return args, {**given, "encoder_hidden_states": text + torch.randn(text.shape)}

    changed.transformer.register_forward_pre_hook(change, with_kwargs=True)
    (site, before), (_, after) = sites(build(family))[0], sites(changed)[0]
    rows = (before != after).any(3).any(1)[0]
    assert torch.equal(rows, site.is_text())


def test_mochi_attends_for_each_item_alone_and_without_padding(build: Build) -> None:
    model = build("mochi")
    seen = sites(model, steps=2)
    told = [(site.step, site.layer, site.item, site.text, len(q)) for site, q in seen]
    assert told == [
        (step, layer, item, text, 1)
        for step in range(2)
        for layer in range(2)
        for item, text in enumerate((8, 5))
    ]


def test_items_that_are_attended_to_alone_keep_plans_of_their_own(build: Build) -> None:
    model = build("mochi")
    model.arguments["encoder_attention_mask"][:] = True
    often, once = (
        Recipe(
            attention=Reuse(method=TopBlocks(keep=0.3, tile="64x64"), every=every), when="always"
        )
        for every in (1, 2)
    )
    with accelerate(model, often):
        expected = model(steps=1)
    with accelerate(model, once):
        assert torch.equal(model(steps=1), expected)


def test_sd3_has_layers_without_text_and_may_skip_some(build: Build) -> None:
    model = build("sd3")
    assert [(it.layer, it.text) for it, _ in sites(model)] == [(0, 9), (1, 0), (2, 9)]
    model.arguments["skip_layers"] = [0]
    assert [(it.layer, it.text, it.layers) for it, _ in sites(model)] == [(2, 9, 3)]
