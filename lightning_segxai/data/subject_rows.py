"""One subject before a training: its facts on disk and after preprocessing, in a row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchio as tio
from jaxtyping import Float, Shaped
from torch import Tensor

from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.sources import Source
from lightning_segxai.data.volumes import Volume
from lightning_segxai.values import Probe, Shape

_SATURATED = 0.01  # share of the vessel voxels that may have the volume's largest value


@dataclass(frozen=True, eq=False)
class SubjectRow:
    """One subject's volume as it is on disk, turned to RAS; None is what cannot be known.

    Args:
        name: Its own.
        subject: The person.
        split: ``train``, ``val`` or ``test``; empty where the splits are wrong.
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel in millimeters.
        intensity: Minimum, median, percentile 99.95 and maximum.
        vessel_voxels: Voxels of the label that are not background.
        vessel_share: Their share of the volume, in [0, 1].
        cut: Share of them that have the file's largest value.
        saturated: Share of them that have the largest value after preprocessing.
        errors: Why it cannot be used.
        nbytes: Memory that it takes after preprocessing.
        flat: Its projection after preprocessing, where it can be used.
    """

    name: str
    subject: str
    split: str
    shape: Shape | None = None
    spacing_mm: tuple[float, float, float] | None = None
    intensity: tuple[float, float, float, float] | None = None
    vessel_voxels: int | None = None
    vessel_share: float | None = None
    cut: float = 0.0
    saturated: float = 0.0
    errors: tuple[str, ...] = ()
    nbytes: int = 0
    flat: Probe | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known of it, in few words."""
        if self.cut > _SATURATED:
            return (f"{100 * self.cut:.2g} % of vessel voxels cut off in the file",)
        if self.saturated > _SATURATED:
            return (f"{100 * self.saturated:.2g} % of vessel voxels saturated",)
        return ()


def with_file(row: SubjectRow, source: Source) -> SubjectRow:
    """What the files hold, as far as they can be read; why not is told by `check_subject`."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            subject = source.read()
            image = tio.ToCanonical()(subject.get_image("image"))
            i, j, k = image.spatial_shape
            row = replace(
                row,
                shape=(i, j, k),
                spacing_mm=spacing_of(image.affine),
                intensity=_intensity(image.data),
            )
            label = tio.ToCanonical()(subject.get_image("label")).data
    except Exception:  # whatever the readers of a broken file raise
        return row
    vessels = int((label > 0).sum())
    return replace(
        row,
        vessel_voxels=vessels,
        vessel_share=vessels / label.numel(),
        cut=_topped(image.data, label) if image.data.shape == label.shape else 0.0,
    )


def _intensity(values: Shaped[Tensor, "c i j k"]) -> tuple[float, float, float, float] | None:
    numbers = values.numpy().ravel()
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        return None
    last = len(finite) - 1
    places = [0, last // 2, int(0.9995 * last), last]
    low, median, high, top = np.partition(finite, places)[places].tolist()
    return low, median, high, top


def _topped(image: Shaped[Tensor, "*axes"], label: Shaped[Tensor, "*axes"]) -> float:
    """Share of the vessel voxels with the image's largest value; 0 for a single one."""
    inside = image[label > 0]
    count = int((inside == image.max()).sum())
    return count / len(inside) if count > 1 else 0.0


def with_volume(row: SubjectRow, volume: Volume) -> SubjectRow:
    """What is known after preprocessing."""
    label = volume.maps["label"]
    return replace(
        row,
        saturated=_topped(volume.image, label),
        nbytes=volume.nbytes,
        flat=flat(volume.name, volume.image, label, volume.spacing_mm),
    )


def saturations(rows: Sequence[SubjectRow], scaling: str) -> list[str]:
    """One line for what the files have cut off, and one for what the scaling saturates.

    Args:
        rows: Of all subjects.
        scaling: Name of the intensity scaling.
    """
    cut = {row.name: row.cut for row in rows if row.cut > _SATURATED}
    lost = {row.name: row.saturated for row in rows if row.saturated > _SATURATED}
    lost = {name: share for name, share in lost.items() if name not in cut}
    texts = []
    if cut:
        texts.append(
            f"Vessel voxels have the largest value of the file, where an export or the scanner cut "
            f"them off, in {_shares(cut)}."
        )
    if lost:
        texts.append(
            f"`{scaling}` saturates vessel voxels in {_shares(lost)}. Scale without clipping, as "
            "`ForegroundNormalization` does."
        )
    return texts


def _shares(shares: Mapping[str, float]) -> str:
    count = len(shares)
    told = [f'"{name}" ({100 * share:.2g} %)' for name, share in list(shares.items())[:10]]
    names = ", ".join([*told, *["..."] * (count > 10)])
    return f"{count} volume{'s' * (count != 1)}: {names}"


def flat(
    name: str,
    image: Float[Tensor, "i j k"],
    label: Shaped[Tensor, "i j k"],
    spacing_mm: tuple[float, float, float],
) -> Probe:
    """The largest values along k, from the feet: the patient's right is where i begins."""
    return Probe(
        name=name,
        image=image.amax(dim=2).flip(0)[None, :, :, None],
        label=(label > 0).any(dim=2).flip(0)[:, :, None].to(torch.uint8),
        spacing_mm=spacing_mm,
        affine=np.diag([-spacing_mm[0], *spacing_mm[1:], 1.0]),
    )
