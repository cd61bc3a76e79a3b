"""Artificial arterial trees whose every radius, branch and path is known.

The geometry behind the phantom; ``phantom.py`` paints it. Points are in millimeters, and the center
of voxel ``(i, j, k)`` is at ``(i, j, k) * spacing_mm``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

_INLETS = np.array([[-0.24, 0.10], [0.24, 0.10], [0.0, -0.16]])  # carotids, basilar; in semi-axes
_WILLIS = 0.30  # height at which the inlets first branch, as a share of the volume's
_AZIMUTHS = 8  # planes tried for a bifurcation; the one with most free space wins


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid along the axes; the volume may cut it.

    Args:
        center_mm: Its center.
        semi_mm: Its semi-axes.
    """

    center_mm: tuple[float, float, float]
    semi_mm: tuple[float, float, float]

    def rho(self, points_mm: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
        """Distance from the center in semi-axes: 1 on the surface."""
        scaled = (points_mm - self.center_mm) / np.array(self.semi_mm)
        return np.asarray(np.linalg.norm(scaled, axis=-1))

    @classmethod
    def brain(
        cls, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
    ) -> Ellipsoid:
        """A brain that fills the volume, cut by its lower face as ToF slabs cut it."""
        extent = (np.array(shape) - 1) * spacing_mm
        x, y, z = (extent * (0.5, 0.5, 0.36)).tolist()
        a, b, c = (extent * (0.40, 0.43, 0.56)).tolist()
        return cls((x, y, z), (a, b, c))


@dataclass(frozen=True, eq=False)
class Branch:
    """The vessel between two bifurcations.

    Args:
        points_mm: Center line from the inlet's side on; the first point is the parent's last.
        radius_mm: Radius at each point.
        path_mm: Length of the way from the inlet to each point, along the center lines.
        parent: Index of the parent branch in the graph; -1 for an inlet.
    """

    points_mm: Float[np.ndarray, "n 3"]
    radius_mm: Float[np.ndarray, " n"]
    path_mm: Float[np.ndarray, " n"]
    parent: int


@dataclass(frozen=True, eq=False)
class VesselGraph:
    """A forest of branches: the truth behind a phantom.

    Args:
        branches: All branches; parents come before their children.
    """

    branches: tuple[Branch, ...]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the branches that start where each branch ends."""
        found: list[list[int]] = [[] for _ in self.branches]
        for index, branch in enumerate(self.branches):
            if branch.parent >= 0:
                found[branch.parent].append(index)
        return tuple(tuple(indices) for indices in found)

    @cached_property
    def bifurcations_mm(self) -> Float[np.ndarray, "n 3"]:
        """Where branches divide."""
        return self._ends(dividing=True)

    @cached_property
    def end_points_mm(self) -> Float[np.ndarray, "n 3"]:
        """Where branches end without children."""
        return self._ends(dividing=False)

    def _ends(self, dividing: bool) -> Float[np.ndarray, "n 3"]:
        pairs = zip(self.branches, self.children, strict=True)
        return np.array([b.points_mm[-1] for b, c in pairs if bool(c) == dividing]).reshape(-1, 3)


def grow_tree(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    inlets: int = 3,
    inlet_radius_mm: float | None = None,
    min_radius_mm: float = 0.33,
) -> VesselGraph:
    r"""Grow arteries from the lower face of the volume into the brain.

    Bifurcations keep Murray's law and his angles, which make transport cheapest:

    $$r_0^3 = r_1^3 + r_2^3, \quad
    \cos\theta_{1,2} = \frac{r_0^4 + r_{1,2}^4 - r_{2,1}^4}{2 r_0^2 r_{1,2}^2}$$

    Args:
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel.
        rng: Source of all randomness.
        inlets: Arteries that enter from below: two carotids, then the basilar; 1 to 3.
        inlet_radius_mm: Radius of the carotids; by the size of the volume where it is None.
        min_radius_mm: No branch starts thinner than this.

    Raises:
        ValueError: for a number of inlets that is not 1 to 3, and for radii that are not positive.

    References:
        Murray, "The physiological principle of minimum work applied to the angle of branching of
        arteries", J Gen Physiol 9, 1926.
    """
    if not 1 <= inlets <= len(_INLETS):
        raise ValueError(f"`grow_tree(inlets={inlets})` needs 1 to {len(_INLETS)} inlets.")
    brain = Ellipsoid.brain(shape, spacing_mm)
    extent = (np.array(shape) - 1) * spacing_mm
    size = float(extent.prod() ** (1 / 3))
    thickest = 0.95 + 0.006 * size if inlet_radius_mm is None else inlet_radius_mm
    if not 0 < min_radius_mm <= thickest:
        raise ValueError(
            f"`grow_tree` needs 0 < min_radius_mm <= inlet_radius_mm, but got {min_radius_mm} and "
            f"{thickest}. Radii are in millimeters."
        )
    grower = _Grower(brain, rng, size / 120, min(spacing_mm), min_radius_mm)
    for index in range(inlets):
        across = np.array(brain.center_mm[:2]) + _INLETS[index] * brain.semi_mm[:2]
        start, heading = np.append(across, 0.0), np.array([0.0, 0.0, 1.0])
        radius = thickest * (0.85 if index == 2 else 1.0)
        rise = _WILLIS * extent[2] * rng.uniform(0.85, 1.1)
        trunk = grower.center_line(start, heading, radius, rise)
        if trunk is None:  # a volume too narrow for bends
            trunk = start + np.linspace(0, rise, 8)[:, None] * heading, heading
        grower.sprout(-1, radius, *trunk)
    return grower.grow()


class _Grower:
    """The growing tree: branches so far, tips that wait, and points that are taken."""

    def __init__(
        self, brain: Ellipsoid, rng: np.random.Generator, scale: float, step: float, thin: float
    ) -> None:
        self.brain, self.rng, self.scale, self.step, self.thin = brain, rng, scale, step, thin
        self.branches: list[Branch] = []
        self.tips: deque[tuple[int, np.ndarray]] = deque()
        self.taken = np.zeros((0, 3))

    def grow(self) -> VesselGraph:
        while self.tips:
            self.divide(*self.tips.popleft())
        return VesselGraph(tuple(self.branches))

    def divide(self, parent: int, heading: np.ndarray) -> None:
        """Split a tip in the freest of some planes, if both children are thick enough and fit."""
        start, r0 = self.branches[parent].points_mm[-1], self.branches[parent].radius_mm[-1]
        if r0 < self.thin * 2 ** (1 / 3):
            return
        least = self.thin / (r0**3 - self.thin**3) ** (1 / 3)
        ratio = self.rng.uniform(max(least, 0.45), 1.0) if least < 1 else 1.0
        r1 = r0 / (1 + ratio**3) ** (1 / 3)
        r2 = ratio * r1
        cos1 = (r0**4 + r1**4 - r2**4) / (2 * r0**2 * r1**2)
        cos2 = (r0**4 + r2**4 - r1**4) / (2 * r0**2 * r2**2)
        side, up = _perpendicular(heading)
        phi = self.rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(_AZIMUTHS) / _AZIMUTHS
        across = np.cos(phi)[:, None] * side + np.sin(phi)[:, None] * up
        first = cos1 * heading + np.sqrt(1 - cos1**2) * across
        second = cos2 * heading - np.sqrt(1 - cos2**2) * across
        length1, length2 = self.length(r1), self.length(r2)
        freedom = self.freedom(start + 0.8 * length1 * first)
        freedom += self.freedom(start + 0.8 * length2 * second)
        for plane in np.argsort(-freedom, kind="stable"):
            one = self.center_line(start, first[plane], r1, length1)
            two = self.center_line(start, second[plane], r2, length2)
            if one is not None and two is not None:
                self.sprout(parent, r1, *one)
                self.sprout(parent, r2, *two)
                return

    def length(self, radius: float) -> float:
        return float((7 + 20 * radius) * self.scale * np.exp(self.rng.normal(0, 0.25)))

    def freedom(self, ends: np.ndarray) -> np.ndarray:
        """Distance of each end to what has grown already, less a fine for leaving the brain."""
        gap = np.sqrt(((ends[:, None] - self.taken) ** 2).sum(-1)).min(1)
        return np.minimum(gap, 12 * self.scale) - 60 * np.maximum(self.brain.rho(ends) - 0.85, 0)

    def sprout(self, parent: int, radius: float, points: np.ndarray, last: np.ndarray) -> None:
        """Add a branch along a center line; its tip waits for its turn to divide."""
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        begun = self.branches[parent].path_mm[-1] if parent >= 0 else 0.0
        path = begun + np.append(0.0, np.cumsum(steps))
        taper = np.linspace(1.0, 0.985, len(points))
        self.branches.append(Branch(points, radius * taper, path, parent))
        self.taken = np.concatenate([self.taken, points[:: max(1, len(points) // 4)], points[-1:]])
        self.tips.append((len(self.branches) - 1, last))

    def center_line(
        self, start: np.ndarray, heading: np.ndarray, radius: float, length: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A tortuous curve in the brain and its final direction; None where there is no room."""
        room = 0.3 * (7 + 20 * radius) * self.scale  # for children, or the vessel would end thick
        for shorter in (1.0, 0.75, 0.55, 0.4):
            points, last = self.curve(start, heading, radius, shorter * length)
            inside = (
                self.brain.rho(np.append(points, points[-1:] + room * last, axis=0)).max() < 0.97
            )
            if inside and points[:, 2].min() >= 0:
                return points, last
        return None

    def curve(
        self, start: np.ndarray, heading: np.ndarray, radius: float, length: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """A tortuous curve and its final direction; its first and last pieces are straight."""
        last = self.drift(start + 0.6 * length * heading, heading) + self.rng.normal(0, 0.3, 3)
        last /= np.linalg.norm(last)
        t = np.linspace(0, 1, max(4, int(np.ceil(length / self.step)) + 1))[:, None]
        stub = min(0.6 * radius, 0.2 * length)
        bend = (t - t**2 / 2) * heading + t**2 / 2 * last  # from one direction to the other
        side, up = _perpendicular(last)
        wave = np.zeros_like(bend)
        for cycles in (1, 2):
            phase, size = self.rng.uniform(0, 2 * np.pi, 2), 0.09 / cycles * self.rng.normal(0, 1)
            angle = 2 * np.pi * cycles * t
            wave += size * (np.sin(angle + phase[0]) * side + np.sin(angle + phase[1]) * up)
        middle = (length - 2 * stub) * (bend + np.sin(np.pi * t) ** 2 * wave)
        middle += start + stub * heading
        return np.concatenate([start[None], middle, middle[-1:] + stub * last]), last

    def drift(self, point: np.ndarray, heading: np.ndarray) -> np.ndarray:
        """Where arteries go next: outward in the depth, along the surface and up near it."""
        normal = (point - self.brain.center_mm) / np.array(self.brain.semi_mm) ** 2
        normal /= np.linalg.norm(normal) + 1e-9
        near = float(np.clip((self.brain.rho(point) - 0.55) / 0.3, 0, 1))
        outward = max(0.0, float(heading @ normal))
        aside = normal * (1.0, 1.0, 0.3)  # in the depth, to the sides rather than up or down
        along = np.array([0.0, 0.0, 0.3]) - (1.15 * outward + 0.25) * normal
        return np.asarray(heading + 1.1 * (1 - near) * aside + near * along)


def _perpendicular(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors that make a right-handed frame with the direction."""
    least = np.eye(3)[np.argmin(np.abs(direction))]
    side = np.cross(direction, least)
    side /= np.linalg.norm(side)
    up = np.cross(direction, side)
    return side, up / np.linalg.norm(up)
