"""Methods that gather another method over noisy copies of the volume."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_segxai.methods.base import AttributionMethod, LookMethod, values_of
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.passes import Look
from lightning_segxai.rules.interception import Rule
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.trajectories import Cloud, Here
from lightning_segxai.values import Map, Shape, Volume


@dataclass(eq=False)
class _Copies:
    """Moments over finished copies, and the inner method's state of the copy at hand."""

    model: ScoredModel
    count: int
    mean: Map
    spread: Map
    inner: Any = None
    groups: int = 0

    def add(self, values: Map) -> None:
        """One more copy's map, by Welford's update, which does not cancel."""
        self.count += 1
        off = values - self.mean
        self.mean += off / self.count
        self.spread += off * (values - self.mean)


class _OverCopies(LookMethod):
    """What the three methods over noisy copies share: all but how maps become one."""

    inner: AttributionMethod
    samples: int
    noise: float

    @abstractmethod
    def reduce(self, model: ScoredModel, mean: Map, variance: Map) -> Map:
        """One map from the moments over copies."""

    @property
    def shares_score(self) -> bool:
        """The inner method's."""
        return self.inner.shares_score

    @property
    def layer(self) -> str:
        """The inner method's."""
        return self.inner.layer

    @property
    def trajectory(self) -> Cloud | None:
        """The inner trajectory around each copy; None around a method that folds no looks."""
        inner = self.inner.trajectory if isinstance(self.inner, LookMethod) else None
        return None if inner is None else Cloud(self.samples, self.noise, inner)

    @property
    def rule(self) -> Rule | None:
        """The inner method's."""
        return self.inner.rule if isinstance(self.inner, LookMethod) else None

    def start(self, model: ScoredModel, x: Volume) -> _Copies:
        """No copy seen yet."""
        return _Copies(model, 0, x.new_zeros(x.shape[1:]), x.new_zeros(x.shape[1:]))

    def update(self, state: _Copies, look: Look) -> None:
        """Let the inner method see the look, and finish its map with the copy's last one."""
        assert isinstance(self.inner, LookMethod)
        assert self.inner.trajectory is not None
        copy = look.point.origin
        if state.inner is None:
            state.inner = self.inner.start(state.model, copy)
        self.inner.update(state.inner, look)
        state.groups += look.complete
        if state.groups == self.inner.trajectory.copies:
            state.add(values_of(self.inner.finish(state.model, copy, state.inner)))
            state.inner, state.groups = None, 0

    def finish(self, model: ScoredModel, x: Volume, state: _Copies) -> Map:
        """One map from all copies."""
        return self.reduce(model, state.mean, state.spread / state.count)

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``, by passes of its own."""
        if self.trajectory is not None:
            return values_of(super().attribute(model, x))
        state = self.start(model, x)
        generator = model.generator()
        for (copy,) in Cloud(self.samples, self.noise, Here()).groups(x, model.probe, generator):
            state.add(values_of(self.inner.attribute(model, copy.origin)))
        return self.finish(model, x, state)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The inner method's, for each copy; its looks too, where they are not its own."""
        walks = self.trajectory is not None
        inner = (self.inner.extra_passes if walks else self.inner.passes_alone)(shape, windows)
        return Passes(self.samples * inner.forward, self.samples * inner.backward)


@dataclass(frozen=True)
class SmoothGrad(_OverCopies):
    r"""Average another method over noisy copies of the volume.

    $$\hat a(x) = \frac1n \sum_{s=1}^{n} a(x + \varepsilon_s), \quad
    \varepsilon_s \sim \mathcal N(0, \sigma^2)$$

    With ``noise=0`` it is the inner method. The noise belongs to the whole volume and is the same
    at every epoch. Costs ``samples`` times the inner method, shared with `SquareGrad` and
    `VarGrad`.

    Args:
        inner: Method to average.
        samples: Number of noisy copies.
        noise: Standard deviation of the noise, as a fraction of the volume's intensity range.

    Raises:
        ValueError: for less than one sample or negative noise.

    References:
        Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017, arXiv:1706.03825.
    """

    inner: AttributionMethod = field(default_factory=Saliency)
    samples: int = 8
    noise: float = 0.1

    def __post_init__(self) -> None:
        _check(self, 1)

    @property
    def unit(self) -> str:
        """The inner method's."""
        return self.inner.unit

    def reduce(self, model: ScoredModel, mean: Map, variance: Map) -> Map:
        """The mean."""
        return mean


@dataclass(frozen=True)
class SquareGrad(_OverCopies):
    r"""The mean square of another method over noisy copies of the volume.

    $$\hat a(x) = \frac1n \sum_{s=1}^{n} a(x + \varepsilon_s)^2$$

    With ``noise=0`` it is the square of the inner method. Costs ``samples`` times the inner method,
    shared with `SmoothGrad` and `VarGrad`.

    Args:
        inner: Method whose maps are squared.
        samples: Number of noisy copies.
        noise: Standard deviation of the noise, as a fraction of the volume's intensity range.

    Raises:
        ValueError: for less than one sample or negative noise.

    References:
        Hooker et al., "A benchmark for interpretability methods in deep neural networks", 2019,
        arXiv:1806.10758.
    """

    inner: AttributionMethod = field(default_factory=lambda: Saliency(absolute=False))
    samples: int = 8
    noise: float = 0.1

    def __post_init__(self) -> None:
        _check(self, 1)

    @property
    def unit(self) -> str:
        """The square of the inner method's."""
        return f"({self.inner.unit})^2"

    def reduce(self, model: ScoredModel, mean: Map, variance: Map) -> Map:
        """Variance and square of the mean; one more division by the region, as it is a square."""
        return (variance + mean**2) / (model.voxels if self.shares_score else 1)


@dataclass(frozen=True)
class VarGrad(_OverCopies):
    r"""The variance of another method over noisy copies of the volume.

    $$\hat a(x) = \frac1n \sum_{s=1}^{n} \big(a(x + \varepsilon_s) - \bar a\big)^2$$

    With ``noise=0`` it is zero; so it is, without a norm or activation, for the gradient. Costs
    ``samples`` times the inner method, shared with `SmoothGrad` and `SquareGrad`.

    Args:
        inner: Method whose maps vary.
        samples: Number of noisy copies.
        noise: Standard deviation of the noise, as a fraction of the volume's intensity range.

    Raises:
        ValueError: for less than two samples or negative noise.

    References:
        Adebayo et al., "Local explanation methods for deep neural networks lack sensitivity to
        parameter values", 2018, arXiv:1810.03307.
    """

    inner: AttributionMethod = field(default_factory=lambda: Saliency(absolute=False))
    samples: int = 8
    noise: float = 0.1

    def __post_init__(self) -> None:
        _check(self, 2)

    @property
    def unit(self) -> str:
        """The square of the inner method's."""
        return f"({self.inner.unit})^2"

    def reduce(self, model: ScoredModel, mean: Map, variance: Map) -> Map:
        """The variance; one more division by the region, as it is a square."""
        return torch.div(variance, model.voxels if self.shares_score else 1)


def _check(method: SmoothGrad | SquareGrad | VarGrad, least: int) -> None:
    who = type(method).__name__
    if method.samples < least:
        raise ValueError(f"`{who}(samples={method.samples})` must be at least {least}.")
    if not method.noise >= 0:
        raise ValueError(f"`{who}(noise={method.noise})` must not be negative.")
