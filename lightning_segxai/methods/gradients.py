"""Methods of one forward and one backward pass to the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.methods.base import LookMethod
from lightning_segxai.passes import Look
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Map, Volume


class GradientMethod(LookMethod):
    """A method of the gradient at the volume itself, gathered over windows."""

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A volume of zeros."""
        return torch.zeros_like(x)

    def update(self, state: Tensor, look: Look) -> None:
        """Gather the gradient."""
        state[look.at] += look.gradient


@dataclass(frozen=True)
class Saliency(GradientMethod):
    r"""The gradient of the score: how much a small change of each voxel would move it.

    $$a = \max_c |\partial S / \partial x_c| \quad\text{or}\quad
    a = \sum_c \partial S / \partial x_c$$

    For a linear network it is the weights. Costs one forward and one backward pass, shared.

    Args:
        absolute: Take the largest absolute value over the channels, as the literature does;
            otherwise the signed sum.

    References:
        Simonyan et al., "Deep inside convolutional networks", 2013, arXiv:1312.6034.
    """

    absolute: bool = True

    unit = "logit per intensity"

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Reduce the channels."""
        return state.abs().amax(dim=0) if self.absolute else state.sum(dim=0)


@dataclass(frozen=True)
class InputXGradient(GradientMethod):
    r"""The input times its gradient.

    $$a = \sum_c x_c\, \partial S / \partial x_c$$

    For a network without biases and norms its sum is the score. Costs one forward and one backward
    pass, shared.

    References:
        Shrikumar et al., "Not just a black box", 2016, arXiv:1605.01713.
    """

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Multiply by the input."""
        return (x * state).sum(dim=0)
