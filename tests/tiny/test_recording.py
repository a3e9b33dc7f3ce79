"""Recorded queries, keys and values: whose they are."""

from __future__ import annotations

import pytest
import torch

from kinora.pipelines.tiny.recording import recording


def test_recorded_are_the_layers_and_steps_asked_for():
    found = recording(layers=(0, 3), steps=(1,), of=2, size_px=128)
    assert sorted(found) == [(1, 0), (1, 3)]
    for q, k, v in found.values():
        assert q.shape == k.shape == v.shape == (1, 4, 2304, 64)
    assert not torch.equal(found[1, 0][0], found[1, 3][0])
    # After norms and rotary embedding, attention is far from even.
    q, k, _ = found[1, 3]
    weights = (q[:, :, ::64] @ k.mT / 8).softmax(-1)
    assert float(weights.max(-1).values.mean()) > 10 / 2304


@pytest.mark.parametrize(("layers", "steps"), [((99,), (0,)), ((0,), (2,))])
def test_what_is_not_there_is_refused(layers: tuple[int, ...], steps: tuple[int, ...]):
    with pytest.raises(ValueError, match="there are layers 0 to 9 and steps 0 to 1"):
        recording(layers=layers, steps=steps, of=2)
