"""Subjects on disk or made up, checked before anything is trained on them.

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
import torch
import torchio as tio
from nibabel.spatialimages import SpatialImage

from lightning_segxai.data.phantom import tof_phantom
from lightning_segxai.values import checked_name

_ENDINGS = (".nii.gz", ".nii")


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


def phantom_subjects(cohort: PhantomCohort) -> list[tio.Subject]:
    """The cohort's heads, with the brain as a further label map."""
    subjects = []
    for n in range(cohort.subjects):
        # Ten thousand heads apart, so that cohorts of neighboring seeds share none
        seed = cohort.seed * 10_000 + n
        phantom = tof_phantom(shape=cohort.shape, spacing_mm=cohort.spacing_mm, seed=seed)
        affine = np.diag([*phantom.spacing_mm, 1.0])
        label, brain = (np.asarray(m, dtype=np.uint8) for m in (phantom.label, phantom.brain))
        subjects.append(
            tio.Subject(
                image=tio.ScalarImage(tensor=torch.from_numpy(phantom.image)[None], affine=affine),
                label=tio.LabelMap(tensor=torch.from_numpy(label)[None], affine=affine),
                brain=tio.LabelMap(tensor=torch.from_numpy(brain)[None], affine=affine),
                name=f"phantom-{n:02d}",
            )
        )
    return subjects


def file_stem(path: str | Path) -> str:
    """The file's name without the ending.

    >>> file_stem("data/images/case_07.nii.gz")
    'case_07'
    """
    name = Path(path).name
    return next((name.removesuffix(e) for e in _ENDINGS if name.endswith(e)), Path(path).stem)


def folder_subjects(root: str | Path) -> list[tio.Subject]:
    """The pairs ``root/images/<name>.nii.gz`` and ``root/labels/<name>.nii.gz``, by name.

    Nothing but the file names is looked at yet.

    Raises:
        ValueError: where a folder is missing or empty, or an image or a label stands alone.
    """
    images, labels = (_volumes(Path(root), folder) for folder in ("images", "labels"))
    lonely = [str(images[n]) for n in sorted(images.keys() - labels.keys())]
    lonely += [str(labels[n]) for n in sorted(labels.keys() - images.keys())]
    if lonely:
        raise ValueError(
            f"{root} needs a label for every image, under the same name, and an image for every "
            f"label, but these stand alone: {', '.join(lonely)}."
        )
    return [
        tio.Subject(image=tio.ScalarImage(images[n]), label=tio.LabelMap(labels[n]), name=n)
        for n in sorted(images)
    ]


def _volumes(root: Path, folder: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    where = root / folder
    for path in sorted(where.iterdir()) if where.is_dir() else []:
        # A leading dot is a Mac's or an editor's shadow of a file
        if not path.name.endswith(_ENDINGS) or path.name.startswith("."):
            continue
        name = checked_name(file_stem(path), "subject")
        if name in found:
            raise ValueError(f"{path} and {found[name]} are both {name!r}. Keep one of them.")
        found[name] = path
    if not found:
        state = "holds none" if where.is_dir() else "does not exist"
        raise ValueError(
            f"{root} needs volumes as {folder}/<name>.nii.gz or .nii, but {where} {state}."
        )
    return found


def check_subject(subject: tio.Subject, classes: int | None = None) -> None:
    """Read a subject and refuse what would train on nonsense.

    Args:
        subject: With an ``image`` and, where there is one, a ``label``.
        classes: Number of classes, background included; where it is None, a label may be any
            whole number that is not negative.

    Raises:
        ValueError: for a file that cannot be read, a volume that is not 3D or not finite or has
            one value everywhere, label maps on another grid than the image, labels outside
            ``classes``.
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
        _check_label(subject, classes)


def _who(subject: tio.Subject, key: str) -> str:
    path = subject.get_image(key).path
    name = subject.get("name", "?")
    return f'The {key} of subject "{name}"' + ("" if path is None else f" ({path})")


def _check_volume(who: str, image: tio.Image) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SimpleITK's failure; NiBabel is tried after it
            image.load()
            finite = bool(torch.isfinite(image.data).all()) and _finite_on_disk(image)
    except Exception as error:  # whatever the readers of a broken file raise
        raise ValueError(f"{who} cannot be read. Is it a whole NIfTI file? ({error})") from error
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


def _finite_on_disk(image: tio.Image) -> bool:
    """What NiBabel says: SimpleITK, TorchIO's reader, turns NaN and infinity into 0 unasked."""
    if not str(image.path).endswith(_ENDINGS):
        return True
    file = cast(SpatialImage, nib.load(str(image.path)))
    if file.get_data_dtype().kind != "f":
        return True
    return bool(np.isfinite(np.asanyarray(file.dataobj)).all())


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


def _check_label(subject: tio.Subject, classes: int | None) -> None:
    found = torch.unique(subject.get_image("label").data)
    good = (found >= 0) & (found == found.round())
    if classes is not None:
        good &= found < classes
    if not bool(good.all()):
        wrong = ", ".join(f"{v:g}" for v in found[~good][:5].tolist())
        wanted = "whole numbers from 0" + ("" if classes is None else f" to {classes - 1}")
        raise ValueError(
            f"{_who(subject, 'label')} needs {wanted}, but holds {wrong}. "
            "Map its values to classes, or give the right number of `classes`."
        )


def preprocessed(subject: tio.Subject, transform: tio.Transform) -> tio.Subject:
    """The transformed subject: float32 image, int32 label maps, no random number drawn.

    TorchIO asks the global generator whether to apply a transform even when it always does; a
    probe must not shift the random numbers of the training.

    Raises:
        ValueError: where the transform fails or gives NaN, naming the subject.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed: it would reseed GPUs too
        try:
            subject = transform(subject)
        except Exception as error:  # transforms are anybody's code
            name = subject.get("name", "?")
            raise ValueError(f'The preprocessing of subject "{name}" failed: {error}') from error
    for image in subject.get_images(intensity_only=False):
        kind = torch.int32 if isinstance(image, tio.LabelMap) else torch.float32
        image.set_data(image.data.to(kind))
        if not bool(torch.isfinite(image.data).all()):
            raise ValueError(
                f'The preprocessing of subject "{subject.get("name", "?")}" gave NaN or infinity. '
                f"It was {transform}."
            )
    return subject
