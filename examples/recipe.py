"""A recipe on a stock diffusers pipeline: one line, and it says what it did.

    python examples/recipe.py

With `kinora-tiny` it takes two or three minutes on two cores; any diffusers folder or repository
works.
"""

import imageio.v3 as iio
from diffusers import WanPipeline

from kinora.accel.attach import accelerate
from kinora.pipelines.tiny import WEIGHTS

pipe = WanPipeline.from_pretrained(WEIGHTS)
with accelerate(pipe, "balanced") as session:
    video = pipe("a red circle moving left", width=128, height=128, num_frames=33).frames[0]
iio.imwrite("accelerated.mp4", (video * 255).round().astype("uint8"), fps=16, codec="libx264")
print("\n".join(session.receipt.words()))
