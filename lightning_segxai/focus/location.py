"""Where the attribution lies: how much of it in a region, and how far from one.

All of these read ``|a|``, in float64: evidence for and against both count as being looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_segxai.focus.base import FocusMetric
from lightning_segxai.focus.kept import made_once, magnitude, ordered
from lightning_segxai.values import Attribution
from lightning_segxai.vessels import distance_mm


def region_of(attribution: Attribution, name: str) -> Bool[Tensor, "i j k"] | None:
    """The region of that name, or None where it is missing or has no voxel.

    ``label`` is the foreground of the probe's label, ``target`` what was explained, ``predicted``
    the foreground of the prediction; any other name is looked up in the probe's regions.
    """
    region: Bool[Tensor, "i j k"] | None
    if name == "label":
        label = attribution.probe.label
        region = None if label is None else label > 0
    elif name == "target":
        region = attribution.region
    elif name == "predicted":
        region = attribution.prediction > 0
    else:
        region = attribution.probe.regions.get(name)
    return region if region is not None and bool(region.any()) else None


def distance_from(attribution: Attribution, name: str) -> Float[Tensor, "i j k"] | None:
    """Distance of each voxel from the region of that name, in mm; None without the region."""
    region = region_of(attribution, name)
    if region is None:
        return None
    spacing = attribution.probe.spacing_mm
    return made_once(attribution, ("distance", name), lambda: distance_mm(region, spacing))


def topmost(
    attribution: Attribution, count: int, voxels: Bool[Tensor, "i j k"]
) -> Float[Tensor, " chosen"]:
    """Membership of the chosen voxels in the ``count`` largest ``|a|``, in [0, 1].

    Of all voxels it sums to ``count``. Voxels tied for the last places share them. A map with
    plateaus (a coarse layer, a ReLU) is then not judged by the order in which its voxels happen to
    be stored.
    """
    ascending, values = ordered(attribution), magnitude(attribution)[voxels]
    last = ascending[-count]
    below = int(torch.searchsorted(ascending, last))
    above = len(ascending) - int(torch.searchsorted(ascending, last, right=True))
    share = (count - above) / (len(ascending) - above - below)
    return (values > last).double() + (values == last).double() * share


@dataclass(frozen=True)
class MassInside(FocusMetric):
    """Share of the attribution that lies in the region (relevance mass accuracy).

    ``sum_{v in G} |a_v| / sum_v |a_v|``, in [0, 1]. A flat map has the region's share of the
    volume.

    Args:
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    References:
        Kohlbrenner et al., "Towards best practice in explaining neural network decisions with
        LRP", IJCNN 2020, arXiv:1910.09840; Arras et al., "CLEVR-XAI", Information Fusion 81,
        2022, arXiv:2003.07258. The former counts positive relevance only, where we count both.
    """

    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = True
    reading = "1: all attribution is in the region; a flat map has the region's share of voxels."

    def measure(self, attribution: Attribution) -> float | None:
        region = region_of(attribution, self.region)
        if region is None:
            return None
        mass = magnitude(attribution)
        return min(1.0, float(mass[region].sum() / mass.sum()))


@dataclass(frozen=True)
class RankInside(FocusMetric):
    """Share of the strongest voxels that lie in the region (relevance rank accuracy).

    ``|top_K(|a|) & G| / K`` with ``K = |G|``, in [0, 1]; voxels tied for the last places share
    them. A flat map has the region's share of the volume.

    Args:
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    References:
        Arras et al., "CLEVR-XAI: a benchmark dataset for the ground truth evaluation of neural
        network explanations", Information Fusion 81, 2022, arXiv:2003.07258.
    """

    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = True
    reading = "1: the strongest voxels, as many as the region has, are exactly the region."

    def measure(self, attribution: Attribution) -> float | None:
        region = region_of(attribution, self.region)
        if region is None:
            return None
        count = int(region.count_nonzero())
        return min(1.0, float(topmost(attribution, count, region).sum() / count))


@dataclass(frozen=True)
class PointingHit(FocusMetric):
    """Whether the strongest voxel lies in the region (pointing game).

    ``1[argmax |a| in G]``: 1 or 0, without a tolerance; where several voxels are the strongest,
    the share of them inside. A flat map has the region's share of the volume.

    Args:
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    References:
        Zhang et al., "Top-down neural attention by excitation backprop", IJCV 126, 2018,
        arXiv:1608.00507.
    """

    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = True
    reading = "1: the strongest voxel is in the region; 0: it is not."

    def measure(self, attribution: Attribution) -> float | None:
        region = region_of(attribution, self.region)
        if region is None:
            return None
        mass = magnitude(attribution)
        strongest = mass == mass.max()
        return float((strongest & region).count_nonzero() / strongest.count_nonzero().double())


@dataclass(frozen=True)
class AveragePrecision(FocusMetric):
    """Area under precision and recall of ``|a|`` as a detector of the region (AUPRC).

    ``sum_t (R_t - R_{t-1}) P_t`` over the distinct values ``t`` of ``|a|``, largest first, with
    ``P_t`` and ``R_t`` precision and recall of ``|a| >= t``; in [0, 1]. A flat map has the
    region's share of the volume. Fit for thin vessels, where ROC curves flatter.

    Args:
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    References:
        Arun et al., "Assessing the trustworthiness of saliency maps for localizing abnormalities
        in medical imaging", Radiology: AI 3, 2021.
    """

    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = True
    reading = (
        "1: every voxel of the region is stronger than every other; flat: its share of voxels."
    )

    def measure(self, attribution: Attribution) -> float | None:
        region = region_of(attribution, self.region)
        if region is None:
            return None
        mass = magnitude(attribution)
        # Recall only grows at values that occur inside, and those are few.
        ascending = ordered(attribution).numpy()
        thresholds, hits = np.unique(mass[region].numpy(), return_counts=True)
        true = np.cumsum(hits[::-1])[::-1]
        chosen = ascending.size - np.searchsorted(ascending, thresholds, side="left")
        return min(1.0, float(np.sum(hits * (true / chosen)) / true[0]))


@dataclass(frozen=True)
class Reach(FocusMetric):
    """Mean distance of the attribution from the region, in mm.

    ``sum_v |a_v| d(v) / sum_v |a_v|`` with ``d`` the distance to the nearest voxel of the region,
    0 inside. A map all inside has 0. It is the first Wasserstein distance in mm from the
    attribution to the region when each voxel may end anywhere in it.

    Args:
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.
    """

    region: str = "target"

    unit = "mm"
    range = (0.0, float("inf"))
    higher_is_better = None
    reading = "How far from the region the network looks on average: the context that it uses."

    def measure(self, attribution: Attribution) -> float | None:
        distance = distance_from(attribution, self.region)
        if distance is None:
            return None
        mass = magnitude(attribution)
        return float(torch.vdot(mass.flatten(), distance.double().flatten()) / mass.sum())
