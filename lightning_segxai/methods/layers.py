"""Methods that explain a layer; their maps are brought to the input's grid."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_segxai.methods.base import LookMethod
from lightning_segxai.passes import Look, project, to_window, weighted
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(eq=False)
class _Channels:
    """Channel weights gathered over windows, and the activation if one window saw it all."""

    weights: list[Tensor] = field(default_factory=list)
    voxels: int = 0
    whole: tuple[Look, Tensor] | None = None


def _map(
    model: ScoredModel, x: Volume, layer: str, weights: Tensor, whole: tuple[Look, Tensor] | None
) -> Map:
    if whole is None:
        return project(model, x, layer, weights)
    look, activation = whole
    return to_window(weighted(activation.to(x.dtype), weights), look.padded, look.place)


class ChannelMethod(LookMethod):
    """A weighted sum of a layer's channels; by windows, activations blend as logits do."""

    unit = "a.u."
    shares_score = False

    def start(self, model: ScoredModel, x: Volume) -> _Channels:
        """No weights yet."""
        return _Channels()

    def update(self, state: _Channels, look: Look) -> None:
        """Pool the gradient of each channel, and keep the activation if it is all."""
        shown = look.layers[self.layer]
        state.weights.append(shown.gradient.sum(dim=(1, 2, 3)))
        state.voxels += shown.gradient[0].numel()
        if look.whole:
            state.whole = (look, shown.activation)

    def extra_passes(self, shape: Shape, windows: int) -> int:
        """The second look at the activations, with several windows."""
        return windows if windows > 1 else 0


@dataclass(frozen=True)
class GradCAM(ChannelMethod):
    r"""A layer's channels, weighted by the mean gradient of the score with respect to each.

    $$a = \mathrm{ReLU}\Big(\sum_k \alpha_k A_k\Big), \quad
    \alpha_k = \frac1{|A|} \sum_v \frac{\partial S}{\partial A_k(v)}$$

    By windows, the weights are pooled over all windows, and activations blend as logits do. Brought
    to the input's grid by trilinear interpolation. Costs one forward and one backward pass, shared;
    with several windows one more forward pass.

    Args:
        layer: Dotted path of the layer; ``auto`` is the last one, in execution order, with the
            smallest output of at least four voxels along each axis.
        relu: Keep what speaks for the target only.

    References:
        Selvaraju et al., "Grad-CAM", 2017, arXiv:1610.02391. For segmentation: Vinogradova et al.,
        "Towards interpretable semantic segmentation via gradient-weighted class activation
        mapping", 2020, arXiv:2002.11434.
    """

    layer: str = "auto"
    relu: bool = True

    def finish(self, model: ScoredModel, x: Volume, state: _Channels) -> Map:
        """Weigh the channels."""
        weights = (torch.stack(state.weights).sum(dim=0) / state.voxels).to(x.dtype)
        cam = _map(model, x, self.layer, weights, state.whole)
        return cam.relu() if self.relu else cam


@dataclass(frozen=True)
class HiResCAM(LookMethod):
    r"""A layer's activation times its gradient, voxel by voxel.

    $$a = \mathrm{ReLU}\Big(\sum_k A_k \odot \frac{\partial S}{\partial A_k}\Big)$$

    Where all behind the layer is linear, it says exactly which voxels made the score; Grad-CAM's
    pooled weights do not. Without ``relu`` it is the layer's gradient times activation. Brought to
    the input's grid by trilinear interpolation. Costs one forward and one backward pass, shared.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        relu: Keep what speaks for the target only.

    References:
        Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
        convolutional neural networks", 2020, arXiv:2011.08891.
    """

    layer: str = "auto"
    relu: bool = True

    unit = "a.u."
    shares_score = False

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A map of zeros."""
        return x.new_zeros(x.shape[1:])

    def update(self, state: Tensor, look: Look) -> None:
        """Gather activation times gradient."""
        shown = look.layers[self.layer]
        product = (shown.activation * shown.gradient).sum(dim=0).to(state.dtype)
        state[look.place] += to_window(product, look.padded, look.place)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Keep the positive part, if asked."""
        return state.relu() if self.relu else state


@dataclass(frozen=True)
class LayerActivation(ChannelMethod):
    r"""What a layer says, whatever the target.

    $$a = \sum_k A_k \quad\text{or}\quad a = A_k$$

    By windows, activations blend as logits do. Brought to the input's grid by trilinear
    interpolation. Costs one forward pass, shared with methods that need a backward pass too; with
    several windows one more forward pass.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        channel: One channel of it; None sums them.

    Raises:
        ValueError: if the layer has no such channel.

    References:
        Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2013,
        arXiv:1311.2901.
    """

    layer: str = "auto"
    channel: int | None = None

    def finish(self, model: ScoredModel, x: Volume, state: _Channels) -> Map:
        """Pick or sum the channels."""
        weights = torch.ones_like(state.weights[0], dtype=x.dtype)
        if self.channel is not None:
            if not 0 <= self.channel < len(weights):
                raise ValueError(
                    f"`LayerActivation(channel={self.channel})`: layer {self.layer} has channels "
                    f"0 to {len(weights) - 1}."
                )
            weights.zero_()[self.channel] = 1
        return _map(model, x, self.layer, weights, state.whole)
