"""What a denoiser's output says: from it, the sample and the noise level to x0, and back.

A sample is x = alpha x0 + sigma n, n the noise. Which alpha and sigma belong to a step is the
scheduler's affair, see `attach.schedulers`; with them one formula for each kind of prediction
serves samples of constant variance (alpha² + sigma² = 1), of growing variance (alpha = 1) and flow
matching (alpha + sigma = 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "reverse_flow"]
"""What the output estimates: n, (alpha n - sigma x0) / |(alpha, sigma)|, x0, n - x0 or x0 - n."""


@dataclass(frozen=True, slots=True)
class Level:
    """The noise of a step.

    Attributes:
        alpha, sigma: factors of x0 and of the noise in the sample.
        time: where it is in the time of the differential equation, 1 at pure noise.
        rate: beta(time) of the diffusion whose marginals these are; 0 for flow matching.
    """

    alpha: float
    sigma: float
    time: float
    rate: float = 0.0

    @property
    def share(self) -> float:
        """sigma / (alpha + sigma), 1 for pure noise; of flow matching the sigma itself.

        Samples divided by alpha + sigma obey the equation of flow matching in it, dx = (n - x0) dt,
        so that whatever is polynomial in it is so under all parametrisations.
        """
        return self.sigma / (self.alpha + self.sigma)


@dataclass(frozen=True, slots=True)
class Codec:
    """Conversions for one kind of prediction; tensors of any shape, computed in float32 or more."""

    prediction: Prediction

    def x0(self, output: torch.Tensor, sample: torch.Tensor, level: Level) -> torch.Tensor:
        """The estimate of x0 that `output` is for `sample`."""
        m, x, (a, s) = wide(output), wide(sample), (level.alpha, level.sigma)
        match self.prediction:
            case "epsilon":
                return (x - s * m) / a
            case "v_prediction":
                square = a * a + s * s
                return (a * x - s * square**0.5 * m) / square
            case "sample":
                return m
            case "flow_prediction":
                return (x - s * m) / (a + s)
            case "reverse_flow":
                return (x + s * m) / (a + s)

    def output(self, x0: torch.Tensor, sample: torch.Tensor, level: Level) -> torch.Tensor:
        """The output for `sample` that says `x0`: the inverse of `x0`."""
        z, x, (a, s) = wide(x0), wide(sample), (level.alpha, level.sigma)
        match self.prediction:
            case "epsilon":
                return (x - a * z) / s
            case "v_prediction":
                square = a * a + s * s
                return (a * x - square * z) / (s * square**0.5)
            case "sample":
                return z
            case "flow_prediction":
                return (x - (a + s) * z) / s
            case "reverse_flow":
                return ((a + s) * z - x) / s

    def velocity(self, x0: torch.Tensor, sample: torch.Tensor, level: Level) -> torch.Tensor:
        """n - x0, the derivative of sample / (alpha + sigma) by `Level.share`."""
        return (wide(sample) - (level.alpha + level.sigma) * wide(x0)) / level.sigma


PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 or more."""
    return x if x.dtype == torch.float64 else x.float()
