"""Methods that average another method over noisy copies of the volume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_segxai.methods.base import AttributionMethod, LookMethod
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.passes import Cloud, Here, Look
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(eq=False)
class _Copies:
    """The sum over finished copies, and the inner method's state of the copy at hand."""

    model: ScoredModel
    total: Map
    inner: Any = None
    points: int = 0


@dataclass(frozen=True)
class SmoothGrad(LookMethod):
    r"""Average another method over noisy copies of the volume.

    $$\hat a(x) = \frac1n \sum_{s=1}^{n} a(x + \varepsilon_s), \quad
    \varepsilon_s \sim \mathcal N(0, \sigma^2)$$

    With ``noise=0`` it is the inner method. The noise belongs to the whole volume and is the same
    at every epoch. Costs ``samples`` times the inner method.

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
        if self.samples < 1:
            raise ValueError(f"`SmoothGrad(samples={self.samples})` must be at least 1.")
        if self.noise < 0:
            raise ValueError(f"`SmoothGrad(noise={self.noise})` must not be negative.")

    @property
    def unit(self) -> str:
        """The inner method's."""
        return self.inner.unit

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

    def start(self, model: ScoredModel, x: Volume) -> _Copies:
        """No copy seen yet."""
        return _Copies(model, x.new_zeros(x.shape[1:]))

    def update(self, state: _Copies, look: Look) -> None:
        """Let the inner method see the look, and finish its map with the copy's last one."""
        assert isinstance(self.inner, LookMethod)
        assert self.inner.trajectory is not None
        copy = look.point.origin
        if state.inner is None:
            state.inner = self.inner.start(state.model, copy)
        self.inner.update(state.inner, look)
        state.points += look.complete
        if state.points == self.inner.trajectory.count:
            state.total += self.inner.finish(state.model, copy, state.inner)
            state.inner, state.points = None, 0

    def finish(self, model: ScoredModel, x: Volume, state: _Copies) -> Map:
        """The mean over copies."""
        return state.total / self.samples

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``, by passes of its own."""
        if self.trajectory is not None:
            return super().attribute(model, x)
        copies = Cloud(self.samples, self.noise, Here()).points(x, model.probe, model.generator())
        maps = [self.inner.attribute(model, copy.input) for copy in copies]
        return torch.stack(maps).mean(dim=0)

    def extra_passes(self, shape: Shape, windows: int) -> int:
        """The inner method's, for each copy."""
        return self.samples * self.inner.extra_passes(shape, windows)
