"""What is left of the score when the voxels that a map ranks first go, or when they come alone."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.faithfulness.base import FaithfulnessMetric, together, veiled
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import Veil, check_counts
from lightning_segxai.scored import Passes, ScoredModel, in_pieces
from lightning_segxai.values import Attribution, Map, Shape

Yardstick = Literal["score", "dice"]
"""What is followed along the sweep."""

Curve = Float[Tensor, " points"]
"""What is followed, at equal shares of the voxels from none to all."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The voxels of a map from the highest value on, those of equal value side by side.

    Args:
        above: How many voxels have a higher value.
        tied: How many have the same, the voxel itself among them.
    """

    above: Float[Tensor, "i j k"]
    tied: Float[Tensor, "i j k"]

    @classmethod
    def of(cls, values: Map) -> Ranking:
        """By the values themselves, not their size: what speaks against comes last."""
        _, which, counts = values.unique(return_inverse=True, return_counts=True)
        above = counts.sum() - counts.cumsum(0)
        return cls(above[which].double(), counts[which].double())

    def top(self, count: float) -> Float[Tensor, "i j k"]:
        """Membership of each voxel in the first ``count``, in [0, 1]; it sums to ``count``.

        Tied voxels share what is left for them, so that a plateau is not judged by the order in
        which its voxels happen to be stored.
        """
        return ((count - self.above) / self.tied).clamp(0, 1)


class Sweep(FaithfulnessMetric):
    """Follows the network while the map's voxels are hidden or shown, from the highest on."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of equal portions; a field of the subclass, like all below."""

    @property
    @abstractmethod
    def baseline(self) -> Blank:
        """What hides."""

    @property
    @abstractmethod
    def by(self) -> Yardstick:
        """What is followed."""

    @property
    @abstractmethod
    def sigma_mm(self) -> float:
        """Standard deviation of the blur in millimeters."""

    @property
    @abstractmethod
    def deletes(self) -> bool:
        """Whether the first voxels are hidden, or come to what is hidden."""

    @property
    def unit(self) -> str:
        """A share of a score or of an overlap."""
        return "1"

    @property
    def range(self) -> tuple[float, float]:
        """A score may leave the interval between its ends."""
        return (0.0, 1.0) if self.by == "dice" else (-math.inf, math.inf)

    def curve(self, model: ScoredModel, attribution: Attribution) -> Curve | None:
        """What is followed after each portion, the untouched start and the end included.

        Returns:
            Scores from 0 (the baseline's) to 1 (the volume's), or overlaps; None where these two
            scores are the same, or nothing was predicted.
        """
        veil = veiled(model, self.baseline, self.sigma_mm)
        follow = veil.score if self.by == "score" else _overlap(veil, attribution)
        if follow is None:
            return None
        ranking = Ranking.of(attribution.values.detach().to(veil.x.device))
        voxels = attribution.values.numel()

        def look(points: list[int]) -> Tensor:
            first = torch.stack([ranking.top(n * voxels / self.steps) for n in points])
            return follow(1 - first if self.deletes else first).double()

        points = range(self.steps + 1)
        pieces = in_pieces(points, together(model), look)
        found = torch.cat([followed for _, followed in pieces]).cpu()
        return found if self.by == "dice" else self._normalized(found)

    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        curve = self.curve(model, attribution)
        return None if curve is None else float(torch.trapezoid(curve, dx=1 / self.steps))

    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """The points of the curve, both ends among them."""
        return Passes((self.steps + 1) * windows)

    def check(self) -> None:
        """Refuse settings that cannot be."""
        check_counts(self, steps=self.steps)
        if self.by not in get_args(Yardstick):
            raise ValueError(
                f"`{type(self).__name__}(by={self.by!r})` must be one of "
                f"{', '.join(get_args(Yardstick))}."
            )
        Baseline(self.baseline, self.sigma_mm)

    def _normalized(self, scores: Curve) -> Curve | None:
        """From the baseline's score to the volume's, wherever the sweep begins."""
        whole, bare = scores[[0, -1] if self.deletes else [-1, 0]]
        span = whole - bare
        if abs(float(span)) <= 1e-6 * max(1.0, abs(float(whole))):
            return None
        return (scores - bare) / span


