"""Subjects, checked before anything is trained on them, and what is done to each of them first.

A subject is TorchIO's: ``image`` and ``label`` of one volume, its ``name``, and any further label
maps, which become regions of a probe.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import SimpleITK  # comes with TorchIO, which reads with it
import torch
import torchio as tio
from nibabel.spatialimages import SpatialImage

NIFTI = (".nii.gz", ".nii")
ENDINGS = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd")
"""Of the files that hold a volume; a folder with a DICOM series holds one too."""


@dataclass(frozen=True)
class PhantomCohort:
    """Made-up ToF-MRA subjects, the same ones for the same numbers.

    Args:
        subjects: How many.
        shape: Voxels along i, j, k.
        spacing_mm: Edge lengths of a voxel in millimeters.
        seed: Another seed gives other heads.

    Raises:
        ValueError: for fewer than one subject, or a negative seed.
    """

    subjects: int = 8
    shape: tuple[int, int, int] = (96, 96, 64)
    spacing_mm: tuple[float, float, float] = (0.6, 0.6, 0.8)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subjects < 1 or self.seed < 0:
            raise ValueError(
                "`PhantomCohort` needs at least one subject and a seed that is not negative, "
                f"but got subjects={self.subjects}, seed={self.seed}."
            )


def file_stem(path: str | Path) -> str:
    """The file's name without the ending, or the name of a DICOM series' folder.

    >>> file_stem("data/images/case_07.nii.gz")
    'case_07'
    """
    name = Path(path).name
    return next((name[: -len(e)] for e in ENDINGS if name.lower().endswith(e)), name)


def absence(path: Path) -> str:
    """Why there is nothing to read at the path, to follow its name; empty where there is."""
    if path.exists():
        return ""
    # DataLad and git-annex leave links to contents that were not fetched
    return "is a link to nothing; `datalad get` it" if path.is_symlink() else "does not exist"


def check_subject(subject: tio.Subject, classes: int | None = None, labeled: bool = False) -> None:
    """Read a subject and refuse what would train on nonsense.

    Args:
        subject: With an ``image`` and, where there is one, a ``label``.
        classes: Number of classes, background included; where it is None, a label may be any
            whole number that is not negative.
        labeled: Whether there must be a label, with a vessel in it.

    Raises:
        ValueError: for a file that is missing or cannot be read, a DICOM folder without or with
            several series or with slices missing, a volume that is not 3D or not finite or has
            one value everywhere, maps on another grid than the image, labels outside ``classes``
            and sampling weights below 0 or all 0.
    """
    image = subject.get_image("image")
    for key, one in subject.get_images_dict(intensity_only=False).items():
        _check_volume(_who(subject, key), one)
        if one is not image:
            _check_grid(subject, key)
    values = image.data
    if bool((values == values.flatten()[0]).all()):
        raise ValueError(f"{_who(subject, 'image')} has the same value in every voxel.")
    if "label" in subject:
        _check_label(subject, classes, labeled)
    elif labeled:
        raise ValueError(
            f"{_who(subject, 'image')} has no label, and needs one here. Give it, or drop the "
            "image."
        )
    if "weights" in subject:
        weights = subject.get_image("weights").data
        if bool((weights < 0).any()) or not bool(weights.any()):
            raise ValueError(
                f"{_who(subject, 'weights')} need values from 0, some of them larger, but lie "
                f"between {float(weights.min()):g} and {float(weights.max()):g}."
            )


def _who(subject: tio.Subject, key: str) -> str:
    path = subject.get_image(key).path
    name = subject.get("name", "?")
    return f'The {key} of subject "{name}"' + ("" if path is None else f" ({path})")


def _check_volume(who: str, image: tio.Image) -> None:
    path = image.path
    if isinstance(path, Path):
        if state := absence(path):
            raise ValueError(f"{who} {state}.")
        if path.is_dir():
            _check_series(who, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SimpleITK's failure; NiBabel is tried after it
            image.load()
            finite = bool(torch.isfinite(image.data).all()) and _finite_on_disk(image)
    except Exception as error:  # whatever the readers of a broken file raise
        raise ValueError(
            f"{who} cannot be read. Is it a whole volume ({', '.join(ENDINGS)} or a folder with "
            f"a DICOM series), with its data file where that is a second one? ({error})"
        ) from error
    shape = tuple(image.spatial_shape)
    if image.num_channels != 1:
        raise ValueError(
            f"{who} has {image.num_channels} volumes of {shape} voxels in one file; "
            "one 3D volume is needed. Split it."
        )
    if min(shape) < 2:
        raise ValueError(f"{who} has {shape} voxels; a 3D volume is needed, not a slice.")
    if not finite:
        raise ValueError(f"{who} has NaN or infinity among its voxels. Repair or drop it.")


def _check_series(who: str, folder: Path) -> None:
    """Refuse what SimpleITK would make a volume of nevertheless, and a false one.

    It takes the first of several series, leaves out slices that it cannot read, and puts what is
    left at even distances.
    """
    reader = SimpleITK.ImageSeriesReader
    warned = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # printed, and said here in our words
    try:
        series = {
            uid: [Path(name) for name in reader.GetGDCMSeriesFileNames(str(folder), uid)]
            for uid in reader.GetGDCMSeriesIDs(str(folder))
        }
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(warned)
    if not series:
        raise ValueError(f"{who} is a folder without a DICOM series that can be read.")
    if len(series) > 1:
        told = ", ".join(
            f"{uid} ({len(slices)} files, {slices[0].name} ...)" for uid, slices in series.items()
        )
        raise ValueError(
            f"{who} needs a folder with one DICOM series, but holds {len(series)}: {told}. "
            "Keep one of them there."
        )
    slices = next(iter(series.values()))
    known = {path.name for path in slices}
    others = [p.name for p in sorted(folder.iterdir()) if p.name not in known and _is_dicom(p)]
    if others:
        raise ValueError(
            f"{who} has files that are no slices of its DICOM series: {', '.join(others[:5])}. "
            "Repair or remove them."
        )
    apart = np.linalg.norm(np.diff([_origin(path) for path in slices], axis=0), axis=1)
    if len(apart) and np.ptp(apart) > 0.1 * apart.mean():
        raise ValueError(
            f"{who} has slices between {apart.min():.3g} and {apart.max():.3g} mm apart. Some are "
            "missing, or several volumes lie in one series; even distances are needed."
        )


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".dcm" or file.read(132)[128:] == b"DICM"


def _origin(path: Path) -> tuple[float, ...]:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return tuple(reader.GetOrigin())


def _finite_on_disk(image: tio.Image) -> bool:
    """What NiBabel says, which raises for a file that was cut off.

    SimpleITK, TorchIO's reader, turns NaN and infinity into 0 unasked, and gives zeros for what is
    missing at the end of a compressed file of whole numbers.
    """
    if not str(image.path).lower().endswith(NIFTI):
        return True
    voxels = np.asanyarray(cast(SpatialImage, nib.load(str(image.path))).dataobj)
    return voxels.dtype.kind != "f" or bool(np.isfinite(voxels).all())


def _check_grid(subject: tio.Subject, key: str) -> None:
    image, other = subject.get_image("image"), subject.get_image(key)
    who = _who(subject, key)
    if image.spatial_shape != other.spatial_shape:
        raise ValueError(
            f"{who} has {tuple(other.spatial_shape)} voxels, but its image has "
            f"{tuple(image.spatial_shape)}. Resample it to the image."
        )
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in image.spatial_shape))])
    apart = float(np.abs(corners @ (image.affine - other.affine).T).max())
    # A tenth of a voxel: what rounding in headers does, and less than a vessel's wall
    if apart > 0.1 * min(image.spacing):
        raise ValueError(
            f"{who} lies {apart:.3g} mm away from its image: their affines differ "
            f"({other.affine.round(3).tolist()} and {image.affine.round(3).tolist()}). "
            "Resample it to the image, or repair its header."
        )


def _check_label(subject: tio.Subject, classes: int | None, labeled: bool) -> None:
    values = subject.get_image("label").data
    good = (values >= 0) & (values == values.round())
    if classes is not None:
        good &= values < classes
    if not bool(good.all()):
        wrong_ones = torch.unique(values[~good])
        wrong = ", ".join(f"{v:g}" for v in wrong_ones[:5].tolist())
        wanted = "whole numbers from 0" + ("" if classes is None else f" to {classes - 1}")
        raise ValueError(
            f"{_who(subject, 'label')} needs {wanted}, but holds {wrong}. "
            "Map its values to classes, or give the right number of `classes`."
        )
    if labeled and not bool(values.any()):
        raise ValueError(
            f"{_who(subject, 'label')} has no vessel voxel: nothing to learn or to find."
        )
