"""Where the attribution lies in terms of the vessels: by distance, by caliber, along the middle.

All of these read ``|a|``, in float64, and are in millimeters on any spacing. Distances and
centerlines are made once for each region and kept (`lightning_segxai.vessels`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_segxai.focus.base import FocusMetric
from lightning_segxai.focus.kept import made_once, magnitude
from lightning_segxai.focus.location import distance_from, region_of
from lightning_segxai.values import Attribution
from lightning_segxai.vessels import caliber_mm, centerline, distance_mm, wall_distance_mm

_BINS = 4096  # of distances, to find the one where a share is reached


@dataclass(frozen=True)
class Profile:
    """How the attribution is spread over millimeters: over distance or over caliber.

    Args:
        edges_mm: Edges of the bins, ascending; the last bin has no end where it is infinite.
        share: Share of the attribution in each bin; they sum to 1 where the bins cover all voxels.
        flat: Share of the voxels in each bin, which is what a map without a preference has.
    """

    edges_mm: tuple[float, ...]
    share: tuple[float, ...]
    flat: tuple[float, ...]


def distance_profile(
    attribution: Attribution, edges_mm: tuple[float, ...], region: str = "label"
) -> Profile | None:
    """Shares of the attribution by distance from the wall of a region.

    Args:
        attribution: The map.
        edges_mm: Edges of the bins, ascending, in mm from the wall: negative inside of the region,
            positive outside. Voxels beyond the first or last edge are in no bin.
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    Returns:
        The profile, or None without a voxel in the region or outside of it.
    """
    wall = _wall(attribution, region)
    return None if wall is None else _profile(magnitude(attribution), wall, edges_mm)


def caliber_profile(
    attribution: Attribution, edges_mm: tuple[float, ...], region: str = "label"
) -> Profile | None:
    """Shares of the attribution *inside of the vessels* by the vessels' radius.

    Args:
        attribution: The map.
        edges_mm: Edges of the bins of the radius, ascending, in mm.
        region: The vessels, named as for `distance_profile`.

    Returns:
        The profile, or None without vessels, or where none of the attribution is inside of them.
    """
    inside = region_of(attribution, region)
    if inside is None:
        return None
    mass = magnitude(attribution)[inside]
    caliber = caliber_mm(inside, attribution.probe.spacing_mm)[inside]
    return _profile(mass, caliber, edges_mm) if bool(mass.any()) else None


@dataclass(frozen=True)
class MassAtDistance(FocusMetric):
    """Share of the attribution in a band around the vessels' wall.

    ``sum_{above < w(v) <= below} |a_v| / sum_v |a_v|`` with ``w`` the distance from the wall, in
    mm: positive outside of the region, negative inside (`vessels.wall_distance_mm`). A flat map has
    the band's share of the volume.

    Args:
        above: Where the band begins, in mm; None: at the middle of the vessels.
        below: Where it ends, in mm; None: nowhere.
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    Raises:
        ValueError: for a band that is none.
    """

    above: float | None = None
    below: float | None = 0.0
    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "Share of the attribution in this band of distances from the vessel wall."

    def __post_init__(self) -> None:
        _check_band(self, self.above, self.below)

    def measure(self, attribution: Attribution) -> float | None:
        wall = _wall(attribution, self.region)
        if wall is None:
            return None
        return _share_in_band(magnitude(attribution), wall, self.above, self.below)


@dataclass(frozen=True)
class MassAtCaliber(FocusMetric):
    """Share of the attribution inside of the vessels that lies in vessels of a caliber.

    ``sum_{v in G, above < r(v) <= below} |a_v| / sum_{v in G} |a_v|`` with ``G`` the region and
    ``r(v)`` the radius of the vessel that the voxel belongs to: that of the nearest voxel of the
    centerline. A map flat on the vessels has the share of their volume that is of this caliber.

    Args:
        above: Radius above which a vessel counts, in mm; None: from the thinnest.
        below: Radius up to which it counts, in mm; None: to the thickest.
        region: The vessels: ``label``, ``target``, ``predicted``, or a region of the probe.

    Raises:
        ValueError: for a band that is none.
    """

    above: float | None = None
    below: float | None = 0.75
    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "Of the attribution inside of vessels, the share in vessels of these radii."

    def __post_init__(self) -> None:
        _check_band(self, self.above, self.below)

    def measure(self, attribution: Attribution) -> float | None:
        inside = region_of(attribution, self.region)
        if inside is None:
            return None
        mass = magnitude(attribution)[inside]
        if not bool(mass.any()):
            return None
        spacing = attribution.probe.spacing_mm
        caliber = made_once(
            attribution, ("caliber", self.region), lambda: caliber_mm(inside, spacing)[inside]
        )
        return _share_in_band(mass, caliber, self.above, self.below)


@dataclass(frozen=True)
class MiddleShare(FocusMetric):
    """Whether the attribution inside of the vessels lies along their middle or at their wall.

    ``sum_{v in G} |a_v| t(v) / sum_{v in G} |a_v|`` with ``G`` the region and
    ``t = w / (w + c)`` the depth of a voxel, ``w`` its distance from the wall and ``c`` from the
    centerline: 1 on the centerline, towards 0 at the wall. A map flat on the vessels has their mean
    depth.

    Args:
        region: The vessels: ``label``, ``target``, ``predicted``, or a region of the probe.
    """

    region: str = "label"

    unit = "1"
    range = (0.0, 1.0)
    higher_is_better = None
    reading = "1: inside of vessels, attribution is on the centerline; near 0: at the wall."

    def measure(self, attribution: Attribution) -> float | None:
        inside = region_of(attribution, self.region)
        wall = _wall(attribution, self.region)
        if inside is None or wall is None:
            return None
        mass = magnitude(attribution)[inside]
        spacing = attribution.probe.spacing_mm
        line = centerline(inside, spacing)
        if not bool(mass.any()) or not len(line.ijk):
            return None
        to_wall = -wall[inside].double()
        to_line = distance_mm(line.mask(torch.ones(len(line.ijk), dtype=torch.bool)), spacing)
        depth = to_wall / (to_wall + to_line[inside].double())
        return float(torch.vdot(mass, depth) / mass.sum())


@dataclass(frozen=True)
class ReachQuantile(FocusMetric):
    """Distance from the region within which a share of the attribution lies, in mm.

    The smallest ``d`` with ``sum_{d(v) <= d} |a_v| >= share * sum_v |a_v|`` and ``d(v)`` the
    distance to the nearest voxel of the region, 0 inside.

    Args:
        share: Share of the attribution, in (0, 1]: 0.5 is the median, 0.9 nearly all.
        region: ``label``, ``target``, ``predicted``, or the name of a region of the probe.

    Raises:
        ValueError: for a share outside (0, 1].
    """

    share: float = 0.9
    region: str = "target"

    unit = "mm"
    range = (0.0, math.inf)
    higher_is_better = None
    reading = "How far from the region one must go to have this share of the attribution."

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(
                f"`ReachQuantile(share={self.share})` needs a share of the attribution above 0 and "
                "at most 1, such as 0.9."
            )

    def measure(self, attribution: Attribution) -> float | None:
        distance = distance_from(attribution, self.region)
        if distance is None:
            return None
        mass = magnitude(attribution)
        # the last bits of a sum must not send a share of 1 beyond the last voxel with attribution
        enough = self.share * float(mass.sum()) * (1.0 - 1e-12)
        # first the bin in which it is reached, so that only that bin must be sorted
        bins = made_once(attribution, ("bins", self.region), partial(_bins, distance))
        reached = made_once(
            attribution,
            ("reached", self.region),
            lambda: torch.bincount(bins.flatten(), weights=mass.flatten()).cumsum(0),
        )
        bin_ = min(int((reached < enough).sum()), len(reached) - 1)
        before = float(reached[bin_ - 1]) if bin_ else 0.0
        inside = bins == bin_
        near, order = distance[inside].sort()
        within = before + mass[inside][order].cumsum(0)
        return float(near[min(int((within < enough).sum()), len(near) - 1)])


def _bins(distance: Float[Tensor, "i j k"]) -> Int[Tensor, "i j k"]:
    return (distance * ((_BINS - 1) / max(float(distance.max()), 1e-30))).int()


def _wall(attribution: Attribution, region: str) -> Float[Tensor, "i j k"] | None:
    """Distance from the region's wall; None without a wall."""
    inside = region_of(attribution, region)
    if inside is None or bool(inside.all()):
        return None
    spacing = attribution.probe.spacing_mm
    return made_once(attribution, ("wall", region), lambda: wall_distance_mm(inside, spacing))


