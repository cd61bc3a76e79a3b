"""Guided backpropagation from a layer instead of the score: what the layer answers to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.passes import constant
from lightning_segxai.rules.interception import refuse_unseen
from lightning_segxai.rules.rectified import Rectified
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.taps import resolve_layer, spread, tapped
from lightning_segxai.values import Map, Shape, Volume
from lightning_segxai.windows import Place


@dataclass(frozen=True)
class LayerGuidedBackprop(AttributionMethod):
    r"""What in the volume a layer's channels answer to, whatever the target.

    $$a = \sum_c \tilde\nabla_{x_c} \sum_v |A_k(v)| \quad\text{or, of all channels,}\quad
    \sum_c \tilde\nabla_{x_c} \sum_{k, v} |A_k(v)|$$

    with the backward rule of `GuidedBackprop`. By windows, magnitudes blend as logits do. The first
    layer, with no rectifier before it, has nothing to guide and is refused. Costs one forward and
    one backward pass, for each target.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        channel: One channel of it; None sums them.

    Raises:
        ValueError: if the layer has no such channel.
        UnsupportedError: where no rectifier stands before the layer, or it cannot be seen into.

    References:
        Springenberg et al., "Striving for simplicity: the all convolutional net", 2014,
        arXiv:1412.6806, section 4.
    """

    layer: str = "auto"
    channel: int | None = None

    unit = "a.u."
    shares_score = False

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``, window by window."""
        predictor, rule = model.predictor, Rectified(derivative=True)
        rule.check(predictor.module)
        windows = predictor.windows(x.shape[1:])
        rehearsal = predictor.rehearse(x[(slice(None), *windows.places[0])])
        name = resolve_layer(predictor, rehearsal, self.layer)
        channels = rehearsal.layers[name][1]
        if self.channel is not None and not 0 <= self.channel < channels:
            raise ValueError(
                f"`LayerGuidedBackprop(channel={self.channel})`: layer {name} has channels "
                f"0 to {channels - 1}."
            )

        def look(batch: list[Place]) -> Tensor:
            inputs = torch.stack([x[(slice(None), *p)] for p in batch]).requires_grad_()
            mode = rule.interception([x] * len(batch), rehearsal.convolutions)
            with constant(predictor.module), tapped(predictor.module, {name}) as taps:
                predictor.window_logits(inputs, mode)
            answer = taps[name]
            refuse_unseen(answer, predictor.module, mode)
            said = answer.abs()
            said = said.sum(dim=1) if self.channel is None else said[:, self.channel]
            total = torch.stack(
                [
                    (spread(one, rehearsal.padded, p) * windows.share(p, x.dtype).to(x)).sum()
                    for one, p in zip(said.to(x.dtype), batch, strict=True)
                ]
            ).sum()
            with mode.resumed():
                [gradient] = torch.autograd.grad(total, inputs)
            mode.close()
            return gradient

        values = x.new_zeros(x.shape[1:])
        for batch, gradients in in_pieces(windows.places, predictor.batch(windows.places[0]), look):
            predictor.passes.backward += len(batch)
            for place, gradient in zip(batch, gradients, strict=True):
                values[place] += gradient.sum(dim=0)
        return values

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """Every window, forward and backward."""
        return Passes(windows, windows)
