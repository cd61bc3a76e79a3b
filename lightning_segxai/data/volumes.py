"""A preprocessed volume as it is kept, and batches of patches cut straight from volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Shaped
from torch import Tensor

from lightning_segxai.data.grids import spacing_of
from lightning_segxai.values import Shape


@dataclass(frozen=True)
class About:
    """What is known of a volume without reading its voxels.

    Args:
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel in millimeters.
        source: Digest of the image's voxels before any arithmetic.
    """

    shape: Shape
    spacing_mm: tuple[float, float, float]
    source: str


@dataclass(frozen=True, eq=False)
class Volume:
    """A subject after preprocessing: what patches are cut from and probes are made of.

    Args:
        name: Name of the subject's volume.
        image: Intensities.
        maps: The ``label``, where there is one, and further label maps, in bytes where classes
            allow; also ``weights`` to sample by.
        affine: Voxel indices to world millimeters.
        floor: The smallest intensity, which stands outside of the volume.
        index: What the sampling keeps of it.
        preprocessing: What was done to it, in words.
        source: Digest of the image's voxels before any arithmetic, the same on every machine.
    """

    name: str
    image: Float32[Tensor, "i j k"]
    maps: Mapping[str, Shaped[Tensor, "i j k"]]
    affine: Float64[np.ndarray, "4 4"]
    floor: float
    index: Mapping[str, np.ndarray] = field(default_factory=dict)
    preprocessing: str = ""
    source: str = ""

    @property
    def shape(self) -> Shape:
        """Voxels along i, j, k."""
        i, j, k = self.image.shape
        return i, j, k

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in millimeters."""
        return spacing_of(self.affine)

    @property
    def about(self) -> About:
        """What is known of it without its voxels."""
        return About(self.shape, self.spacing_mm, self.source)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        tensors = sum(t.nbytes for t in (self.image, *self.maps.values()))
        return tensors + sum(array.nbytes for array in self.index.values())


def patch(values: Shaped[Tensor, "i j k"], start: Shape, size: Shape, fill: float) -> Tensor:
    """The patch of ``size`` voxels from ``start``, a view where it lies inside the volume.

    Args:
        values: The volume.
        start: First voxel; may lie outside.
        size: Voxels of the patch.
        fill: What stands outside of the volume.
    """
    spans = [
        (a, min(max(a, 0), n), max(min(a + s, n), 0))
        for a, s, n in zip(start, size, values.shape, strict=True)
    ]
    inside = values[tuple(slice(first, end) for _, first, end in spans)]
    if inside.shape == size:
        return inside
    padded = values.new_full(size, fill)
    if inside.numel():
        padded[tuple(slice(first - a, end - a) for a, first, end in spans)] = inside
    return padded


def patch_affine(volume: Volume, start: Shape) -> Float64[np.ndarray, "4 4"]:
    """Voxel indices of a patch to world millimeters."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.asarray(start)
    return affine


def batch_of(places: Sequence[tuple[Volume, Shape]], size: Shape) -> dict[str, Any]:
    """Patches of equal size as TorchIO would collate them, cut with one copy.

    Args:
        places: Volumes, and the first voxel of the patch in each.
        size: Voxels of a patch.

    Returns:
        ``batch["image"]["data"]`` (b 1 i j k) and, where all volumes have one,
        ``batch["label"]["data"]``, each with the patches' ``affine`` (b 4 4), and ``name`` and
        ``location`` (first voxel and end along i, j, k).
    """
    affine = np.stack([patch_affine(volume, start) for volume, start in places])
    names = [volume.name for volume, _ in places]

    def stacked(patches: list[Tensor], dtype: torch.dtype, kind: str) -> dict[str, Any]:
        data = torch.empty((len(patches), 1, *size), dtype=dtype)
        for row, one in zip(data, patches, strict=True):
            row[0] = one
        return {"data": data, "affine": affine, "type": [kind] * len(patches), "path": names}

    images = [patch(v.image, start, size, v.floor) for v, start in places]
    batch: dict[str, Any] = {"image": stacked(images, torch.float32, "intensity")}
    if all("label" in volume.maps for volume, _ in places):
        labels = [patch(v.maps["label"], start, size, 0) for v, start in places]
        wide = max((one.dtype for one in labels), key=lambda dtype: dtype.itemsize)
        batch["label"] = stacked(labels, wide, "label")
    batch["name"] = names
    batch["location"] = torch.tensor(
        [[*start, *(a + s for a, s in zip(start, size, strict=True))] for _, start in places]
    )
    return batch
