"""Masks of queries that take groups of keys: as written out, and Triton as torch."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from kinora.kernels import bits, masks
from kinora.kernels.masks import of_groups, subsets

BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton"),
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (128, 32), (48, 96), (20, 128), (8, 40)])
@pytest.mark.parametrize("together", [1, 2, 6])
def test_a_query_attends_to_the_keys_of_the_groups_that_it_takes(
    backend: Any, queries: int, keys: int, together: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(masks, "_TOGETHER", together)
    monkeypatch.setattr(masks, "BYTES", 4000)
    generator = torch.Generator().manual_seed(queries)
    columns, count, total, most = 7, 3, 11, 4
    taken = torch.rand(2, 3, 5, total, queries, generator=generator) < 0.4
    indices = torch.randint(0, columns, (2, 3, 5, most), generator=generator).int()
    groups = torch.stack(
        [torch.randperm(total, generator=generator)[:count] for _ in range(columns)]
    )
    # Each key is of one of a tile's groups, or of none.
    owner = torch.randint(0, count + 1, (columns, keys), generator=generator)
    here = owner == torch.arange(count)[:, None, None]  # [count, columns, keys]
    found = of_groups(
        taken.to(DEVICE), indices.to(DEVICE), groups.mT.to(DEVICE), bits.pack(here).to(DEVICE),
        backend=backend,
    ).cpu()  # fmt: skip
    assert found.shape == (2, 3, 5, most, queries, bits.words_of(keys))
    got = bits.unpack(found, keys)
    for entry in range(most):
        tile = indices[..., entry].long()  # [2, 3, 5]
        own = taken.gather(3, groups[tile][..., None].expand(-1, -1, -1, -1, queries))
        expected = torch.einsum("bhign,bhigk->bhink", own.float(), here.movedim(0, 1)[tile].float())
        assert torch.equal(got[:, :, :, entry], expected > 0)


def test_subsets_are_numbered_by_their_bits():
    found = subsets(torch.tensor([[[1]], [[2]], [[4]]], dtype=torch.int32))
    assert found.flatten().tolist() == list(range(8))
