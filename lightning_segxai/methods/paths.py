"""Methods that look along the path from a baseline to the volume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import LookMethod
from lightning_segxai.passes import Line, Look
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Map, Volume


@dataclass(frozen=True)
class IntegratedGradients(LookMethod):
    r"""The gradient averaged along the straight path from a baseline, times the way gone.

    $$a = \sum_c (x_c - b_c) \int_0^1 \frac{\partial S(b + t (x - b))}{\partial x_c}\, dt$$

    By Gauss-Legendre quadrature. Complete: the sum of the map is ``S(x) - S(b)``, and the map
    reports by how much it is not. For a linear network one step is exact. Costs ``steps`` forward
    and backward passes, shared, and one forward pass for ``S(b)``.

    Args:
        steps: Points on the path.
        baseline: ``blurred``, ``noise``, ``minimum``, ``zero``, or a number. A constant one is
            blind to evidence at its own value, and has no variance: networks with instance or
            group norm amplify it without bound. ``blurred`` is blind to what is smoother than
            ``sigma_mm``; ``noise`` adds chance.
        sigma_mm: Standard deviation of the blur in millimetres.

    Raises:
        ValueError: for less than one step, an unknown baseline or a width that is not positive.

    References:
        Sundararajan et al., "Axiomatic attribution for deep networks", 2017, arXiv:1703.01365.
    """

    steps: int = 16
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`IntegratedGradients(steps={self.steps})` must be at least 1.")
        Baseline(self.baseline, self.sigma_mm)

    @property
    def reference(self) -> Baseline:
        """Where the path comes from."""
        return Baseline(self.baseline, self.sigma_mm)

    @property
    def trajectory(self) -> Line:
        """The straight line."""
        return Line(self.steps, self.reference)

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A volume of zeros."""
        return torch.zeros_like(x)

    def update(self, state: Tensor, look: Look) -> None:
        """Gather the weighted gradient times the way."""
        assert look.point.baseline is not None
        way = (look.point.origin - look.point.baseline)[look.at]
        state[look.at] += look.point.weight * way * look.gradient

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Sum the channels."""
        return state.sum(dim=0)
