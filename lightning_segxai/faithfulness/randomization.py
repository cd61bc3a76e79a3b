"""Whether a map depends on what the network has learned: explained again on random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.faithfulness.base import FaithfulnessMetric, explained, known, volume
from lightning_segxai.faithfulness.execution import parameters_in_order
from lightning_segxai.focus.ranks import similarity
from lightning_segxai.focus.similarity import StructuralSimilarity
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import check_counts
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Map, Shape

Likeness = Literal["spearman", "ssim"]
"""Rank correlation of the magnitudes, or structural similarity."""
Order = Literal["bottom_up", "top_down"]
"""From the input's layers on, in execution order, or from the output's on."""


@dataclass(frozen=True)
class Randomization(FaithfulnessMetric):
    """How alike the map stays while the network's weights are replaced by random ones.

    The model parameter randomization test: one layer after the other gets random weights, and those
    before it keep the random ones (cascading). After each of ``stages`` equal portions of the
    layers the method explains anew; the number is the mean similarity to the map, `curve` has each.
    A map that tells of the network loses it: near 0. A method that shows edges of the volume,
    whatever the network is, stays near 1. A map of zeros is like no other: 0.

    A layer's weights are drawn from the normal distribution of their own mean and standard
    deviation, so that activations keep their scale; a parameter of a single number, or of equal
    ones, has nothing to lose and stays. Buffers, such as the statistics of a batch norm, stay. The
    network itself is never changed. Costs ``stages`` times the method's own passes, and one.

    Args:
        stages: Portions of the layers; of a network with fewer layers, each is one.
        order: ``bottom_up``: from the input on, in the order in which layers are executed, as
            Hedström et al. recommend; ``top_down``: from the output on, as Adebayo et al. did.
        likeness: ``spearman``: rank correlation of the magnitudes; ``ssim``: in 3D, with signs.
        seed: Which of several draws, of those that the model's own seed gives.

    Raises:
        ValueError: for less than one stage, another order or likeness.

    References:
        Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018, arXiv:1810.03292; Hedström
        et al., "A fresh look at sanity checks for saliency maps", 2024, arXiv:2405.02383.
    """

    stages: int = 4
    order: Order = "bottom_up"
    likeness: Likeness = "spearman"
    seed: int = 0

    unit = "1"
    range = (-1.0, 1.0)
    higher_is_better = False
    reading = "Near 0: the map depends on what was learned; near 1: random weights give it too."

    def __post_init__(self) -> None:
        check_counts(self, stages=self.stages)
        for name, words in (("order", get_args(Order)), ("likeness", get_args(Likeness))):
            if getattr(self, name) not in words:
                raise ValueError(
                    f"`Randomization({name}={getattr(self, name)!r})` must be one of "
                    f"{', '.join(words)}."
                )

    def curve(
        self, model: ScoredModel, attribution: Attribution, method: AttributionMethod
    ) -> Float[Tensor, " stages"] | None:
        """The similarity after each portion of the layers; None where the map has no order."""
        found: list[float] = []
        for part in self.networks(model):
            values = explained(part, method, volume(part))
            like = self._likeness(attribution, values)
            if like is None:
                return None
            found.append(like)
        return torch.tensor(found, dtype=torch.float64)

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        curve = self.curve(model, attribution, known(self, method))
        return None if curve is None else float(curve.mean())

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The method's own at each stage, and the one that finds the order of the layers."""
        once = known(self, method).passes_alone(shape, windows)
        return Passes(self.stages * once.forward + 1, self.stages * once.backward)

    def networks(self, model: ScoredModel) -> Iterator[ScoredModel]:
        """The network after each portion of its layers; none where it has no parameter."""
        layers = parameters_in_order(model)
        drawn = randomized([name for names in layers for name in names], model, self.seed)
        if self.order == "top_down":
            layers.reverse()
        stages = min(self.stages, len(layers))
        for stage in range(1, stages + 1):
            names = [n for layer in layers[: round(len(layers) * stage / stages)] for n in layer]
            yield reparametrized(model, {name: drawn[name] for name in names})

    def _likeness(self, attribution: Attribution, values: Map) -> float | None:
        if not bool(torch.isfinite(values).all()):
            return math.nan
        if not bool(values.any()):
            return 0.0
        other = replace(attribution, values=values)
        if self.likeness == "spearman":
            return similarity(attribution, other)
        return StructuralSimilarity().measure(attribution, other)


@dataclass(frozen=True)
class EfficientRandomization(FaithfulnessMetric):
    r"""How much more complex the map of the network with random weights is, in parts of the map's.

    $$\frac{C(a_{\mathrm{random}}) - C(a)}{C(a)}$$

    with the entropy ``C`` of a histogram of the map's values in ``bins`` bins of equal width. All
    weights are random, drawn as for `Randomization`. A map that tells of what was learned is
    simpler than one of noise: above 0. A method that ignores the network has 0. None for a map
    whose values all fall into one bin. Costs the method's own passes, and one.

    Args:
        bins: Number of bins.
        seed: Which of several draws, of those that the model's own seed gives.

    Raises:
        ValueError: for less than two bins.

    References:
        Hedström et al., "A fresh look at sanity checks for saliency maps", 2024, arXiv:2405.02383.
    """

    bins: int = 100
    seed: int = 0

    unit = "1"
    range = (-1.0, math.inf)
    higher_is_better = True
    reading = "Above 0: random weights give a more complex map; 0: the map ignores the network."

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"`EfficientRandomization(bins={self.bins})` must be at least 2.")

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        names = [name for layer in parameters_in_order(model) for name in layer]
        random = reparametrized(model, randomized(names, model, self.seed))
        values = explained(random, known(self, method), volume(model))
        simple = complexity(attribution.values, self.bins)
        return None if simple == 0 else (complexity(values, self.bins) - simple) / simple

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The method's own, and the one that finds the layers."""
        once = known(self, method).passes_alone(shape, windows)
        return Passes(once.forward + 1, once.backward)


def randomized(names: list[str], model: ScoredModel, seed: int) -> dict[str, Tensor]:
    """Random values for parameters, of the mean and standard deviation that they have."""
    generator = torch.Generator().manual_seed(model.seed + seed)
    own = dict(model.predictor.module.named_parameters())
    drawn: dict[str, Tensor] = {}
    for name in names:
        values = own[name].detach()
        if values.numel() > 1 and values.is_floating_point():
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            wide = values.double()
            drawn[name] = (wide.mean() + wide.std() * noise.to(values.device)).to(values.dtype)
        else:
            drawn[name] = values
    return drawn


def reparametrized(model: ScoredModel, parameters: dict[str, Tensor]) -> ScoredModel:
    """The same target on a network with other weights; the network keeps its own."""
    return replace(model, predictor=replace(model.predictor, parameters=parameters))


def complexity(values: Map, bins: int) -> float:
    """Entropy in nats of the histogram of a map's values, in bins of equal width."""
    if not bool(torch.isfinite(values).all()):
        return math.nan
    counts, _ = np.histogram(values.detach().double().numpy(), bins)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
