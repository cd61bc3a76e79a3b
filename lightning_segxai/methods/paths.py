"""Methods that look along the way from a baseline to the volume."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank, draws
from lightning_segxai.methods import adaptive
from lightning_segxai.methods.base import Complete, LookMethod
from lightning_segxai.passes import Look
from lightning_segxai.rules.compared import Frozen
from lightning_segxai.rules.statistics import Norm, check_norm
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.trajectories import Line, Scatter
from lightning_segxai.values import Map, Shape, Volume


@dataclass(eq=False)
class Gain:
    """The map so far, and the baselines' score."""

    values: Tensor
    start: float = 0.0


class _PathMethod(LookMethod):
    """The gradient times the way gone, averaged over points; complete."""

    def start(self, model: ScoredModel, x: Volume) -> Gain:
        """A volume of zeros."""
        return Gain(torch.zeros_like(x))

    def update(self, state: Gain, look: Look) -> None:
        """Gather the weighted gradient times the way, and the score of a baseline."""
        if look.point.weight > 0:
            state.values[look.at] += look.point.weight * look.point.way(look.place) * look.gradient
        elif look.point.along == 0:
            state.start += look.score

    def gained(self, state: Gain, baselines: int) -> Complete:
        """Sum the channels."""
        return Complete(state.values.sum(dim=0), state.start / baselines)


@dataclass(frozen=True)
class IntegratedGradients(_PathMethod):
    r"""The gradient averaged along the straight path from a baseline, times the way gone.

    $$a = \sum_c (x_c - b_c) \int_0^1 \frac{\partial S(b + t (x - b))}{\partial x_c}\, dt$$

    By Gauss-Legendre quadrature. Complete: the sum of the map is ``S(x) - S(b)``, and the map
    reports by how much it is not. For a linear network one step is exact. Costs ``steps`` forward
    and backward passes and two forward, shared with all methods on the same path.

    Args:
        steps: Points on the path.
        baseline: ``blurred``, ``noise``, ``minimum``, ``zero``, or a number. A constant one is
            blind to evidence at its own value, and has no variance: networks with instance or
            group norm amplify it without bound. ``blurred`` is blind to what is smoother than
            ``sigma_mm``; ``noise`` adds chance.
        sigma_mm: Standard deviation of the blur in millimeters.
        norm: ``exact``: instance, group and layer norms follow every point of the path, and the map
            is complete for the network itself; ``frozen``: they keep the volume's statistics as
            constants, and it is complete for that network, whose path is smoother; its passes are
            twice as many.
        adaptive: Spend the steps where they are needed: start with four stretches of the path, and
            divide the one whose gradients miss its gain of score by most. For the same steps the
            completeness error is smaller where the score jumps on the way, and larger where the way
            is smooth; the passes are not shared, and a map of each stretch is kept.

    Raises:
        ValueError: for less than one step (24, if adaptive), an unknown baseline or a width that is
            not positive.
        UnsupportedError: with ``norm="frozen"`` for a network without such a norm, or one that
            cannot be seen into.

    References:
        Sundararajan et al., "Axiomatic attribution for deep networks", 2017, arXiv:1703.01365.
    """

    steps: int = 16
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    norm: Norm = "exact"
    adaptive: bool = False

    def __post_init__(self) -> None:
        least = adaptive.LEAST if self.adaptive else 1
        if self.steps < least:
            how = ", adaptive=True" * self.adaptive
            raise ValueError(
                f"`IntegratedGradients(steps={self.steps}{how})` must be at least {least}."
            )
        Baseline(self.baseline, self.sigma_mm)
        check_norm(self, self.norm)

    @property
    def trajectory(self) -> Line | None:
        """The straight line; None where it is divided on the way."""
        if self.adaptive:
            return None
        return Line(self.steps, Baseline(self.baseline, self.sigma_mm))

    @property
    def rule(self) -> Frozen | None:
        """Frozen norms, if asked for."""
        return Frozen() if self.norm == "frozen" else None

    def finish(self, model: ScoredModel, x: Volume, state: Gain) -> Complete:
        """Sum the channels."""
        return self.gained(state, 1)

    def attribute(self, model: ScoredModel, x: Volume) -> Map | Complete:
        """The map of ``x``, by passes of its own."""
        if not self.adaptive:
            return super().attribute(model, x)
        start = Baseline(self.baseline, self.sigma_mm)
        return adaptive.refined(model, x, start, self.rule, self.steps)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The stretches, where the path is divided on the way."""
        if not self.adaptive:
            return Passes()
        return adaptive.passes(self.steps, windows, 2 if self.rule else 1)


@dataclass(frozen=True)
class ExpectedGradients(_PathMethod):
    r"""Integrated gradients averaged over baselines, at points drawn on the ways from them.

    $$a = \sum_c \mathbb E_{b,\, t \sim U(0, 1)} \Big[ (x_c - b_c)
    \frac{\partial S(b + t (x - b))}{\partial x_c} \Big]$$

    Also known as GradientShap. The baselines are blurred ones of several widths and noises, in
    turn, and the same at every epoch; ``t`` is drawn once from each of as many equal parts as a
    baseline has samples. Complete, in expectation, from the mean of the baselines' scores, and the
    map reports by how much it is not. Costs ``samples`` forward and backward passes and ``baselines
    + 1`` forward, shared with `LayerGradientShap`.

    Args:
        samples: Points.
        baselines: Number of baselines, at most the samples.
        noise: Standard deviation of noise added to the volume at each sample, as a fraction of its
            intensity range.
        sigma_mm: Standard deviation of the first blur in millimeters.

    Raises:
        ValueError: for less than one sample or baseline, more baselines than samples, negative
            noise, or a width that is not positive.

    References:
        Erion et al., "Improving performance of deep learning models with axiomatic attribution
        priors and expected gradients", 2021, arXiv:1906.10670. Lundberg and Lee, "A unified
        approach to interpreting model predictions", 2017, arXiv:1705.07874.
    """

    samples: int = 16
    baselines: int = 4
    noise: float = 0.0
    sigma_mm: float = 5.0

    def __post_init__(self) -> None:
        scatter(self, self.samples, self.baselines, self.noise, self.sigma_mm)

    @property
    def trajectory(self) -> Scatter:
        """Points on the ways from several baselines."""
        return scatter(self, self.samples, self.baselines, self.noise, self.sigma_mm)

    def finish(self, model: ScoredModel, x: Volume, state: Gain) -> Complete:
        """Sum the channels."""
        return self.gained(state, self.baselines)


def scatter(
    who: LookMethod, samples: int, baselines: int, noise: float, sigma_mm: float
) -> Scatter:
    """Points on the ways from several baselines.

    Raises:
        ValueError: for numbers that cannot be.
    """
    if not 1 <= baselines <= samples:
        raise ValueError(f"`{who}` needs at least one baseline, and a sample for each.")
    if not noise >= 0:
        raise ValueError(f"`{who}` needs a noise that is not negative.")
    return Scatter(samples, draws(baselines, sigma_mm), noise)
