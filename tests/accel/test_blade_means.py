"""`blade` with means of everything, as its authors count them."""

from __future__ import annotations

import torch

from kinora.accel.cost import Prediction, Shape, predict, transformer_layer
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Blade
from kinora.accel.site import Site
from kinora.accel.tiles import token_order
from kinora.accel.wrappers import Within
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan


def site(text: int = 0) -> Site:
    return Site(TokenGrid(5, 9, 20), layer=1, layers=4, step=2, steps=10, text=text, seed=5)


def smooth(at: Site) -> list[torch.Tensor]:
    """Neighbours alike, as in pictures, `[2, 3, L, 16]` each."""
    generator = torch.Generator().manual_seed(0)
    order = token_order("gilbert", at.grid, at.text, at.text_first)
    found: list[torch.Tensor] = []
    for _ in "qkv":
        x = torch.randn(2, 3, 16, at.tokens, generator=generator, dtype=torch.float64)
        mean = torch.nn.functional.avg_pool1d(x.flatten(0, 1), 65, 1, 32)
        found.append(order.undo(mean.unflatten(0, (2, 3)).mT, 2) * 8)
    return found


def planned(method: Blade, at: Site, q: torch.Tensor, k: torch.Tensor) -> BlockPlan:
    plan = method.plan(q, k, at)
    assert plan is not None
    return plan


def test_tail_double_adds_means_of_everything_to_the_same_tiles():
    at = site(text=5)
    q, k, v = smooth(at)
    plain = planned(Blade(keep=0.2, tile="64x64", tail="none"), at, q, k)
    double = planned(Blade(keep=0.2, tile="64x64", tail="double", pool=15), at, q, k)
    assert (double.means, double.tail) == (15, "none") and plain.means == 0
    assert torch.equal(double.mask(), plain.mask())
    assert torch.equal(double.density(), plain.density())
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    errors = [float((block_attention(q, k, v, it)[0] - dense).norm()) for it in (plain, double)]
    assert errors[1] < errors[0]


def test_what_counts_twice_errs_more_than_what_counts_once():
    """The more is kept, the more is counted twice; with all kept both are dense."""
    at = site()
    q, k, v = smooth(at)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v

    def error(tail: str) -> float:
        method = Blade(keep=0.8, mass=1, tile="64x64", tail=tail, pool=64)  # pyright: ignore[reportArgumentType]
        return float((block_attention(q, k, v, planned(method, at, q, k))[0] - dense).norm())

    assert error("double") > 2 * error("complement")
    for tail in ("double", "complement"):
        assert Blade(keep=1, keep_least=1, tail=tail).plan(q, k, at) is None


def test_means_of_everything_cost_their_share():
    method = Blade(tail="double", pool=20)
    assert method.beside() == 0.05 and Blade().beside() == 0
    assert method.tiling() == Blade(tail="none").tiling()
    assert method.predict(site()) == Blade(tail="none").predict(site())
    shape = Shape((transformer_layer(4, 64, 1024, text=0, cross_attention=True),) * 2)

    def predicted(tail: str) -> Prediction:
        wrapped = Within(method=Blade(tail=tail, pool=20), from_step=0.2)  # pyright: ignore[reportArgumentType]
        return predict(
            wrapped, shape, TokenGrid(9, 32, 32), device="cpu", dtype=torch.float32, steps=5,
            always=True,
        )  # fmt: skip

    none, double = predicted("none"), predicted("double")
    assert double.density == none.density and double.speedup < none.speedup
    assert double.workspace > none.workspace
