"""Probes from files, subjects and validation batches, and maps back onto a file's grid."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import torch
import torchio as tio
from jaxtyping import Float, Float64
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from lightning_segxai.data.grids import moved, resampled, spacing_of
from lightning_segxai.data.sampling import cut, start_around
from lightning_segxai.data.subjects import check_subject, file_stem, preprocessed
from lightning_segxai.values import Probe, as_shape


@dataclass(frozen=True)
class ProbeFile:
    """A probe as a configuration file names it.

    Args:
        image: Path of a 3D NIfTI volume.
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
    """A probe from NIfTI files, in RAS order and after ``preprocessing``.

    Args:
        image: Path of a 3D NIfTI volume.
        label: Path of its label, on the same grid.
        name: Name of the probe; the image file's without the ending where it is None.
        preprocessing: What the training does to a volume, ``MRADataModule.preprocessing`` say.
        regions: Paths of masks on the same grid, by name, for metrics that ask for them.

    Raises:
        ValueError: for a file that is missing, broken or on another grid, and for a bad name.
    """
    files = {"image": image, **({} if label is None else {"label": label}), **(regions or {})}
    for key, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"`read_probe({key}=...)` found no file {path}.")
    name = file_stem(image) if name is None else name
    subject = tio.Subject(
        {k: (tio.ScalarImage if k == "image" else tio.LabelMap)(p) for k, p in files.items()},
        name=name,
    )
    check_subject(subject)
    steps = [tio.ToCanonical(), *([] if preprocessing is None else [preprocessing])]
    return subject_probe(preprocessed(subject, tio.Compose(steps)), name)


