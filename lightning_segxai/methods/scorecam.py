"""A layer's channels as masks of the volume, weighed by the score of what they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import PerPass, Veil, check_counts
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.taps import activations, to_window, weighted
from lightning_segxai.values import Map, Shape, Volume
from lightning_segxai.windows import Place

_Found = list[tuple[Place, Float[Tensor, "channels p q r"], Shape]]


@dataclass(frozen=True)
class ScoreCAM(AttributionMethod):
    r"""A layer's channels, each weighed by the score of the volume where the channel is active.

    $$a = \mathrm{ReLU}\Big(\sum_k \alpha_k A_k\Big), \quad
    \alpha = \mathrm{softmax}_k \big( \bar S(b + H_k (x - b)) - \bar S(b) \big), \quad
    H_k = \frac{A_k - \min A_k}{\max A_k - \min A_k}$$

    with the score ``S̄`` per voxel of the target's region. The baseline's score cancels in the
    softmax, and is not computed. Channels are brought to the whole volume's grid by trilinear
    interpolation, and by windows blend as logits do; ``H_k`` of one that is constant is zero. Where
    all channels do the same to the score, it is the positive part of their mean. Needs no gradient;
    costs one forward pass, and one for each channel, of which there are at most as many as asked
    for. Memory holds the layer once, and no volume for each channel.

    Args:
        layer: Dotted path of the layer, or ``auto``, as for `GradCAM`.
        channels: Number of channels at most: of a layer with more, those of the largest variance.
        baseline: What hides, as for `IntegratedGradients`; the paper's is ``zero``.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once; ``auto``: as
            many as windows go through the network at once.

    Raises:
        ValueError: for less than one channel or perturbation per pass, an unknown baseline, a width
            that is not positive.

    References:
        Wang et al., "Score-CAM: score-weighted visual explanations for convolutional neural
        networks", 2020, arXiv:1910.01279.
    """

    unit = "a.u."
    shares_score = False

    layer: str = "auto"
    channels: int = 64
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        check_counts(
            self, channels=self.channels, perturbations_per_pass=self.perturbations_per_pass
        )
        Baseline(self.baseline, self.sigma_mm)

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        veil = Veil.of(model, x, self.baseline, self.sigma_mm)
        found = list(activations(model.predictor, x, self.layer))
        chosen = _most_varied(found, self.channels)

        def mask(channel: int) -> Tensor:
            return _unit(_blended(model, x, found, lambda a: a[channel]))

        def look(channels: list[int]) -> Tensor:
            return veil.score(torch.stack([mask(channel) for channel in channels]))

        size = veil.per_pass(self.perturbations_per_pass)
        scores = torch.cat([s for _, s in in_pieces(chosen, size, look)]) / model.voxels
        weights = x.new_zeros(len(found[0][1]))
        weights[chosen] = scores.softmax(dim=0).to(x.dtype)
        return _blended(model, x, found, lambda a: weighted(a.to(x.dtype), weights)).relu()

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The activations, and the channels; less where the layer has fewer."""
        return Passes((self.channels + 1) * windows)


def _most_varied(found: _Found, count: int) -> list[int]:
    """The channels of the largest variance over all windows, in the layer's order."""
    voxels = sum(a[0].numel() for _, a, _ in found)
    means = torch.stack([a.double().sum(dim=(1, 2, 3)) for _, a, _ in found]).sum(dim=0) / voxels
    variances = torch.stack(
        [((a.double() - means[:, None, None, None]) ** 2).sum(dim=(1, 2, 3)) for _, a, _ in found]
    ).sum(dim=0)
    return sorted(variances.argsort(descending=True, stable=True)[:count].tolist())


def _blended(model: ScoredModel, x: Volume, found: _Found, pick: Callable[[Tensor], Tensor]) -> Map:
    """What is picked of the layer's channels, each window's on the input's grid, blended."""
    blended = x.new_zeros(x.shape[1:])
    for place, activation, padded in found:
        part = to_window(pick(activation).to(x.dtype), padded, place)
        blended[place] += part * model.windows.share(place, x.dtype).to(x.device)
    return blended


def _unit(values: Map) -> Map:
    """From 0 to 1; zero where all are the same."""
    low, high = values.aminmax()
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))
