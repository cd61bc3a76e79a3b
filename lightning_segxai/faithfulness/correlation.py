"""Whether what a map says of random parts of the volume is what their loss does to the score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.faithfulness.base import FaithfulnessMetric, veiled
from lightning_segxai.faithfulness.parts import random_parts, said_and_done
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import check_counts
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Mask, Shape


@dataclass(frozen=True)
class FaithfulnessCorrelation(FaithfulnessMetric):
    r"""Correlation of a part's attribution with what its loss does to the score.

    $$\mathrm{Pearson}_r \Big( \sum_{v \in R_r} a(v),\; S(x) - S(x_{R_r \to b}) \Big)$$

    over random parts ``R_r``: a share of the cubes that the volume is cut into, always the same for
    the same seed. With ``block=1`` it is the paper's, of single voxels; these hardly change the
    score of a volume. Signed; 1 for the exact effects on a linear network, about 0 for an unrelated
    map, with a standard deviation of ``1 / sqrt(samples - 1)``; a map of opposite sign has the
    opposite number. None where the map or the score is the same for all parts. Costs
    ``samples + 1`` forward passes.

    Args:
        samples: Number of parts.
        share: Share of the cubes that are hidden at once, in (0, 1); at least one is.
        baseline: What hides, as for `IntegratedGradients`.
        block: Edge of a cube in voxels; at the far faces of the volume they may be cut.
        seed: Which of several draws, of those that the model's own seed gives.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than two samples, a share outside (0, 1), less than one voxel, an
            unknown baseline, a width that is not positive.

    References:
        Bhatt et al., "Evaluating and aggregating feature-based model explanations", IJCAI 2020,
        arXiv:2005.00631.
    """

    samples: int = 64
    share: float = 0.05
    baseline: Blank = "blurred"
    block: int = 4
    seed: int = 0
    sigma_mm: float = 5.0

    unit = "1"
    range = (-1.0, 1.0)
    higher_is_better = True
    reading = "1: parts change the score as the map says; about 0: the map tells nothing of it."

    def __post_init__(self) -> None:
        check_counts(self, block=self.block)
        if self.samples < 2:
            raise ValueError(
                f"`FaithfulnessCorrelation(samples={self.samples})` must be at least 2."
            )
        if not 0 < self.share < 1:
            raise ValueError(
                f"`FaithfulnessCorrelation(share={self.share})` must lie between 0 and 1."
            )
        Baseline(self.baseline, self.sigma_mm)

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        veil = veiled(model, self.baseline, self.sigma_mm)
        values = attribution.values.detach().double()
        said, done, whole = said_and_done(veil, values, self.parts(model))
        noise = torch.finfo(veil.x.dtype).eps * max(1.0, abs(whole))
        return _pearson(said, done, 1e-12 * float(values.abs().sum()), noise)

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The parts, and the volume itself."""
        return Passes((self.samples + 1) * windows)

    def parts(self, model: ScoredModel) -> Iterator[Mask]:
        """The voxels of each random part."""
        generator = torch.Generator().manual_seed(model.seed + self.seed)
        i, j, k = model.probe.shape
        return random_parts((i, j, k), self.samples, self.share, self.block, generator)


def _pearson(
    a: Float[Tensor, " n"], b: Float[Tensor, " n"], least_a: float, least_b: float
) -> float | None:
    """None where one of them varies by no more than its rounding."""
    if float(a.max() - a.min()) <= least_a or float(b.max() - b.min()) <= least_b:
        return None
    a, b = a - a.mean(), b - b.mean()
    return min(1.0, max(-1.0, float((a / a.norm()) @ (b / b.norm()))))