def _in_band(
    values: Float[Tensor, "*shape"], above: float | None, below: float | None
) -> Bool[Tensor, "*shape"]:
    chosen = torch.ones(values.shape, dtype=torch.bool)
    if above is not None:
        chosen &= values > above
    if below is not None:
        chosen &= values <= below
    return chosen


def _share_in_band(mass: Tensor, place: Tensor, above: float | None, below: float | None) -> float:
    within = _in_band(place, above, below).double()
    return min(1.0, float(torch.vdot(mass.flatten(), within.flatten()) / mass.sum()))


def _check_band(metric: FocusMetric, above: float | None, below: float | None) -> None:
    given = [edge for edge in (above, below) if edge is not None]
    if not all(map(math.isfinite, given)) or (len(given) == 2 and given[0] >= given[1]):
        raise ValueError(
            f"`{metric}` needs finite millimeters with above < below; None leaves a side open."
        )


def _profile(mass: Tensor, place: Tensor, edges_mm: tuple[float, ...]) -> Profile:
    edges = np.asarray(edges_mm, dtype=np.float64)
    if len(edges) < 2 or not bool((np.diff(edges) > 0).all()):
        raise ValueError(
            f"A profile needs ascending edges of at least one bin in mm, but got {edges_mm}."
        )
    # as in `_in_band`: a value on an edge belongs to the bin below it
    bins = np.searchsorted(edges, place.flatten().double().numpy(), side="left") - 1
    held = (bins >= 0) & (bins < len(edges) - 1)
    weights = mass.flatten().numpy()
    shares = np.bincount(bins[held], weights=weights[held], minlength=len(edges) - 1)
    voxels = np.bincount(bins[held], minlength=len(edges) - 1)
    return Profile(
        tuple(edges.tolist()),
        tuple((shares / weights.sum()).tolist()),
        tuple((voxels / bins.size).tolist()),
    )
