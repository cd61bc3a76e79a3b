"""ToF-MRA phantoms: artificial vessels, or the label of real ones, painted with ToF contrast.

All that a test or a demo asks for is known: the label, the brain and the graph of the vessels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, UInt8
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

from lightning_segxai.data.tof import ToFContrast, scan, voxel_rho
from lightning_segxai.data.vessel_coverage import Coverage, cover, vessel_label
from lightning_segxai.data.vessel_tree import Ellipsoid, VesselGraph, grow_tree


@dataclass(frozen=True, eq=False)
class Phantom:
    """A time-of-flight angiogram and all that is true of it.

    Args:
        image: Intensities, non-negative.
        label: 1 in vessels.
        brain: The brain, its vessels and ventricles included.
        graph: Center lines, radii, branches and paths of the vessels.
        spacing_mm: Edge lengths of a voxel.
    """

    image: Float32[np.ndarray, "i j k"]
    label: UInt8[np.ndarray, "i j k"]
    brain: Bool[np.ndarray, "i j k"]
    graph: VesselGraph
    spacing_mm: tuple[float, float, float]


def tof_phantom(
    shape: tuple[int, int, int] = (96, 96, 64),
    spacing_mm: tuple[float, float, float] = (0.6, 0.6, 0.8),
    seed: int = 0,
    inlets: int = 3,
    min_radius_mm: float = 0.33,
    contrast: ToFContrast | None = None,
) -> Phantom:
    """A head with an artificial arterial tree; equal seeds give equal bits.

    A voxel is vessel where vessels fill at least half of it, and where the center line of a vessel
    at least a voxel thick passes, so that no such vessel is torn.

    Args:
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel; inferior to superior along k.
        seed: Of everything random.
        inlets: Arteries that enter from below, 1 to 3.
        min_radius_mm: No branch starts thinner than this.
        contrast: Contrast and disturbances; those of a 3 T scanner where it is None.

    Raises:
        ValueError: for a volume too small for a tree.
    """
    if min(shape) < 16 or min(spacing_mm) <= 0:
        raise ValueError(
            f"`tof_phantom(shape={shape}, spacing_mm={spacing_mm})` needs at least 16 voxels of "
            "positive size along each axis."
        )
    growing, scanning = np.random.default_rng(seed).spawn(2)
    graph = grow_tree(shape, spacing_mm, growing, inlets=inlets, min_radius_mm=min_radius_mm)
    coverage = cover(graph, shape, spacing_mm)
    image = render_tof(graph, coverage, shape, spacing_mm, scanning, contrast)
    brain = voxel_rho(Ellipsoid.brain(shape, spacing_mm), shape, spacing_mm) < 1
    return Phantom(
        image, vessel_label(graph, coverage, shape, spacing_mm), brain, graph, spacing_mm
    )


def render_tof(
    graph: VesselGraph,
    coverage: Coverage,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    contrast: ToFContrast | None = None,
) -> Float32[np.ndarray, "i j k"]:
    """Paint a graph and the head around it.

    Args:
        graph: The vessels.
        coverage: The voxels that they touch.
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel.
        rng: Source of tissue, sensitivity and noise.
        contrast: Contrast and disturbances; those of a 3 T scanner where it is None.
    """
    contrast = contrast or ToFContrast()
    starts = np.cumsum([0, *(len(b.points_mm) for b in graph.branches)])[:-1]
    radius = np.concatenate([b.radius_mm for b in graph.branches])
    blood = contrast.blood(radius, np.concatenate(transits(graph)))
    values = blood[starts[coverage.branch] + coverage.point]
    brain = Ellipsoid.brain(shape, spacing_mm)
    return scan(coverage.voxels, coverage.fraction, values, brain, shape, spacing_mm, rng, contrast)


def transits(graph: VesselGraph) -> list[Float[np.ndarray, " _"]]:
    """The integral of ds / r from the inlet to each point of each branch; grows along the way."""
    found: list[np.ndarray] = []
    for branch in graph.branches:
        begun = found[branch.parent][-1] if branch.parent >= 0 else 0.0
        pieces = np.diff(branch.path_mm) / branch.radius_mm[:-1]
        found.append(begun + np.append(0.0, np.cumsum(pieces)))
    return found


def paint_tof(
    label: Integer[np.ndarray, "i j k"] | Bool[np.ndarray, "i j k"],
    spacing_mm: tuple[float, float, float],
    seed: int = 0,
    contrast: ToFContrast | None = None,
) -> Float32[np.ndarray, "i j k"]:
    """Paint time-of-flight contrast onto a given vessel label, such as a manual one.

    Radii come from the distance transform; blood enters at the lowest voxels of each connected
    vessel and takes the quickest way through it.

    Args:
        label: Vessels are all voxels above 0; inferior to superior along k.
        spacing_mm: Edge lengths of a voxel.
        seed: Of tissue, sensitivity and noise.
        contrast: Contrast and disturbances; those of a 3 T scanner where it is None.

    Raises:
        ValueError: for a label without vessels.
    """
    vessel = np.asarray(label) > 0
    if not vessel.any():
        raise ValueError("`paint_tof(label)` needs a label with vessels, but no voxel is above 0.")
    contrast = contrast or ToFContrast()
    rng = np.random.default_rng(seed)
    ijk = np.argwhere(vessel)
    radius, transit = _flow(vessel, ijk, np.array(spacing_mm))
    voxels = np.flatnonzero(vessel)  # in the order of argwhere
    brain = _around(ijk * np.array(spacing_mm))
    shape = (vessel.shape[0], vessel.shape[1], vessel.shape[2])
    return scan(
        voxels,
        np.ones(len(voxels)),
        contrast.blood(radius, transit),
        brain,
        shape,
        spacing_mm,
        rng,
        contrast,
    )


def _flow(
    vessel: Bool[np.ndarray, "i j k"], ijk: Integer[np.ndarray, "n 3"], spacing: np.ndarray
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Radius of each voxel's vessel, and the integral of ds / r on the quickest way to it."""
    low, high = ijk.min(0), ijk.max(0) + 1
    box = np.pad(vessel[tuple(map(slice, low, high))], 1)
    depth = ndimage.distance_transform_edt(box, sampling=spacing).astype(np.float32)
    inside = tuple((ijk - low + 1).T)
    ridge = (depth == ndimage.maximum_filter(depth, 3))[inside]
    points = ijk * spacing
    nearest = cKDTree(points[ridge]).query(points)[1]
    radius = np.maximum(depth[inside][ridge][nearest], spacing.min() / 2).astype(np.float64)

    number = np.full(box.shape, -1)
    number[inside] = np.arange(len(ijk))
    rows, columns, costs = [], [], []
    for step in [s for s in np.ndindex(3, 3, 3) if s > (1, 1, 1)]:
        shift = np.array(step) - 1
        other = number[tuple((ijk - low + 1 + shift).T)]
        met = np.flatnonzero(other >= 0)
        rows.append(met)
        columns.append(other[met])
        costs.append(2 * np.linalg.norm(shift * spacing) / (radius[met] + radius[other[met]]))
    size = len(ijk)
    links = (np.concatenate(rows), np.concatenate(columns))
    lattice = coo_array((np.concatenate(costs), links), shape=(size, size)).tocsr()
    count, component = connected_components(lattice, directed=False)
    height = points[:, 2]
    floor = ndimage.minimum(height, component, np.arange(count))
    sources = np.flatnonzero(height <= floor[component] + spacing[2] / 2)
    way = dijkstra(lattice, directed=False, indices=sources, min_only=True)
    # a component that starts in mid-air was reached through vessels that the label lacks
    return radius, way + (floor - floor.min())[component]


def _around(points_mm: Float[np.ndarray, "n 3"]) -> Ellipsoid:
    """A brain around vessels, with nearly all of them inside."""
    low, high = np.percentile(points_mm, [2, 98], axis=0)
    x, y, _ = ((low + high) / 2).tolist()
    z = float(low[2] + 0.55 * (high - low)[2])
    a, b, c = ((high - low) / 2 * (1, 1, 1.5)).tolist()
    reach = np.percentile(Ellipsoid((x, y, z), (a, b, c)).rho(points_mm), 97) / 0.96
    return Ellipsoid((x, y, z), (float(a * reach), float(b * reach), float(c * reach)))
