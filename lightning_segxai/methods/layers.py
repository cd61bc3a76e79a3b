"""Methods that explain a layer; their maps are brought to the input's grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.methods.base import LookMethod
from lightning_segxai.methods.cams import ChannelMethod, Channels
from lightning_segxai.passes import Look
from lightning_segxai.scored import ScoredModel
from lightning_segxai.taps import spread
from lightning_segxai.values import Map, Volume


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

    def finish(self, model: ScoredModel, x: Volume, state: Channels) -> Map:
        """Pick or sum the channels."""
        weights = torch.ones_like(state.weights[0], dtype=x.dtype)
        if self.channel is not None:
            if not 0 <= self.channel < len(weights):
                raise ValueError(
                    f"`LayerActivation(channel={self.channel})`: layer {self.layer} has channels "
                    f"0 to {len(weights) - 1}."
                )
            weights.zero_()[self.channel] = 1
        return state.map(model, x, self.layer, weights)


@dataclass(frozen=True)
class LayerGradientXActivation(LookMethod):
    r"""A layer's activation times its gradient: its share of the score, to first order.

    $$a = \sum_k A_k \odot \frac{\partial S}{\partial A_k}$$

    Where all behind the layer is linear and without biases, its sum is the score. TorchRay's linear
    approximation is this sum over the channels. Brought to the input's grid with its sum kept;
    `HiResCAM` shows the same values interpolated. Costs one forward and one backward pass, shared.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.

    References:
        Ancona et al., "Towards better understanding of gradient-based attribution methods", 2018,
        arXiv:1711.06104, for the input.
    """

    layer: str = "auto"

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A map of zeros."""
        return x.new_zeros(x.shape[1:])

    def update(self, state: Tensor, look: Look) -> None:
        """Gather activation times gradient."""
        shown = look.layers[self.layer]
        product = (shown.activation * shown.gradient).sum(dim=0).to(state.dtype)
        state[look.place] += spread(product, look.padded, look.place)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """The map as it was gathered."""
        return state
