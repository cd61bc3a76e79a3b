"""Which voxels the vessels of a graph fill, and by how much.

Between the geometry of ``vessel_tree.py`` and the contrast of ``tof.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from lightning_segxai.data.vessel_tree import VesselGraph


@dataclass(frozen=True, eq=False)
class Coverage:
    """The voxels that a graph touches.

    Args:
        voxels: Flat indices, ascending.
        fraction: Share of each voxel inside a vessel, 0 to 1.
        branch: The branch whose wall is deepest around the voxel's center.
        point: The point of that branch's center line next to it.
    """

    voxels: Integer[np.ndarray, " n"]
    fraction: Float[np.ndarray, " n"]
    branch: Int[np.ndarray, " n"]
    point: Int[np.ndarray, " n"]


def cover(
    graph: VesselGraph, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> Coverage:
    """Partial volumes of round cones between center-line points, from eight samples a voxel."""
    spacing = np.array(spacing_mm)
    a = np.concatenate([b.points_mm[:-1] for b in graph.branches])
    ab = np.concatenate([np.diff(b.points_mm, axis=0) for b in graph.branches])
    ra = np.concatenate([b.radius_mm[:-1] for b in graph.branches])
    dr = np.concatenate([np.diff(b.radius_mm) for b in graph.branches])
    counts = [len(b.points_mm) - 1 for b in graph.branches]
    branch = np.repeat(np.arange(len(counts)), counts)
    point = np.concatenate([np.arange(n) for n in counts])
    square = np.maximum((ab**2).sum(1), 1e-12)

    def depth(segment: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Signed distance to the wall: negative inside."""
        offset = position - a[segment]
        t = np.clip((offset * ab[segment]).sum(1) / square[segment], 0, 1)
        away = offset - t[:, None] * ab[segment]
        return np.asarray(np.sqrt((away**2).sum(1)) - ra[segment] - t * dr[segment])

    segment, ijk = _near(a, a + ab, np.maximum(ra, ra + dr), shape, spacing)
    center = depth(segment, ijk * spacing)
    close = center < np.linalg.norm(spacing) / 2
    segment, ijk, center = segment[close], ijk[close], center[close]
    voxels, at = np.unique(np.ravel_multi_index(tuple(ijk.T), shape), return_inverse=True)

    ramp = float(np.prod(spacing) ** (1 / 3)) / 2  # width over which a sample goes from in to out
    # a ramp adds pi ramp^2 / 12 to the cross section of a tube: take that away beforehand
    slim = ra - np.sqrt(np.maximum(ra**2 - ramp**2 / 12, 0))
    fraction = np.zeros(len(voxels))
    for corner in np.ndindex(2, 2, 2):
        nearest = np.full(len(voxels), np.inf)
        sample = (ijk + np.array(corner) / 2 - 0.25) * spacing
        np.minimum.at(nearest, at, depth(segment, sample) + slim[segment])
        fraction += np.clip(0.5 - nearest / ramp, 0, 1) / 8
    deepest = np.full(len(voxels), np.inf)
    np.minimum.at(deepest, at, center)
    winner = np.zeros(len(voxels), dtype=np.int64)
    won = center == deepest[at]
    winner[at[won]] = segment[won]
    return Coverage(voxels, fraction, branch[winner], point[winner])


def _near(
    a: np.ndarray,
    b: np.ndarray,
    radius: np.ndarray,
    shape: tuple[int, int, int],
    spacing: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a segment and a voxel in the box around it."""
    low = np.floor((np.minimum(a, b) - radius[:, None]) / spacing - 0.5).astype(np.int64)
    high = np.ceil((np.maximum(a, b) + radius[:, None]) / spacing + 0.5).astype(np.int64)
    low, high = np.maximum(low, 0), np.minimum(high, np.array(shape) - 1)
    boxes, kind = np.unique(high - low + 1, axis=0, return_inverse=True)
    order = np.argsort(kind, kind="stable")
    segments, voxels = [], []
    for box, members in zip(boxes, np.split(order, np.cumsum(np.bincount(kind))[:-1]), strict=True):
        if box.min() < 1:  # wholly outside the volume
            continue
        offsets = np.indices(tuple(box)).reshape(3, -1).T
        voxels.append((low[members][:, None] + offsets).reshape(-1, 3))
        segments.append(np.repeat(members, len(offsets)))
    return np.concatenate(segments), np.concatenate(voxels)


def vessel_label(
    graph: VesselGraph,
    coverage: Coverage,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> UInt8[np.ndarray, "i j k"]:
    """The voxels at least half covered, and those on the center line of a vessel a voxel thick."""
    label = np.zeros(shape, dtype=np.uint8)
    label.flat[coverage.voxels[coverage.fraction >= 0.5]] = 1
    for branch in graph.branches:
        thick = branch.radius_mm > max(spacing_mm) / 2
        label[tuple(np.rint(branch.points_mm[thick] / spacing_mm).astype(int).T)] = 1
    return label
