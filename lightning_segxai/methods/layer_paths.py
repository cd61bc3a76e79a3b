"""Methods that look at a layer while the input walks from a baseline to the volume."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import LookMethod
from lightning_segxai.methods.paths import scatter
from lightning_segxai.passes import Look
from lightning_segxai.scored import ScoredModel
from lightning_segxai.taps import spread, to_window
from lightning_segxai.trajectories import Line, Scatter
from lightning_segxai.values import Map, Volume


@dataclass(eq=False)
class _Walked:
    """The map so far; and of the window at hand, what was last seen of the layer."""

    values: Map
    here: Tensor | None = None
    along: float = 1.0
    activation: Tensor | None = None
    gradient: Tensor | None = None
    upper: Tensor | None = None
    cut: float = 1.0


@dataclass(frozen=True)
class LayerConductance(LookMethod):
    r"""What flows from the input through each voxel of a layer to the score.

    $$a = \sum_k \int_0^1 \frac{\partial S}{\partial A_k}\, \frac{\partial A_k}{\partial t}\, dt$$

    along the straight path from a baseline, of which every node of the quadrature speaks for its
    own part, with the layer's activation interpolated between the nodes and known at both ends. Its
    sum is ``S(x) - S(b)`` where all ways through the network lead through the layer; what goes
    round it, as by skip connections, is missing. At the input it is `IntegratedGradients`. Brought
    to the input's grid with its sum kept. Costs ``steps`` forward and backward passes and two
    forward, shared with `IntegratedGradients` of equal baseline and steps.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        steps: Points on the path.
        baseline: As for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than one step, an unknown baseline or a width that is not positive.

    References:
        Dhamdhere et al., "How important is a neuron?", 2018, arXiv:1805.12233.
    """

    layer: str = "auto"
    steps: int = 16
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0

    def __post_init__(self) -> None:
        _line(self, self.steps, self.baseline, self.sigma_mm)

    @property
    def trajectory(self) -> Line:
        """The straight line."""
        return _line(self, self.steps, self.baseline, self.sigma_mm)

    def start(self, model: ScoredModel, x: Volume) -> _Walked:
        """A map of zeros."""
        return _Walked(x.new_zeros(x.shape[1:]))

    def update(self, state: _Walked, look: Look) -> None:
        """The part of the path that the last node speaks for ends between it and this one."""
        shown, point = look.layers[self.layer], look.point
        if point.along == 1:
            state.here = torch.zeros_like(shown.activation[0])
            state.upper, state.cut = shown.activation, 1.0
        elif state.gradient is not None:
            assert state.here is not None
            assert state.upper is not None
            assert state.activation is not None
            share = (state.along - state.cut) / (state.along - point.along)
            lower = torch.lerp(state.activation, shown.activation, share)
            state.here += (state.gradient * (state.upper - lower)).sum(dim=0)
            state.upper = lower
        state.along, state.activation = point.along, shown.activation
        state.gradient = shown.gradient if point.weight else None
        state.cut -= point.weight
        if point.along == 0:
            assert state.here is not None
            part = state.here.to(state.values.dtype)
            state.values[look.place] += spread(part, look.padded, look.place)

    def finish(self, model: ScoredModel, x: Volume, state: _Walked) -> Map:
        """The map as it was gathered."""
        return state.values


@dataclass(frozen=True)
class InternalInfluence(LookMethod):
    r"""The gradient of the score with respect to a layer, averaged along the path.

    $$a = \sum_k \int_0^1 \frac{\partial S(b + t (x - b))}{\partial A_k}\, dt$$

    Where all behind the layer is linear it is its weights. Brought to the input's grid by trilinear
    interpolation. Costs ``steps`` forward and backward passes and two forward, shared with
    `IntegratedGradients` of equal baseline and steps.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        steps: Points on the path.
        baseline: As for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than one step, an unknown baseline or a width that is not positive.

    References:
        Leino et al., "Influence-directed explanations for deep convolutional networks", 2018,
        arXiv:1802.03788.
    """

    layer: str = "auto"
    steps: int = 16
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0

    unit = "logit per activation"

    def __post_init__(self) -> None:
        _line(self, self.steps, self.baseline, self.sigma_mm)

    @property
    def trajectory(self) -> Line:
        """The straight line."""
        return _line(self, self.steps, self.baseline, self.sigma_mm)

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A map of zeros."""
        return x.new_zeros(x.shape[1:])

    def update(self, state: Tensor, look: Look) -> None:
        """Gather the weighted gradient."""
        if look.point.weight:
            gradient = look.layers[self.layer].gradient.sum(dim=0).to(state.dtype)
            part = to_window(gradient, look.padded, look.place)
            state[look.place] += look.point.weight * part

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """The map as it was gathered."""
        return state


@dataclass(eq=False)
class _Scattered:
    """The map so far; and of the window at hand, the layer at the volume and its baselines."""

    values: Map
    at_volume: Tensor | None = None
    at_baselines: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerGradientShap(LookMethod):
    r"""`ExpectedGradients` of a layer: its expected gradient times its difference from baselines.

    $$a = \sum_k \mathbb E_{b, t} \Big[ (A_k(x) - A_k(b))
    \frac{\partial S(b + t (x - b))}{\partial A_k} \Big]$$

    Where all behind the layer is linear, its sum is the difference of the scores. Brought to the
    input's grid with its sum kept. Costs ``samples`` forward and backward passes and ``baselines +
    1`` forward, shared with `ExpectedGradients`.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        samples: Points.
        baselines: Number of baselines, at most the samples.
        noise: As for `ExpectedGradients`; the layer's difference is that without noise.
        sigma_mm: Standard deviation of the first blur in millimeters.

    Raises:
        ValueError: as for `ExpectedGradients`.

    References:
        Lundberg and Lee, "A unified approach to interpreting model predictions", 2017,
        arXiv:1705.07874.
    """

    layer: str = "auto"
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

    def start(self, model: ScoredModel, x: Volume) -> _Scattered:
        """A map of zeros."""
        return _Scattered(x.new_zeros(x.shape[1:]))

    def update(self, state: _Scattered, look: Look) -> None:
        """Keep the ends, and gather the gradient times the difference of the ends."""
        shown, point = look.layers[self.layer], look.point
        if point.baseline is None:
            state.at_volume = shown.activation
        elif point.weight == 0:
            state.at_baselines[id(point.baseline)] = shown.activation
        else:
            assert state.at_volume is not None
            way = state.at_volume - state.at_baselines[id(point.baseline)]
            product = (way * shown.gradient).sum(dim=0).to(state.values.dtype)
            part = spread(product, look.padded, look.place)
            state.values[look.place] += point.weight * part

    def finish(self, model: ScoredModel, x: Volume, state: _Scattered) -> Map:
        """The map as it was gathered."""
        return state.values


def _line(who: LookMethod, steps: int, baseline: Blank, sigma_mm: float) -> Line:
    """The straight line.

    Raises:
        ValueError: for numbers that cannot be.
    """
    if steps < 1:
        raise ValueError(f"`{type(who).__name__}(steps={steps})` must be at least 1.")
    return Line(steps, Baseline(baseline, sigma_mm))