def subject_probe(
    subject: tio.Subject,
    name: str,
    center: Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
) -> Probe:
    """A subject, or a patch of it, as a probe; its further label maps become regions.

    Args:
        subject: With an ``image`` and, where the truth is known, a ``label``.
        name: Name of the probe.
        center: Voxel in the middle of the patch, which is moved inside the volume where it fits;
            the volume's middle where it is None.
        size: Voxels of the patch, one number or three; the whole volume where it is None. Where
            the volume is smaller, it is padded with its minimum (labels with 0), with a warning.
    """
    shape = subject.spatial_shape
    if size is not None:
        edges = as_shape(size, "size")
        if any(s > n for s, n in zip(edges, shape, strict=True)):
            warnings.warn(
                f'Probe "{name}": the volume of {tuple(shape)} voxels is smaller than the patch '
                f"of {edges}; it is padded with its minimum.",
                stacklevel=2,
            )
        middle = [n // 2 for n in shape] if center is None else center
        subject = cut(subject, start_around(middle, edges, shape), edges)
    masks = subject.get_images_dict(intensity_only=False)
    image, label = masks.pop("image"), masks.pop("label", None)
    steps = subject.applied_transforms
    return Probe(
        name=name,
        image=image.data.float().clone(),
        label=None if label is None else label.data[0].long().clone(),
        spacing_mm=spacing_of(image.affine),
        affine=image.affine,
        regions={k: m.data[0] > 0 for k, m in masks.items() if isinstance(m, tio.LabelMap)},
        preprocessing=" ".join(f"{step}({_told(settings)})" for step, settings in steps),
    )


def _told(value: object) -> str:
    """A setting in words that are the same on every machine, unlike addresses and folders."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_told(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_told, value)) + "]"
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        return f"array {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        return Path(value).name
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, np.generic):
        return repr(value.item())
    return repr(value) if isinstance(value, str | int | float | None) else type(value).__name__


def to_file_grid(
    values: Float[Tensor, "i j k"], probe: Probe, reference: str | Path
) -> tuple[Float[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """A map of a probe on the grid of the file that the probe was read from.

    Where the two grids differ by the order and the direction of their axes and by whole voxels,
    values are only moved: each keeps its place in the world and its exact value. Otherwise the
    preprocessing has resampled, and the map is resampled back linearly; its positive and its
    negative part then each keep their sum, and a single value may change. Outside of the probe
    the map is 0.

    Args:
        values: The map, on the probe's own grid.
        probe: Where it was made.
        reference: The NIfTI file.

    Returns:
        The map as the file's array would be indexed, and the file's affine.

    Raises:
        ValueError: where the map is not on the probe's grid, or the file cannot be read.
    """
    if values.shape != probe.shape:
        raise ValueError(
            f'`to_file_grid` needs a map of {tuple(probe.shape)} voxels, as probe "{probe.name}" '
            f"has them, but got {tuple(values.shape)}."
        )
    try:
        # Compared by the reader that made the probe (a header may hold two affines that differ),
        # returned as NiBabel tells it, like the file's own voxels
        file = tio.ScalarImage(reference)
        shape, to_world = tuple(file.spatial_shape), file.affine
        affine = np.asarray(cast(SpatialImage, nib.load(reference)).affine, dtype=np.float64)
    except Exception as error:  # whatever the readers of a broken file raise
        raise ValueError(f"`to_file_grid` cannot read {reference}: {error}") from error
    to_probe = np.linalg.inv(np.asarray(probe.affine)) @ to_world
    whole = np.round(to_probe)
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in shape))])
    array = values.detach().cpu().numpy()
    if np.abs(corners @ (to_probe - whole).T).max() < 0.05:
        return moved(array, whole.astype(int), shape), affine
    return resampled(array, to_probe, shape), affine


def batch_probes(batch: object, n: int) -> list[Probe]:
    """Probes from the first volumes of a validation batch.

    Understood are TorchIO's batches (a dictionary for each image), MONAI's (``image`` and
    ``label`` as tensors or MetaTensors, whose affine is kept), and pairs (image, label) or an
    image alone. Images are ``b c i j k``, labels ``b 1 i j k`` or ``b i j k``.

    Args:
        batch: What the dataloader gave.
        n: How many probes at most.

    Raises:
        ValueError: for anything else, saying what was found.
    """
    image, label, affines = _parts(batch)
    if image is None or image.ndim != 5 or (label is not None and _classes(label) is None):
        raise ValueError(
            "Probes need a validation batch with an image (b c i j k) and a label (b 1 i j k or "
            "b i j k): TorchIO's, a dictionary of `image` and `label`, or a pair of tensors. "
            f"Found {_seen(batch)}. Give `probes` to the monitor instead."
        )
    classes = None if label is None else _classes(label)
    names = _names(batch, len(image))
    return [
        Probe(
            name=names[at],
            image=image[at].detach().cpu().float().clone(),
            label=None if classes is None else classes[at].detach().cpu().long().clone(),
            spacing_mm=(1.0, 1.0, 1.0) if affines is None else spacing_of(affines[at]),
            affine=None if affines is None else affines[at],
            preprocessing="validation batch",
        )
        for at in range(min(n, len(image)))
    ]


def _parts(batch: object) -> tuple[Tensor | None, Tensor | None, np.ndarray | None]:
    """Image, label and affines (b 4 4) of a batch, each None where there is none."""
    image: object = batch
    label: object = None
    affine: object = None
    if isinstance(batch, Mapping):
        images = {k: v for k, v in batch.items() if isinstance(v, Mapping) and "data" in v}
        if images:
            kinds = {k: (v.get("type") or [""])[0] for k, v in images.items()}
            image = images.get("image") or _first(images, kinds, "intensity")
            label = images.get("label") or _first(images, kinds, "label")
        else:
            image, label = batch.get("image"), batch.get("label")
    elif isinstance(batch, list | tuple):
        image, label = (*batch, None)[:2] if len(batch) in (1, 2) else (None, None)
    if isinstance(image, Mapping):
        affine = image.get("affine")
        image = image["data"]
        label = label["data"] if isinstance(label, Mapping) else None
    else:
        affine = getattr(image, "affine", None)
    found = _plain(image)
    if found is None or affine is None:
        return found, _plain(label), None
    affines = np.asarray(torch.as_tensor(affine).cpu(), dtype=np.float64)
    return found, _plain(label), np.broadcast_to(affines, (len(found), 4, 4))


def _first(images: Mapping[str, object], kinds: Mapping[str, str], kind: str) -> object:
    return next((images[k] for k in images if kinds[k] == kind), None)


def _plain(value: object) -> Tensor | None:
    """The tensor itself, without MONAI's subclass around it."""
    if not isinstance(value, Tensor):
        return None
    return value.as_tensor() if hasattr(value, "as_tensor") else value


def _classes(label: Tensor) -> Tensor | None:
    """The label as ``b i j k``; None where it has several channels or another number of axes."""
    if label.ndim == 5 and label.shape[1] == 1:
        return label[:, 0]
    return label if label.ndim == 4 else None


def _names(batch: object, count: int) -> list[str]:
    given = batch.get("name") if isinstance(batch, Mapping) else None
    if not isinstance(given, list | tuple) or len(given) != count:
        given = ["batch"] * count
    stems = [re.sub(r"[^A-Za-z0-9._-]", "_", str(name)).lstrip(".")[:90] for name in given]
    return [f"{stem}-{stems[: at + 1].count(stem)}" for at, stem in enumerate(stems)]


def _seen(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {_seen(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, list | tuple):
        shown = [_seen(v) for v in batch[:6]] + ["..."] * (len(batch) > 6)
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(shown)})"
    return type(batch).__name__
