"""DeepLift: the difference from a baseline, shared out by the slopes between two answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_segxai.baselines import Baseline, Blank, draws
from lightning_segxai.methods.base import Complete, LookMethod
from lightning_segxai.methods.paths import Gain
from lightning_segxai.passes import Look
from lightning_segxai.rules.compared import Rescaled
from lightning_segxai.rules.statistics import Norm, check_norm
from lightning_segxai.scored import ScoredModel
from lightning_segxai.taps import spread
from lightning_segxai.trajectories import Pair
from lightning_segxai.values import Map, UnsupportedError, Volume


class _Comparison(LookMethod):
    """A method of the volume beside its baselines, complete at the input."""

    def start(self, model: ScoredModel, x: Volume) -> Gain:
        """A volume of zeros."""
        return Gain(torch.zeros_like(x))

    def update(self, state: Gain, look: Look) -> None:
        """Gather the multiplier times the difference."""
        weight = look.point.weight
        state.values[look.at] += weight * look.point.way(look.place) * look.gradient
        state.start += weight * look.partner_score

    def finish(self, model: ScoredModel, x: Volume, state: Gain) -> Complete:
        """Sum the channels."""
        return Complete(state.values.sum(dim=0), state.start)


@dataclass(frozen=True)
class DeepLift(_Comparison):
    r"""The difference of the scores of volume and baseline, shared out by multipliers.

    $$a = \sum_c m_c\, (x_c - b_c), \quad m_f = \frac{f(x) - f(b)}{x - b}$$

    Multipliers go backward as gradients do, with the rescale rule for activations; max pooling
    gives the difference to the voxel that won it; products, as of attention gates, give each factor
    the mean of the other. Complete on any network of these, whoever calls the functions. For a
    linear network it is `IntegratedGradients`. Costs two forward and two backward passes of its
    own, shared with `LayerDeepLift`.

    Args:
        baseline: ``blurred``, ``noise``, ``minimum``, ``zero``, or a number; each is blind to
            something, as `IntegratedGradients` says.
        sigma_mm: Standard deviation of the blur in millimeters.
        norm: ``frozen``: instance, group and layer norms with the volume's statistics as constants;
            the map is complete for that network, whose score at the baseline is another one, and
            does not explain what the norms measure. ``exact``: the norms' statistics are explained
            too, and the map is complete for the network itself; a constant baseline, which has no
            variance, then makes it cancel without bound.

    Raises:
        ValueError: for an unknown baseline or norm, or a width that is not positive.
        UnsupportedError: for a network without activation, pooling, product or norm, or one that
            cannot be seen into.

    References:
        Shrikumar et al., "Learning important features through propagating activation differences",
        2017, arXiv:1704.02685.
    """

    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        Baseline(self.baseline, self.sigma_mm)
        check_norm(self, self.norm)

    @property
    def trajectory(self) -> Pair:
        """The volume beside its baseline."""
        return Pair((Baseline(self.baseline, self.sigma_mm),))

    @property
    def rule(self) -> Rescaled:
        """Rescale."""
        return Rescaled(self.norm)


@dataclass(frozen=True)
class DeepLiftShap(_Comparison):
    r"""`DeepLift` averaged over several baselines: an estimate of Shapley values.

    $$a = \frac1n \sum_b a_b$$

    The baselines are blurred ones of several widths and noises, in turn, and the same at every
    epoch. With one of them it is `DeepLift` from it. Complete from the mean of their scores. Costs
    two forward and two backward passes for each baseline.

    Args:
        baselines: Number of baselines.
        sigma_mm: Standard deviation of the first blur in millimeters.
        norm: ``frozen`` or ``exact``, as for `DeepLift`.

    Raises:
        ValueError: for less than one baseline, or a width that is not positive.
        UnsupportedError: as for `DeepLift`.

    References:
        Lundberg and Lee, "A unified approach to interpreting model predictions", 2017,
        arXiv:1705.07874.
    """

    baselines: int = 4
    sigma_mm: float = 5.0
    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        if self.baselines < 1:
            raise ValueError(f"`DeepLiftShap(baselines={self.baselines})` must be at least 1.")
        draws(self.baselines, self.sigma_mm)
        check_norm(self, self.norm)

    @property
    def trajectory(self) -> Pair:
        """The volume beside each of its baselines."""
        return Pair(draws(self.baselines, self.sigma_mm))

    @property
    def rule(self) -> Rescaled:
        """Rescale."""
        return Rescaled(self.norm)


@dataclass(eq=False)
class _Layered:
    """The map so far; and what the scores gain, and the input's multipliers share out of it."""

    values: Map
    gain: float = 0.0
    shared: float = 0.0


@dataclass(frozen=True)
class LayerDeepLift(LookMethod):
    r"""What a layer contributes to the difference of the scores of volume and baseline.

    $$a = \sum_k m_{A_k}\, (A_k(x) - A_k(b))$$

    Its sum is the difference of the scores where all ways through the network lead through the
    layer; what goes round it, as by skip connections, is missing. Brought to the input's grid with
    its sum kept. Costs two forward and two backward passes, shared with `DeepLift`.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        baseline: As for `DeepLift`.
        sigma_mm: Standard deviation of the blur in millimeters.
        norm: ``frozen`` or ``exact``, as for `DeepLift`.

    Raises:
        ValueError: for an unknown baseline or norm, or a width that is not positive.
        UnsupportedError: as for `DeepLift`.

    References:
        Shrikumar et al., "Learning important features through propagating activation differences",
        2017, arXiv:1704.02685.
    """

    layer: str = "auto"
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    norm: Norm = "frozen"

    def __post_init__(self) -> None:
        Baseline(self.baseline, self.sigma_mm)
        check_norm(self, self.norm)

    @property
    def trajectory(self) -> Pair:
        """The volume beside its baseline."""
        return Pair((Baseline(self.baseline, self.sigma_mm),))

    @property
    def rule(self) -> Rescaled:
        """Rescale."""
        return Rescaled(self.norm)

    def start(self, model: ScoredModel, x: Volume) -> _Layered:
        """A map of zeros."""
        return _Layered(x.new_zeros(x.shape[1:]))

    def update(self, state: _Layered, look: Look) -> None:
        """Gather the multiplier times the difference, at the layer, and its sum at the input."""
        shown = look.layers[self.layer]
        assert shown.baseline is not None  # the rule compares the two
        product = ((shown.activation - shown.baseline) * shown.gradient).sum(dim=0)
        state.values[look.place] += spread(product.to(state.values.dtype), look.padded, look.place)
        state.gain += look.score - look.partner_score
        state.shared += float((look.point.way(look.place) * look.gradient).double().sum())

    def finish(self, model: ScoredModel, x: Volume, state: _Layered) -> Map:
        """The map as it was gathered, if at the input nothing is missing."""
        missing = abs(state.shared - state.gain)
        if missing > 0.1 * abs(state.gain) and missing > 1e-3 * model.voxels:
            raise UnsupportedError(
                f"`{self}` shares out {state.shared:.3g} of a difference of scores of "
                f"{state.gain:.3g}: the network has something that its rule does not see. Use "
                "`LayerConductance`."
            )
        return state.values
