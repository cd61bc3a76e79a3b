"""Methods that share out a quantity layer by layer, from the logits down to the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_segxai.methods.base import Complete, JointMethod, LookMethod, values_of
from lightning_segxai.methods.gradients import GradientMethod
from lightning_segxai.passes import Look
from lightning_segxai.rules.relevance import Relevance
from lightning_segxai.scored import ScoredModel
from lightning_segxai.taps import spread
from lightning_segxai.values import Map, UnsupportedError, Volume

Convolutions = Literal["z+", "epsilon"]
First = Literal["w2", "zb", "same"]


@dataclass(frozen=True)
class LRP(GradientMethod):
    r"""Layer-wise relevance propagation: the score, handed down from layer to layer.

    $$R_i = \sum_j \frac{c_{ij}}{\sum_i c_{ij} + \beta_j + \epsilon} R_j$$

    with contributions ``c_ij`` by the convolution's rule, and ``beta_j`` what its bias takes.
    Convolutions are merged with the norm behind them (instance, group and layer norms with the
    volume's statistics as constants); activations pass relevance on as it is; max pooling to the
    voxel that won; products half to each factor. For a linear network without biases the
    ``epsilon`` rule is `InputXGradient`. What biases take is lost, so the sum of the map differs
    from the score: by how much is its completeness error. Costs one forward and one backward pass
    of its own, of about three times the work.

    Args:
        convolutions: ``z+``: contributions $x_i^+ w_{ij}^+ + x_i^- w_{ij}^-$, never negative, so
            nothing explodes; ``epsilon``: $x_i w_{ij}$, signed, close to the gradient times input.
        first: The first convolution, whose input is signed and may be zero where it matters:
            ``w2``: $w_{ij}^2$, spread evenly, of which the bias takes its square; ``zb``: $x_i
            w_{ij} - l w_{ij}^+ - h w_{ij}^-$, intensities between the volume's lowest and highest;
            ``same``: as the others. Where the network's first function is no convolution, that
            one's is ``same``.
        epsilon: Keeps denominators from zero, and absorbs weak and contradictory relevance.

    Raises:
        ValueError: for an unknown rule, or an epsilon that is not positive.
        UnsupportedError: for a network without convolutions, or one that cannot be seen into.

    References:
        Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise
        relevance propagation", PLoS ONE 10(7), 2015. Montavon et al., "Explaining nonlinear
        classification decisions with deep Taylor decomposition", 2017, arXiv:1512.02479.
    """

    convolutions: Convolutions = "z+"
    first: First = "w2"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name, choices in (("convolutions", Convolutions), ("first", First)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"`LRP({name}={getattr(self, name)!r})` must be one of "
                    f"{', '.join(get_args(choices))}."
                )
        if not self.epsilon > 0:
            raise ValueError(f"`LRP(epsilon={self.epsilon})` must be positive.")

    @property
    def rule(self) -> Relevance:
        """Relevance."""
        return Relevance(self.convolutions, self.first, self.epsilon)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Complete:
        """Sum the channels; the score is conserved, as far as it is."""
        return Complete(state.sum(dim=0), 0.0)


@dataclass(eq=False)
class _Arrivals:
    """The map so far, and whether anything came past the layer."""

    values: Tensor
    passed_by: bool = False


class _Excitation(LookMethod):
    """Excitation backprop, to the input or to a layer."""

    def start(self, model: ScoredModel, x: Volume) -> _Arrivals:
        """A map of zeros."""
        return _Arrivals(x.new_zeros(x.shape[1:]))

    def update(self, state: _Arrivals, look: Look) -> None:
        """Gather the probability: at a layer it is activation times gradient."""
        if not self.layer:
            state.values[look.place] += look.gradient.sum(dim=0)
            return
        shown = look.layers[self.layer]
        product = (shown.activation * shown.gradient).sum(dim=0).to(state.values.dtype)
        state.values[look.place] += spread(product, look.padded, look.place)
        state.passed_by |= bool(look.gradient.any())

    def finish(self, model: ScoredModel, x: Volume, state: _Arrivals) -> Map:
        """The map as it was gathered.

        Raises:
            UnsupportedError: where all that arrives at the input went round the layer.
        """
        if state.passed_by and not bool(state.values.any()):
            raise UnsupportedError(
                f"`{self}`: nothing goes through this layer on its way to the input. A convolution "
                "is merged with the norm behind it; name the norm, or the activation behind it."
            )
        return state.values


@dataclass(frozen=True)
class ExcitationBackprop(_Excitation):
    r"""The chance that a winner-take-all walk down from the target's voxels ends at each voxel.

    $$P_i = \sum_j \frac{x_i^+ w_{ij}^+ + x_i^- w_{ij}^-}{\sum_i (\cdot)} P_j$$

    starting with the target's weights. Convolutions are merged with the norm behind them, biases
    take no part, and of a sum of two branches the positive parts share. For activations that are
    never negative it is the paper's rule; the input, which may be, counts where it excites. Its sum
    over the map is 1, for a target of positive weights, as far as every unit is excited by some
    other. Costs one forward and one backward pass of its own, of about three times the work.

    Args:
        layer: Dotted path of the layer to stop at, or ``auto``; empty for the input.

    Raises:
        UnsupportedError: for a network without convolutions, or one that cannot be seen into; for a
            convolution with a norm behind it as layer, as the two are one.

    References:
        Zhang et al., "Top-down neural attention by excitation backprop", 2016, arXiv:1608.00507.
    """

    layer: str = ""

    unit = "probability"

    @property
    def rule(self) -> Relevance:
        """Excitation."""
        return Relevance(first="same", excitation=True)


@dataclass(frozen=True)
class _Inhibition(_Excitation):
    """Excitation of the opposite decision: the weights of the last convolution negated."""

    layer: str = ""

    @property
    def rule(self) -> Relevance:
        """Excitation of the opposite."""
        return Relevance(first="same", excitation=True, contrast=True)


@dataclass(frozen=True)
class ContrastiveExcitationBackprop(JointMethod):
    r"""What excites the decision more than its opposite.

    $$a = P(w) - P(-w)$$

    with the weights of the network's last convolution, in execution order, and their negation. It
    takes away what every decision shares. The paper shows the positive part. Its sum is 0 where
    both walks arrive. Costs the passes of two `ExcitationBackprop`.

    Args:
        layer: Dotted path of the layer to stop at, or ``auto``; empty for the input.

    Raises:
        UnsupportedError: as for `ExcitationBackprop`.

    References:
        Zhang et al., "Top-down neural attention by excitation backprop", 2016, arXiv:1608.00507.
    """

    layer: str = ""

    unit = "probability"

    @property
    def parts(self) -> tuple[LookMethod, ...]:
        """For and against."""
        return ExcitationBackprop(self.layer), _Inhibition(self.layer)

    def join(self, model: ScoredModel, x: Volume, maps: Sequence[Map | Complete]) -> Map:
        """The difference."""
        excited, opposite = map(values_of, maps)
        return excited - opposite
