"""How much a map changes when the volume hardly does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_segxai.faithfulness.base import FaithfulnessMetric, explained, known, volume
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import check_counts
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Shape, Volume


@dataclass(frozen=True)
class SensitivityMax(FaithfulnessMetric):
    r"""The largest change of the map under small changes of the volume, in parts of the map.

    $$\max_\delta \frac{\lVert a(x + \delta) - a(x) \rVert}{\lVert a(x) \rVert}, \quad
    |\delta_v| \le r$$

    over ``samples`` uniform draws, with Euclidean norms. The target stays where it was. 0 for a map
    that does not move; not far below 1 means that noise of the scanner would give another map. It
    says that a map is steady, not that it is right: a map that ignores the network has 0. With
    ``radius=0`` it is 0. Costs ``samples`` times the method's own passes.

    Args:
        samples: Number of draws.
        radius: Largest change of a voxel, as a fraction of the volume's intensity range.
        seed: Which of several draws, of those that the model's own seed gives.

    Raises:
        ValueError: for less than one sample, a radius that is negative or no number.

    References:
        Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019,
        arXiv:1901.09392.
    """

    samples: int = 10
    radius: float = 0.02
    seed: int = 0

    unit = "1"
    range = (0.0, math.inf)
    higher_is_better = False
    reading = "0: steady; near 1: slight noise gives another map. Steady does not mean right."

    def __post_init__(self) -> None:
        check_counts(self, samples=self.samples)
        if not 0 <= self.radius < math.inf:
            raise ValueError(f"`SensitivityMax(radius={self.radius})` must not be negative.")

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        method, values = known(self, method), attribution.values.detach().double()
        moved = [
            (explained(model, method, near).double() - values).norm()
            for near in self.neighbors(model)
        ]
        return float(torch.stack(moved).max() / values.norm())

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The method's own, for each draw."""
        once = known(self, method).passes_alone(shape, windows)
        return Passes(self.samples * once.forward, self.samples * once.backward)

    def neighbors(self, model: ScoredModel) -> Iterator[Volume]:
        """The slightly changed volumes, one draw after the other."""
        generator = torch.Generator().manual_seed(model.seed + self.seed)
        x = volume(model)
        reach = self.radius * float(x.amax() - x.amin())
        for _ in range(self.samples):
            drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            yield x + (reach * drawn).to(x)
