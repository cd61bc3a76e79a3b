"""Integrated gradients of a layer, whose values themselves walk from one answer to the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import AttributionMethod, Complete
from lightning_segxai.passes import constant
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.taps import resolve_layer, spread, tapped, widened
from lightning_segxai.values import Shape, Volume
from lightning_segxai.windows import Place


@dataclass(frozen=True)
class LayerIntegratedGradients(AttributionMethod):
    r"""The gradient of a layer, averaged while its values alone walk from the baseline.

    $$a = \sum_k (A_k(x) - A_k(b)) \int_0^1
    \frac{\partial S(x;\, A(b) + t (A(x) - A(b)))}{\partial A_k}\, dt$$

    All else in the network stays as it is at the volume, so what goes round the layer, as by skip
    connections, is not in it. Complete: its sum is the score minus that with the layer's values
    replaced by the baseline's. By Gauss-Legendre quadrature. Brought to the input's grid with its
    sum kept. Costs ``steps`` forward and backward passes and three forward, for each target.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        steps: Points on the path.
        baseline: As for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than one step, an unknown baseline or a width that is not positive.

    References:
        Sundararajan et al., "Axiomatic attribution for deep networks", 2017, arXiv:1703.01365;
        for layers as in Captum.
    """

    layer: str = "auto"
    steps: int = 16
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`LayerIntegratedGradients(steps={self.steps})` must be at least 1.")
        Baseline(self.baseline, self.sigma_mm)

    def attribute(self, model: ScoredModel, x: Volume) -> Complete:
        """The map of ``x``, window by window."""
        recipe = Baseline(self.baseline, self.sigma_mm)
        base = recipe.make(x, model.probe.spacing_mm, model.generator())
        windows = model.predictor.windows(x.shape[1:])
        rehearsal = model.predictor.rehearse(x[(slice(None), *windows.places[0])])
        name = resolve_layer(model.predictor, rehearsal, self.layer)
        values, start = x.new_zeros(x.shape[1:]), 0.0
        for place in windows.places:
            part, score = self._window(model, x, base, name, place)
            values[place] += spread(part.to(x.dtype), rehearsal.padded, place)
            start += score
        return Complete(values, start)

    def _window(
        self, model: ScoredModel, x: Volume, base: Volume, name: str, place: Place
    ) -> tuple[Tensor, float]:
        """One window's map on the layer's grid, and its score with the layer at the baseline."""
        predictor, at = model.predictor, (slice(None), *place)
        weights = model.window_weights(predictor.windows(x.shape[1:]), place)
        calls = 0

        def answer(batch: list[Tensor]) -> Tensor:
            nonlocal calls
            tap = tapped(predictor.module, {name})
            with torch.no_grad(), tap as taps:
                predictor.window_logits(torch.stack(batch))
            calls = tap.calls[name]
            return widened(taps[name].detach())

        size = min(2, predictor.batch(place))
        here, there = (a for _, found in in_pieces([x[at], base[at]], size, answer) for a in found)

        def look(batch: list[float]) -> tuple[Tensor, Tensor]:
            inner = torch.stack([torch.lerp(there, here, t) for t in batch])
            inner.requires_grad_(torch.is_grad_enabled())
            replaced = _replaced(predictor.module.get_submodule(name), inner, calls)
            with constant(predictor.module), replaced:
                logits = predictor.window_logits(x[at].expand(len(batch), *x[at].shape))
            score = (weights * logits).sum()
            if not (inner.requires_grad and score.requires_grad):
                return score.detach(), torch.zeros_like(inner)
            [gradient] = torch.autograd.grad(score, inner, allow_unused=True)
            # None of a layer that the score does not need
            return score.detach(), torch.zeros_like(inner) if gradient is None else gradient

        with torch.no_grad():
            [(_, (start, _))] = in_pieces([0.0], 1, look)
        nodes, parts = np.polynomial.legendre.leggauss(self.steps)
        share = dict(zip((nodes + 1) / 2, parts / 2, strict=True))
        total = torch.zeros_like(here)
        for batch, (_, gradients) in in_pieces(share, predictor.batch(place), look):
            predictor.passes.backward += len(batch)
            for t, gradient in zip(batch, gradients, strict=True):
                total += share[t] * gradient
        return ((here - there) * total).sum(dim=0), float(start)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The points, both ends, and the network with the layer at the baseline."""
        return Passes((self.steps + 3) * windows, self.steps * windows)


class _replaced:  # noqa: N801 - a context manager reads like a verb
    """Put other values in the place of a module's last call's."""

    def __init__(self, module: nn.Module, values: Tensor, calls: int) -> None:
        self.module, self.values, self.calls = module, values, calls

    def __enter__(self) -> None:
        calls = 0

        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.values.to(output.dtype, copy=True) if calls == self.calls else output

        self.handle = self.module.register_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
