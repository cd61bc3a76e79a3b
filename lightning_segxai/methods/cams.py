"""Class activation maps: a layer's channels, weighed by what they do for the target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_segxai.methods.base import LookMethod
from lightning_segxai.passes import Look
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.taps import activations, project, to_window, weighted
from lightning_segxai.values import Map, Shape, Volume


@dataclass(eq=False)
class Channels:
    """What windows say of a layer's channels, and the activation if one window saw it all."""

    weights: list[Tensor] = field(default_factory=list)
    voxels: int = 0
    whole: tuple[Look, Tensor] | None = None
    sums: Tensor | None = None

    def see(self, look: Look, activation: Tensor, weights: Tensor) -> None:
        """One window's weights."""
        self.weights.append(weights)
        self.voxels += activation[0].numel()
        if look.whole:
            self.whole = (look, activation)

    def map(self, model: ScoredModel, x: Volume, layer: str, weights: Tensor) -> Map:
        """The weighted sum of the channels on the input's grid; windows blend as logits do."""
        weights = weights.to(x.dtype)
        if self.whole is None:
            return project(model, x, layer, weights)
        look, activation = self.whole
        return to_window(weighted(activation.to(x.dtype), weights), look.padded, look.place)


class ChannelMethod(LookMethod):
    """A weighted sum of a layer's channels; by windows, activations blend as logits do."""

    unit = "a.u."
    shares_score = False

    def start(self, model: ScoredModel, x: Volume) -> Channels:
        """No weights yet."""
        return Channels()

    def update(self, state: Channels, look: Look) -> None:
        """Pool the gradient of each channel, and keep the activation if it is all."""
        shown = look.layers[self.layer]
        state.see(look, shown.activation, shown.gradient.sum(dim=(1, 2, 3)))

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The second look at the activations, with several windows."""
        return Passes(windows if windows > 1 else 0)


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

    def finish(self, model: ScoredModel, x: Volume, state: Channels) -> Map:
        """Weigh the channels."""
        weights = torch.stack(state.weights).sum(dim=0) / state.voxels
        cam = state.map(model, x, self.layer, weights)
        return cam.relu() if self.relu else cam


@dataclass(frozen=True)
class GradCAMPlusPlus(ChannelMethod):
    r"""Grad-CAM with more weight on the voxels of a channel that matter.

    $$\alpha_k = \sum_v \frac{g_k(v)^2}{2 g_k(v)^2 + g_k(v)^3 \sum_u A_k(u)}\,
    \mathrm{ReLU}(g_k(v)), \quad g_k = \frac{\partial S}{\partial A_k}$$

    By windows, both sums go over all windows. Brought to the input's grid by trilinear
    interpolation. Costs one forward and one backward pass, shared; with several windows two more
    forward passes.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.

    References:
        Chattopadhay et al., "Grad-CAM++", 2018, arXiv:1710.11063.
    """

    layer: str = "auto"

    def start(self, model: ScoredModel, x: Volume) -> Channels:
        """The sum of each channel over all windows, if there are several."""
        if len(model.predictor.windows(x.shape[1:]).places) == 1:
            return Channels()
        found = activations(model.predictor, x, self.layer)
        return Channels(sums=torch.stack([a.sum(dim=(1, 2, 3)) for _, a, _ in found]).sum(dim=0))

    def update(self, state: Channels, look: Look) -> None:
        """Pool the positive gradient, voxel by voxel."""
        shown = look.layers[self.layer]
        sums = shown.activation.sum(dim=(1, 2, 3)) if state.sums is None else state.sums
        g = shown.gradient
        # cut by g^2 on both sides, so that small gradients do not vanish in float16
        share = 1 / (2 + g * sums[:, None, None, None])
        share = torch.where((g == 0) | ~share.isfinite(), torch.zeros_like(g), share)
        state.see(look, shown.activation, (share * g.relu()).sum(dim=(1, 2, 3)))

    def finish(self, model: ScoredModel, x: Volume, state: Channels) -> Map:
        """Weigh the channels."""
        return state.map(model, x, self.layer, torch.stack(state.weights).sum(dim=0)).relu()

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The sums, and the second look at the activations, with several windows."""
        return Passes(2 * windows if windows > 1 else 0)


class VoxelwiseMethod(LookMethod):
    """A layer's activation weighed voxel by voxel; over windows, maps add up."""

    unit = "a.u."
    shares_score = False

    def start(self, model: ScoredModel, x: Volume) -> Tensor:
        """A map of zeros."""
        return x.new_zeros(x.shape[1:])


@dataclass(frozen=True)
class HiResCAM(VoxelwiseMethod):
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

    def update(self, state: Tensor, look: Look) -> None:
        """Gather activation times gradient."""
        shown = look.layers[self.layer]
        product = (shown.activation * shown.gradient).sum(dim=0).to(state.dtype)
        state[look.place] += to_window(product, look.padded, look.place)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Keep the positive part, if asked."""
        return state.relu() if self.relu else state


@dataclass(frozen=True)
class LayerCAM(VoxelwiseMethod):
    r"""A layer's activation times the positive part of its gradient, voxel by voxel.

    $$a = \mathrm{ReLU}\Big(\sum_k A_k \odot
    \mathrm{ReLU}\Big(\frac{\partial S}{\partial A_k}\Big)\Big)$$

    Made for early layers, whose maps are fine. Where no gradient is negative it is `HiResCAM`.
    Brought to the input's grid by trilinear interpolation. Costs one forward and one backward pass,
    shared.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.

    References:
        Jiang et al., "LayerCAM: exploring hierarchical class activation maps for localization",
        IEEE TIP 30, 2021.
    """

    layer: str = "auto"

    def update(self, state: Tensor, look: Look) -> None:
        """Gather activation times positive gradient."""
        shown = look.layers[self.layer]
        product = (shown.activation * shown.gradient.relu()).sum(dim=0).to(state.dtype)
        state[look.place] += to_window(product, look.padded, look.place)

    def finish(self, model: ScoredModel, x: Volume, state: Tensor) -> Map:
        """Keep the positive part."""
        return state.relu()
