"""Targets on the structures of a vessel tree: its pieces, its borders, its centerline.

They are targets as those of `targets`; the geometry is that of `vessels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from lightning_segxai.targets import Target, check_class, class_region, summed, true_region
from lightning_segxai.values import Logits, Mask, Probe
from lightning_segxai.vessels import (
    Centerline,
    border,
    centerline,
    largest_component,
    largest_lack,
)

Piece = Literal["largest_missed", "largest_false", "largest_predicted", "largest_true"]
Side = Literal["inner", "outer"]
Place = Literal["endpoints", "bifurcations", "thin", "thick"]


@dataclass(frozen=True)
class ComponentEvidence(Target):
    """The summed logits of one class over one connected piece: why this vessel, or why not.

    Voxels are connected by faces, edges and corners; of pieces with equally many voxels it is the
    first in index order. Where there is no such piece, all weights are zero. A prediction a little
    too thin or too thick differs from the label by a shell one voxel thick around every vessel:
    ``largest_missed`` and ``largest_false`` leave it out. They put together the differing voxels
    that do not touch the other mask, take the largest piece of these, and grow it by the differing
    voxels that touch it.

    Args:
        which: ``largest_missed``: the largest piece of the class in the probe's label that the
            network does not predict; ``largest_false``: the largest that it predicts and the label
            denies; ``largest_predicted`` and ``largest_true``: the largest component of the
            prediction and of the label.
        label: The class.

    Raises:
        ValueError: for another ``which``, or if the network has no such class.
        UnsupportedError: for all but ``largest_predicted`` on a probe without a label.

    References:
        Kong & Rosenfeld, "Digital topology: introduction and survey", Computer Vision, Graphics,
        and Image Processing 48, 1989.
    """

    which: Piece = "largest_missed"
    label: int = 1

    def __post_init__(self) -> None:
        _check_choice(self, "which", self.which, get_args(Piece))

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        return summed(self.label, self._piece(probe, logits), logits)

    def _piece(self, probe: Probe, logits: Logits) -> Mask:
        predicted = class_region(self, self.label, "predicted", probe, logits)
        if self.which == "largest_predicted":
            return largest_component(predicted)
        truth = true_region(self, self.label, probe)
        if self.which == "largest_true":
            return largest_component(truth)
        if self.which == "largest_missed":
            return largest_lack(truth, predicted)
        return largest_lack(predicted, truth)


@dataclass(frozen=True)
class BorderEvidence(Target):
    """The summed logits of one class along the border of its region: what settles its width.

    The border is where two voxels share a face of which one lies in the region and one outside;
    where the volume ends there is none.

    Args:
        side: ``inner``: the voxels of the region along the border; ``outer``: those outside.
        label: The class.
        region: ``truth``: the voxels of this class in the probe's label; ``predicted``: where the
            network says this class. On a probe without a label ``truth`` means ``predicted``.

    Raises:
        ValueError: for another ``side`` or ``region``, or if the network has no such class.

    References:
        Kong & Rosenfeld, "Digital topology: introduction and survey", Computer Vision, Graphics,
        and Image Processing 48, 1989.
    """

    side: Side = "inner"
    label: int = 1
    region: Literal["truth", "predicted"] = "truth"

    def __post_init__(self) -> None:
        _check_choice(self, "side", self.side, get_args(Side))
        _check_choice(self, "region", self.region, ("truth", "predicted"))

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        region = class_region(self, self.label, self.region, probe, logits)
        return summed(self.label, border(region if self.side == "inner" else ~region), logits)


@dataclass(frozen=True)
class GraphEvidence(Target):
    """The summed logits of one class at places of its centerline, such as where vessels part.

    The centerline is that of the class in the probe's label, made by thinning; its voxels are
    neighbors by faces, edges and corners. Bifurcations cut it into segments, and a segment's radius
    is the mean distance of its voxels to the nearest voxel outside the label. A voxel of a
    bifurcation is neither thin nor thick. An end point lies up to a radius before the tip of a
    vessel; where a vessel leaves the volume it has one too. Thinning may shorten further, or lose,
    a straight piece of an even number of voxels across, which then has no weight.

    Args:
        at: ``endpoints``: the centerline's voxels with one neighbor; ``bifurcations``: those with
            three or more; ``thin``, ``thick``: those on segments with a radius below ``radius_mm``,
            or of at least that.
        label: The class.
        radius_mm: The radius in millimeters that parts thin from thick. None: the radius that
            parts the segments' voxels most evenly; a median that gives the segment in the middle
            to the side that is short of voxels. All is thick where all radii are one.

    Raises:
        ValueError: for another ``at``, a radius that is not positive and finite or stands where
            none is asked for, or if the network has no such class.
        UnsupportedError: on a probe without a label.

    References:
        Lee, Kashyap & Chu, "Building skeleton models via 3-D medial surface/axis thinning
        algorithms", CVGIP: Graphical Models and Image Processing 56, 1994.
    """

    at: Place = "endpoints"
    label: int = 1
    radius_mm: float | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "at", self.at, get_args(Place))
        if self.radius_mm is None:
            return
        if not (math.isfinite(self.radius_mm) and self.radius_mm > 0):
            raise ValueError(
                "`GraphEvidence` needs a positive, finite radius_mm, "
                f"but got {self.radius_mm}. Leave it out for two even halves."
            )
        if self.at not in ("thin", "thick"):
            raise ValueError(
                f'`GraphEvidence` needs a radius_mm at "thin" and "thick" only, but got '
                f'{self.radius_mm} at "{self.at}". Leave it out.'
            )

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        line = centerline(true_region(self, self.label, probe), probe.spacing_mm)
        return summed(self.label, line.mask(self._chosen(line)), logits)

    def _chosen(self, line: Centerline) -> Bool[Tensor, " n"]:
        if self.at == "endpoints":
            return line.endpoints
        if self.at == "bifurcations":
            return line.bifurcations
        limit = line.dividing_radius_mm if self.radius_mm is None else self.radius_mm
        thin = line.radius_mm < limit
        return (line.segment > 0) & (thin if self.at == "thin" else ~thin)


def _check_choice(who: Target, field: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"`{type(who).__name__}` needs as its {field} one of {choices}, but got {value!r}."
        )
