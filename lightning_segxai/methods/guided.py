"""Methods whose backward pass lets only what is positive through the rectifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.methods.base import Complete, JointMethod, LookMethod, values_of
from lightning_segxai.methods.cams import GradCAM
from lightning_segxai.methods.gradients import GradientMethod
from lightning_segxai.rules.rectified import Rectified
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True)
class GuidedBackprop(GradientMethod):
    r"""The gradient, where every rectifier also stops what is negative on its way back.

    $$a = \sum_c \tilde\nabla_{x_c} S, \quad \tilde g_x = f'(x)\, \max(\tilde g_y, 0)$$

    For module, in-place, reused, functional and method activations alike; of leaky and smooth
    rectifiers (LeakyReLU, PReLU, ELU, GELU, SiLU, ...) too, while sigmoids of gates keep their
    derivative. Where nothing on the way back is negative it is the gradient. Mind that it hardly
    depends on the upper layers' weights (Adebayo et al., 2018, arXiv:1810.03292): it shows what the
    first layers can see. Costs one forward and one backward pass of its own, shared with
    `GuidedGradCAM`.

    Raises:
        UnsupportedError: for a network without a rectifier, or one that cannot be seen into.

    References:
        Springenberg et al., "Striving for simplicity: the all convolutional net", 2014,
        arXiv:1412.6806.
    """

    unit = "logit per intensity"

    @property
    def rule(self) -> Rectified:
        """Guided."""
        return Rectified(derivative=True)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Sum the channels."""
        return state.sum(dim=0)


@dataclass(frozen=True)
class Deconvolution(GradientMethod):
    r"""The network run backward, with each rectifier applied to what comes back.

    $$a = \sum_c \tilde\nabla_{x_c} S, \quad \tilde g_x = \max(\tilde g_y, 0)$$

    The rectifier's own derivative, leaky or not, takes no part; max pooling goes back to the voxel
    that won. Costs one forward and one backward pass of its own.

    Raises:
        UnsupportedError: for a network without a rectifier, or one that cannot be seen into.

    References:
        Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2013,
        arXiv:1311.2901.
    """

    unit = "logit per intensity"

    @property
    def rule(self) -> Rectified:
        """The deconvnet's."""
        return Rectified(derivative=False)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Sum the channels."""
        return state.sum(dim=0)


@dataclass(frozen=True)
class GuidedGradCAM(JointMethod):
    r"""Guided backpropagation where Grad-CAM sees something.

    $$a = a_\text{guided} \odot \mathrm{ReLU}(a_\text{Grad-CAM})$$

    Costs nothing beside `GuidedBackprop` and `GradCAM` of the same layer; alone, the passes of
    both.

    Args:
        layer: Layer of the Grad-CAM: a dotted path, or ``auto``.

    Raises:
        UnsupportedError: as for `GuidedBackprop`.

    References:
        Selvaraju et al., "Grad-CAM", 2017, arXiv:1610.02391, section 3.3.
    """

    layer: str = "auto"

    unit = "a.u."
    shares_score = False

    @property
    def parts(self) -> tuple[LookMethod, ...]:
        """The two maps."""
        return GuidedBackprop(), GradCAM(self.layer)

    def join(self, model: ScoredModel, x: Volume, maps: Sequence[Map | Complete]) -> Map:
        """Their product."""
        guided, cam = map(values_of, maps)
        return torch.mul(guided, cam)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The Grad-CAM's."""
        return GradCAM(self.layer).extra_passes(shape, windows)
