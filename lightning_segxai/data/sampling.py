"""Where the patches of a training are drawn: around vessels, anywhere, by a map, by caliber.

What a strategy must know of a volume (its *index*) is made once for each volume and kept with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from lightning_segxai.data.volumes import Volume
from lightning_segxai.values import Mask, Shape
from lightning_segxai.vessels import centerline

_KEPT_VOXELS = 2**18  # of a label: as many centers as a volume gives patches in a long training


@dataclass(frozen=True)
class Sampling(ABC):
    """How the patches of a volume are chosen.

    To add one: what it must know of a volume in ``index``, and where one patch begins in `start`.
    Volumes smaller than a patch are padded around, see `start_around`.
    """

    @abstractmethod
    def index(self, volume: Volume) -> dict[str, np.ndarray]:
        """What has to be known of a preprocessed volume; made once, and kept with it."""

    @abstractmethod
    def start(self, volume: Volume, size: Shape, nth: int, generator: np.random.Generator) -> Shape:
        """First voxel of a patch.

        Args:
            volume: What the patch is cut from, with what `index` gave.
            size: Voxels of the patch.
            nth: Which patch of this volume it is, counted over the whole training.
            generator: The only source of random numbers.
        """


@dataclass(frozen=True)
class UniformSampling(Sampling):
    """Every place inside the volume is as likely as any other."""

    def index(self, volume: Volume) -> dict[str, np.ndarray]:
        return {}

    def start(self, volume: Volume, size: Shape, nth: int, generator: np.random.Generator) -> Shape:
        return _anywhere(volume.shape, size, generator)


@dataclass(frozen=True)
class BalancedSampling(Sampling):
    """A fixed share of the patches around a vessel voxel, the others anywhere.

    Vessels are 0.15 to 0.8 % of a ToF volume, and patches drawn anywhere would mostly train on
    the rest. The share holds exactly, in turn, not only on average. A volume without a vessel
    gives patches from anywhere.

    Args:
        foreground: Share of the patches with a vessel voxel in their middle, in [0, 1].
    """

    foreground: float = 0.5

    def __post_init__(self) -> None:
        _check_share("BalancedSampling", self.foreground)

    def index(self, volume: Volume) -> dict[str, np.ndarray]:
        return {"vessels": _numbers(_vessels(volume).numpy())}

    def start(self, volume: Volume, size: Shape, nth: int, generator: np.random.Generator) -> Shape:
        vessels = volume.index["vessels"]
        if not (_in_turn(nth, self.foreground) and len(vessels)):
            return _anywhere(volume.shape, size, generator)
        return _around(vessels[generator.integers(len(vessels))], volume.shape, size)


@dataclass(frozen=True)
class CaliberSampling(Sampling):
    """Thin vessels as often as thick ones: patches around centerlines, by bands of their radius.

    The radii of a volume's vessel segments, from the thinnest to the thickest, are cut into bands
    of equal ratios; a band is chosen, each as likely as the others, then a centerline voxel of it.
    A label without a centerline is sampled by its voxels.

    Args:
        foreground: Share of the patches around a centerline voxel, in [0, 1]; the others lie
            anywhere.
        bands: Number of bands.
    """

    foreground: float = 0.5
    bands: int = 4

    def __post_init__(self) -> None:
        _check_share("CaliberSampling", self.foreground)
        if self.bands < 1:
            raise ValueError(f"`CaliberSampling(bands={self.bands})` needs at least 1.")

    def index(self, volume: Volume) -> dict[str, np.ndarray]:
        mask = _vessels(volume)
        line = centerline(mask, volume.spacing_mm)
        radius = line.radius_mm.numpy()
        usable = np.isfinite(radius) & (radius > 0)
        if not usable.any():
            vessels = _numbers(mask.numpy())
            return {"centers": vessels, "bounds": np.array([0, len(vessels)])}
        numbers = np.ravel_multi_index(tuple(line.ijk.numpy().T), mask.shape)[usable]
        log = np.log(radius[usable])
        edges = np.linspace(log.min(), log.max(), self.bands + 1)[1:-1]
        band = np.digitize(log, edges)
        counts = np.bincount(band)
        return {
            "centers": numbers[np.argsort(band, kind="stable")].astype(np.int32),
            "bounds": np.cumsum([0, *counts[counts > 0]]),
        }

    def start(self, volume: Volume, size: Shape, nth: int, generator: np.random.Generator) -> Shape:
        centers, bounds = volume.index["centers"], volume.index["bounds"]
        if not (_in_turn(nth, self.foreground) and len(centers)):
            return _anywhere(volume.shape, size, generator)
        band = generator.integers(len(bounds) - 1)
        center = centers[generator.integers(bounds[band], bounds[band + 1])]
        return _around(center, volume.shape, size)


@dataclass(frozen=True)
class WeightedSampling(Sampling):
    """The middle of a patch is drawn by a map: twice the weight, twice as often.

    The map is one of the subject's: its ``weights`` volume, or a mask such as ``brain``.

    Args:
        map: Name of the map; its values are not negative.
    """

    map: str = "weights"

    def index(self, volume: Volume) -> dict[str, np.ndarray]:
        if self.map not in volume.maps:
            raise ValueError(
                f'`WeightedSampling(map="{self.map}")` found no such map of subject '
                f'"{volume.name}", which has {", ".join(volume.maps) or "none"}.'
            )
        weights = volume.maps[self.map]
        slices = weights.double().sum(dim=(1, 2)).numpy()
        if weights.min() < 0 or not slices.sum() > 0:
            raise ValueError(
                f'`WeightedSampling(map="{self.map}")` needs weights that are not negative and '
                f'not all 0, but those of subject "{volume.name}" go from '
                f"{float(weights.min()):g} to {float(weights.max()):g}."
            )
        return {"slices": slices}

    def start(self, volume: Volume, size: Shape, nth: int, generator: np.random.Generator) -> Shape:
        # First the slice, then the voxel in it: no running sum over the whole volume to keep
        i = _by_weight(volume.index["slices"], generator)
        jk = _by_weight(volume.maps[self.map][i].double().flatten().numpy(), generator)
        return start_around((i, *divmod(jk, volume.shape[2])), size, volume.shape)


def start_around(center: Sequence[int], size: Shape, shape: Sequence[int]) -> Shape:
    """First voxel of the patch around ``center``, moved inside the volume where it fits.

    Along an axis where the volume is shorter than the patch, the volume lies in its middle.

    >>> start_around((0, 50, 3), (32, 32, 8), (100, 100, 4))
    (0, 34, -2)
    """
    i, j, k = (
        min(max(c - s // 2, 0), n - s) if n >= s else -((s - n) // 2)
        for c, s, n in zip(center, size, shape, strict=True)
    )
    return i, j, k


def _vessels(volume: Volume) -> Mask:
    label = volume.maps.get("label")
    return torch.zeros(volume.shape, dtype=torch.bool) if label is None else label > 0


def _around(number: np.integer, shape: Shape, size: Shape) -> Shape:
    rest, k = divmod(int(number), shape[2])
    return start_around((*divmod(rest, shape[1]), k), size, shape)


def _anywhere(shape: Shape, size: Shape, generator: np.random.Generator) -> Shape:
    i, j, k = (
        int(generator.integers(n - s + 1)) if n >= s else -((s - n) // 2)
        for n, s in zip(shape, size, strict=True)
    )
    return i, j, k


def _in_turn(nth: int, share: float) -> bool:
    """Whether the n-th of many belongs to a share that holds for every first n as well as can be.

    >>> [_in_turn(n, 0.5) for n in range(4)]
    [True, False, True, False]
    """
    # a share such as 0.1 is a little more than that in binary, and must not round up a whole number
    before, after = (math.ceil(n * share - 1e-9) for n in (nth, nth + 1))
    return after > before


def _by_weight(weights: np.ndarray, generator: np.random.Generator) -> int:
    running = weights.cumsum()
    return int(np.searchsorted(running, generator.random() * running[-1], side="right"))


def _numbers(mask: Bool[np.ndarray, "i j k"]) -> Int[np.ndarray, " n"]:
    """Numbers of the mask's voxels in index order; evenly thinned out where they are very many."""
    numbers = np.flatnonzero(mask)
    return numbers[:: -(-len(numbers) // _KEPT_VOXELS) or 1].astype(np.int32)


def _check_share(who: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"`{who}(foreground={share})` must lie between 0 and 1.")
