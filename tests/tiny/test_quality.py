"""What the shipped weights can do, judged: a floor that only better weights may raise."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import pytest

from kinora.eval.world import ALL_CORRECT, judge
from kinora.pipelines.generate import generate
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle moving left over a black background",
        "a cyan triangle growing over a gradient background",
        "a green cross moving up on a white background",
        "a pink ring shrinking, right of a green square going down against a striped backdrop",
        "a green cross becoming smaller, above a yellow circle moving down over a black background",
    ],
)
def test_what_is_asked_is_drawn(prompt: str, tmp_path: Path):
    run = list(generate(Request(prompt=prompt, output=str(tmp_path / "video.mp4"))))[-1]
    assert isinstance(run, Run)
    (output,) = run.outputs
    seen = judge(iio.imread(output.path), prompt)
    assert seen[ALL_CORRECT] == 1, seen