@dataclass(frozen=True)
class Deletion(Sweep):
    r"""Area under the score while the voxels that the map ranks highest are taken away.

    $$\int_0^1 \frac{S(x_q) - S(b)}{S(x) - S(b)}\, dq, \quad x_q = x + m_q (b - x)$$

    with ``m_q`` the share ``q`` of all voxels with the highest ``a``, signed: what speaks against
    the target goes last. The share grows in ``steps`` equal portions from 0 to 1, both ends
    included; tied voxels fade together. A faithful map takes the score away early: near 0 where few
    voxels cause it, at best below 0 where others speak against it; a map of the wrong order is near
    1, a random one 0.5 on a linear network. None where the baseline has the volume's score. With
    ``by="dice"`` it is the area under the soft Dice of the perturbed prediction and the unperturbed
    one, over the whole volume and averaged over the classes that the target speaks for; it is not
    normalized. Costs ``steps + 1`` forward passes.

    Args:
        steps: Number of equal portions.
        baseline: What hides, as for `IntegratedGradients`.
        by: ``score`` or ``dice``.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than one step, another yardstick, an unknown baseline, a width that is
            not positive.

    References:
        Samek et al., "Evaluating the visualization of what a deep neural network has learned",
        2017, arXiv:1509.06321; Petsiuk et al., "RISE: randomized input sampling for explanation of
        black-box models", 2018, arXiv:1806.07421.
    """

    steps: int = 16
    baseline: Blank = "blurred"
    by: Yardstick = "score"
    sigma_mm: float = 5.0

    deletes = True
    higher_is_better = False
    reading = "Lower: without the voxels ranked first, the network sees less; compare with random."

    def __post_init__(self) -> None:
        self.check()


@dataclass(frozen=True)
class Insertion(Sweep):
    r"""Area under the score while the voxels that the map ranks highest come to the baseline.

    $$\int_0^1 \frac{S(x_q) - S(b)}{S(x) - S(b)}\, dq, \quad x_q = b + m_q (x - b)$$

    with ``m_q`` as for `Deletion`. A faithful map brings the score early: near 1 where few voxels
    cause it, at best above 1 where others speak against it; a map of the wrong order is near 0, a
    random one 0.5 on a linear network. It is what `Deletion` gives for the negative map. Costs
    ``steps + 1`` forward passes.

    Args:
        steps: Number of equal portions.
        baseline: What hides, as for `IntegratedGradients`.
        by: ``score`` or ``dice``, as for `Deletion`.
        sigma_mm: Standard deviation of the blur in millimeters.

    Raises:
        ValueError: for less than one step, another yardstick, an unknown baseline, a width that is
            not positive.

    References:
        Petsiuk et al., "RISE: randomized input sampling for explanation of black-box models",
        2018, arXiv:1806.07421.
    """

    steps: int = 16
    baseline: Blank = "blurred"
    by: Yardstick = "score"
    sigma_mm: float = 5.0

    deletes = False
    higher_is_better = True
    reading = "Higher: the voxels ranked first are enough for the network; compare with random."

    def __post_init__(self) -> None:
        self.check()


def _overlap(veil: Veil, attribution: Attribution) -> Callable[[Tensor], Tensor] | None:
    """The soft Dice of what is predicted under masks; None where nothing was predicted."""
    model, prediction = veil.model, attribution.prediction.to(veil.x.device)
    spoken_for = (model.weights > 0).flatten(1).any(dim=1).nonzero().flatten().tolist()
    classes = [c for c in spoken_for if bool((prediction == c).any())]
    if not classes:
        return None

    def follow(kept: Float[Tensor, "b i j k"]) -> Float[Tensor, " b"]:
        logits = model.predictor.predict_each(veil.shown(kept)).double()
        # of a single channel too: softmax over a background of zeros is its sigmoid
        independent = model.predictor.outputs == "sigmoid"
        probabilities = logits.sigmoid() if independent else logits.softmax(dim=1)
        return soft_dice(probabilities, prediction, classes)

    return follow


def soft_dice(
    probabilities: Float[Tensor, "b classes i j k"],
    prediction: Int[Tensor, "i j k"],
    classes: list[int],
) -> Float[Tensor, " b"]:
    """``2 sum(p_c m_c) / (sum p_c + sum m_c)`` with masks ``m_c``, averaged over the classes."""
    found = []
    for c in classes:
        p, mask = probabilities[:, c].flatten(1), (prediction == c).flatten().to(probabilities)
        found.append(2 * (p * mask).sum(dim=1) / (p.sum(dim=1) + mask.sum()))
    return torch.stack(found).mean(dim=0)
