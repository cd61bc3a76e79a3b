"""Probes from files, and from volumes or patches of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torchio as tio

from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.preparation import prepared
from lightning_segxai.data.sampling import start_around
from lightning_segxai.data.subjects import check_subject, file_stem
from lightning_segxai.data.volumes import Volume, patch, patch_affine
from lightning_segxai.values import Probe, as_shape


@dataclass(frozen=True)
class ProbeFile:
    """A probe as a configuration file names it.

    Args:
        image: Path of a 3D volume, or of the folder of a DICOM series.
        label: Path of its label, where the truth is known.
        name: Its name in tables and panels; the file's where it is None.
    """

    image: str
    label: str | None = None
    name: str | None = None

    def read(self, preprocessing: tio.Transform | None = None) -> Probe:
        """The whole volume, after ``preprocessing``."""
        return read_probe(self.image, self.label, self.name, preprocessing)


def read_probe(
    image: str | Path,
    label: str | Path | None = None,
    name: str | None = None,
    preprocessing: tio.Transform | None = None,
    regions: Mapping[str, str | Path] | None = None,
) -> Probe:
    """A probe from files, in RAS order and after ``preprocessing``.

    Args:
        image: Path of a 3D volume: NIfTI, NRRD, MetaImage, or the folder of a DICOM series.
        label: Path of its label, on the same grid.
        name: Name of the probe; the image file's without the ending where it is None.
        preprocessing: What the training does to a volume, ``MRADataModule.preprocessing`` say.
        regions: Paths of masks on the same grid, by name, for metrics that ask for them.

    Raises:
        ValueError: for a file that is missing, broken or on another grid, and for a bad name.
    """
    files = {"image": image, **({} if label is None else {"label": label}), **(regions or {})}
    for key, path in files.items():
        if not Path(path).exists():
            raise ValueError(f"`read_probe({key}=...)` found no file {path}.")
    name = file_stem(image) if name is None else name
    subject = tio.Subject(
        {k: (tio.ScalarImage if k == "image" else tio.LabelMap)(p) for k, p in files.items()},
        name=name,
    )
    check_subject(subject)
    steps = [tio.ToCanonical(), *([] if preprocessing is None else [preprocessing])]
    return volume_probe(prepared(subject, tio.Compose(steps)), name)


def volume_probe(
    volume: Volume,
    name: str,
    center: Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
) -> Probe:
    """A volume, or a patch of it, as a probe; its further label maps become regions.

    Args:
        volume: Where it lies.
        name: Name of the probe.
        center: Voxel in the middle of the patch, which is moved inside the volume where it fits;
            the volume's middle where it is None.
        size: Voxels of the patch, one number or three; the whole volume where it is None. Where
            the volume is smaller, it is padded with its minimum (labels with 0), with a warning.
    """
    edges = volume.shape if size is None else as_shape(size, "size")
    if any(s > n for s, n in zip(edges, volume.shape, strict=True)):
        warnings.warn(
            f'Probe "{name}": the volume of {volume.shape} voxels is smaller than the patch '
            f"of {edges}; it is padded with its minimum.",
            stacklevel=2,
        )
    middle = [n // 2 for n in volume.shape] if center is None else center
    start = start_around(middle, edges, volume.shape)
    maps = {key: patch(values, start, edges, 0) for key, values in volume.maps.items()}
    label = maps.pop("label", None)
    maps.pop("weights", None)
    affine = patch_affine(volume, start)
    return Probe(
        name=name,
        image=patch(volume.image, start, edges, volume.floor)[None].clone(),
        label=None if label is None else label.long(),
        spacing_mm=spacing_of(affine),
        affine=affine,
        regions={key: values > 0 for key, values in maps.items()},
        preprocessing=volume.preprocessing,
        source=volume.source,
    )
