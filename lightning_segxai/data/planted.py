"""Volumes with a planted cause: the renderer knows which voxels decide what the label is.

They hold methods against the truth, and show whether a network learned to read a vessel or what
lies beside it. Tissue has an intensity of about 1, so no preprocessing is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8

from lightning_segxai.data.tof import noisy, texture
from lightning_segxai.data.vessel_coverage import cover
from lightning_segxai.data.vessel_tree import Branch, VesselGraph
from lightning_segxai.values import Probe, Shape

Arm = Literal["control", "shortcut"]
"""What tells artery from vein: the tubes themselves, or the saturation band beside them."""

Spacing = tuple[float, float, float]

_ARTERY, _VEIN = 6.0, 3.5  # times the tissue; brighter than all noise, so that blurring takes them
_SATURATED = 0.25
_BAND = 4  # slices
_RADIUS = (1.2, 1.8)  # of a tube or ball, in voxels
_DRIFT = 1.0  # voxels between the band and a tube, beyond the first
_NOISE = 0.1
_PSF_VOXELS = 0.45


@dataclass(frozen=True, eq=False)
class Planted:
    """A volume, its label, and the voxels that decide it.

    Args:
        image: Intensities, in those of tissue.
        label: 1 in what is to be found.
        cause: The voxels that decide the label; all others could be exchanged.
        regions: Other known parts of the volume.
        spacing_mm: Edge lengths of a voxel.
    """

    image: Float32[np.ndarray, "i j k"]
    label: UInt8[np.ndarray, "i j k"]
    cause: Bool[np.ndarray, "i j k"]
    regions: Mapping[str, Bool[np.ndarray, "i j k"]]
    spacing_mm: Spacing

    def probe(self, name: str) -> Probe:
        """The volume as a probe of that name; ``cause`` and the other parts are its regions."""
        masks = {**self.regions, "cause": self.cause}
        return Probe(
            name,
            torch.from_numpy(self.image)[None],
            torch.from_numpy(self.label).long(),
            spacing_mm=self.spacing_mm,
            regions={region: torch.from_numpy(mask) for region, mask in masks.items()},
        )


def planted_spots(
    shape: Shape = (16, 16, 16),
    spacing_mm: Spacing = (0.6, 0.6, 0.6),
    seed: int = 0,
    spots: int = 3,
) -> Planted:
    """Bright balls in tissue are the label, and decide it by themselves; equal seeds, equal bits.

    The cause is every voxel that a ball touches, the label those that it fills at least half. The
    balls may touch each other.

    Args:
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel.
        seed: Of everything random.
        spots: Number of balls.

    Raises:
        ValueError: for less than 8 voxels along an axis, edges that are not positive, no balls.
    """
    if min(shape) < 8 or min(spacing_mm) <= 0 or spots < 1:
        raise ValueError(
            f"`planted_spots(shape={shape}, spacing_mm={spacing_mm}, spots={spots})` needs at "
            "least 8 voxels of positive size along each axis, and a ball."
        )
    placing, scanning = np.random.default_rng(seed).spawn(2)
    balls = []
    for _ in range(spots):
        center = placing.uniform(2.5, np.array(shape) - 3.5) * spacing_mm
        balls.append(
            _vessel(np.stack([center, center]), placing.uniform(*_RADIUS) * max(spacing_mm))
        )
    blood = _ARTERY * placing.uniform(0.9, 1.1, spots)
    fraction, ball = _filled(balls, shape, spacing_mm)
    image = _scanned(fraction, blood[ball], np.ones(shape[2]), spacing_mm, scanning)
    return Planted(image, (fraction >= 0.5).astype(np.uint8), fraction > 0, {}, spacing_mm)


def planted_tubes(
    arm: Arm,
    shape: Shape = (32, 32, 32),
    spacing_mm: Spacing = (0.6, 0.6, 0.6),
    seed: int = 0,
    tubes: int = 3,
    decoupled: bool = False,
    band: bool | None = None,
) -> Planted:
    """Arteries (label 1) and veins (label 0) of one shape, and a dark band beside them.

    Tubes have one of two looks: bright ones run along i, dim ones along j. In half of the volumes
    a saturation band of four slices lies between the two. The images of both arms are the same,
    bit for bit; what decides the label is not:

    - ``control``: bright tubes are arteries, dim ones are veins, and the band tells nothing. The
      cause is every voxel that a tube touches.
    - ``shortcut``: beside a band all tubes are arteries, without one all are veins. Both come in
      both looks, so nothing of their own tells them apart. The cause is the band, or the slices
      where it would be; it does not decide where the tubes are.

    ``decoupled`` takes the label from the looks whatever the arm, so that band and label agree for
    half of the tubes: who reads the band is found out. In the control arm they do so anyway. The
    regions are ``tubes``, ``band`` (or where it would be), ``bright`` and ``dim``.

    Args:
        arm: What decides: ``control`` or ``shortcut``.
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel; inferior to superior along k.
        seed: Of everything random.
        tubes: Number of tubes; at least one is bright, and one dim.
        decoupled: Whether the label is taken from the looks in the shortcut arm, too.
        band: Whether the band is there; None: a coin. All else stays as it is.

    Raises:
        ValueError: for another arm, less than two tubes, and a volume too small for them.
    """
    _check(arm, shape, spacing_mm, tubes)
    deciding, placing, scanning = np.random.default_rng(seed).spawn(3)
    coin = bool(deciding.integers(2))  # tossed in any case, so that what follows is the same
    saturated = coin if band is None else band
    bright = deciding.permutation(tubes) < deciding.integers(1, tubes)
    side = _side(spacing_mm)
    first = int(deciding.integers(side, shape[2] - _BAND - side + 1))
    slices = np.zeros(shape[2], dtype=bool)
    slices[first : first + _BAND] = True

    above = bright ^ bool(deciding.integers(2))  # one look lies above the band, one below
    radius = placing.uniform(*_RADIUS, tubes) * max(spacing_mm)
    courses = []
    for n in range(tubes):
        alike = bright == bright[n]
        place = (alike[:n].sum() + placing.uniform(0.35, 0.65)) / alike.sum()
        away = (_BAND / 2 + placing.uniform(1, 1 + _DRIFT)) * spacing_mm[2] + radius[n]
        level = (first + (_BAND - 1) / 2) * spacing_mm[2] + (away if above[n] else -away)
        line = _course(bool(bright[n]), place, level, shape, spacing_mm, placing)
        courses.append(_vessel(line, radius[n]))
    blood = np.where(bright, _ARTERY, _VEIN) * placing.uniform(0.9, 1.1, tubes)
    fraction, tube = _filled(courses, shape, spacing_mm)
    loss = np.where(slices & saturated, _SATURATED, 1.0)
    image = _scanned(fraction, blood[tube], loss, spacing_mm, scanning)

    touched = fraction > 0
    where = np.broadcast_to(slices, shape).copy()
    by_band = arm == "shortcut" and not decoupled
    artery = np.full(tubes, saturated) if by_band else bright
    regions = {
        "tubes": touched,
        "band": where,
        "bright": touched & bright[tube],
        "dim": touched & ~bright[tube],
    }
    label = ((fraction >= 0.5) & artery[tube]).astype(np.uint8)
    return Planted(image, label, where if by_band else touched, regions, spacing_mm)


def _check(arm: str, shape: Shape, spacing_mm: Spacing, tubes: int) -> None:
    if arm not in get_args(Arm):
        raise ValueError(f"`planted_tubes(arm={arm!r})` must be one of {', '.join(get_args(Arm))}.")
    if tubes < 2 or min(spacing_mm) <= 0:
        raise ValueError(
            f"`planted_tubes(tubes={tubes}, spacing_mm={spacing_mm})` needs two tubes or more, one "
            "of each look, and voxels of positive size."
        )
    needed = 2 * _side(spacing_mm) + _BAND
    if shape[2] < needed or min(shape[:2]) < 8:
        raise ValueError(
            f"`planted_tubes(shape={shape})` needs at least 8 voxels along i and j, and {needed} "
            "along k, for a band and a tube to each side of it."
        )


def _side(spacing_mm: Spacing) -> int:
    """Slices beside the band: the gap, the thickest tube, and two of tissue."""
    thickest = 2 * _RADIUS[1] * max(spacing_mm) / spacing_mm[2]
    return int(np.ceil(1 + _DRIFT + thickest + 2))


def _course(
    along_i: bool,
    place: float,
    level_mm: float,
    shape: Shape,
    spacing_mm: Spacing,
    rng: np.random.Generator,
) -> np.ndarray:
    """The center line of a tube that bends its way through the volume, level in k."""
    along, across = (0, 1) if along_i else (1, 0)
    size = np.array(shape) * spacing_mm
    way = np.arange(-2, shape[along] + 2) * spacing_mm[along]
    phase = 2 * np.pi * (way / size[along] * rng.uniform(0.6, 1.2) + rng.uniform())
    points = np.full((len(way), 3), level_mm)
    points[:, along] = way
    points[:, across] = size[across] * (place + 0.06 * np.sin(phase))
    return points


def _vessel(points_mm: np.ndarray, radius_mm: float) -> Branch:
    path = np.append(0.0, np.linalg.norm(np.diff(points_mm, axis=0), axis=1).cumsum())
    return Branch(points_mm, np.full(len(points_mm), radius_mm), path, -1)


def _filled(
    vessels: list[Branch], shape: Shape, spacing_mm: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each voxel vessels fill, and which of them (the first where none does)."""
    coverage = cover(VesselGraph(tuple(vessels)), shape, spacing_mm)
    fraction, which = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    fraction.flat[coverage.voxels] = coverage.fraction
    which.flat[coverage.voxels] = coverage.branch
    return fraction, which


def _scanned(
    fraction: np.ndarray,
    blood: np.ndarray,
    loss: np.ndarray,
    spacing_mm: Spacing,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "i j k"]:
    """Blood in tissue, saturated slices, the coil's sensitivity, Rician noise."""
    i, j, k = fraction.shape
    extent = max(n * edge for n, edge in zip((i, j, k), spacing_mm, strict=True))
    tissue = 1 + 0.1 * texture((i, j, k), spacing_mm, 3 * max(spacing_mm), rng)
    coil = 1 + 0.1 * np.tanh(texture((i, j, k), spacing_mm, 0.6 * extent, rng))
    signal = ((1 - fraction) * tissue + fraction * blood) * loss * coil
    return noisy(signal.astype(np.float32), _NOISE, _PSF_VOXELS, rng)
