"""The token grid."""

from __future__ import annotations

import pytest

from kinora.accel.grid import TokenGrid


def test_tokens_are_the_product() -> None:
    grid = TokenGrid(frames=9, height=16, width=32)
    assert grid.tokens == 9 * 16 * 32 and str(grid) == "9×16×32"


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_an_empty_grid_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        TokenGrid(*sizes)
