"""What a faithfulness metric says of a map that knows nothing: the zero of its scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import check_counts
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Shape

_APART = 0x5EED  # so that a metric of the same seed does not draw the same permutation


@dataclass(frozen=True)
class RandomBaseline(FaithfulnessMetric):
    """Another metric of a random map: the map's own values at random voxels.

    The mean over ``repeats`` permutations, always the same for the same seed. A permutation keeps
    the values, signs and ties, and nothing of the places: a map no better than this tells nothing
    of where. Costs ``repeats`` times the other metric.

    Args:
        metric: The metric whose zero it is.
        repeats: Number of permutations.
        seed: Which of several draws, of those that the model's own seed gives.

    Raises:
        ValueError: for less than one permutation.
    """

    metric: FaithfulnessMetric
    repeats: int = 1
    seed: int = 0

    higher_is_better = None

    def __post_init__(self) -> None:
        check_counts(self, repeats=self.repeats)

    @property
    def unit(self) -> str:
        """The metric's."""
        return self.metric.unit

    @property
    def range(self) -> tuple[float, float]:
        """The metric's."""
        return self.metric.range

    @property
    def reading(self) -> str:
        """What the metric is compared with."""
        return f"What {type(self.metric).__name__} gives for a random map: compare with it."

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        generator = torch.Generator().manual_seed(model.seed + self.seed + _APART)
        values, found = attribution.values, []
        for _ in range(self.repeats):
            places = torch.randperm(values.numel(), generator=generator)
            shuffled = values.flatten()[places].reshape(values.shape)
            one = self.metric.assess(model, replace(attribution, values=shuffled), method)
            if one is None:
                return None
            found.append(one)
        return sum(found) / len(found)

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The metric's, for each permutation."""
        once = self.metric.passes(shape, windows, method)
        return Passes(self.repeats * once.forward, self.repeats * once.backward)
