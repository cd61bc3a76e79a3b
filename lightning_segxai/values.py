"""The values that travel through the house: a probe goes in, attributions and records come out.

Every other module imports these and nothing here imports them. Volumes are indexed ``c i j k``:
``i, j, k`` are voxel indices in the order TorchIO keeps (RAS after ``ToCanonical``); millimeters
come from ``spacing_mm``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, Num
from torch import Tensor

Volume = Float[Tensor, "c i j k"]
"""An image: channels first, then the three voxel axes."""
Map = Float[Tensor, "i j k"]
"""One number for each voxel."""
Mask = Bool[Tensor, "i j k"]
"""A region of the volume."""
Logits = Float[Tensor, "classes i j k"]
"""What a network says of one volume, before softmax or sigmoid."""

Shape = tuple[int, int, int]
"""Voxels along i, j, k."""

Status = Literal["ok", "empty", "unsupported", "failed", "nonfinite"]
"""How a cell ended.

``ok``; ``empty``: the region to explain has no voxel; ``unsupported``: the metric or method cannot
be had here (a label is missing, say); ``failed``: an exception, told in the log; ``nonfinite``: a
NaN or an infinity came out.
"""


class UnsupportedError(ValueError):
    """A cell cannot be had here, and never will: its record gets the status ``unsupported``."""


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def checked_name(name: str, what: str) -> str:
    """The name itself, if it may become a file name, a W&B key and HTML.

    >>> checked_name("case_07", "probe")
    'case_07'

    Raises:
        ValueError: if it has other characters than letters, digits, ``.``, ``_`` and ``-``, starts
            with a dot, or is longer than 100.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"The {what} name {name!r} cannot become a file name. "
            "Use letters, digits, '.', '_' and '-', no leading dot, at most 100 characters."
        )
    return name


def as_shape(size: int | Sequence[int], what: str) -> Shape:
    """Three sizes from one or three.

    >>> as_shape(64, "window")
    (64, 64, 64)

    Raises:
        ValueError: unless it is one or three positive whole numbers.
    """
    sizes = (size,) * 3 if isinstance(size, int) else tuple(size)
    if len(sizes) != 3 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"`{what}` needs one or three positive whole numbers, but got {size}.")
    return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True, eq=False)
class Probe:
    """A fixed volume on which the network is explained again and again.

    Args:
        name: Its name in tables, files and panels; letters, digits, ``.``, ``_``, ``-``.
        image: What the network is given, after all preprocessing.
        label: Class index of every voxel, where the truth is known.
        spacing_mm: Edge lengths of a voxel along i, j, k in millimeters.
        affine: Voxel indices to world millimeters, 4x4; made from ``spacing_mm`` where it is None.
        regions: Named masks, such as ``brain``, for metrics that ask for them.
        preprocessing: The text form (``repr``) of what was done to the image; part of the
            fingerprint.
        source: Digest of the stored voxels that the image was made from, where they are known. It
            stands for the image in the fingerprint, since preprocessing may round differently on
            another machine.

    Raises:
        ValueError: for a bad name, an image that is not 4D or not finite, a label or region of
            another shape or of negative values, and a spacing that is not positive or contradicts
            the affine.
    """

    name: str
    image: Float[Tensor, "c i j k"]
    label: Integer[Tensor, "i j k"] | None = None
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    affine: Num[np.ndarray, "4 4"] | None = None
    regions: Mapping[str, Bool[Tensor, "i j k"]] = field(default_factory=dict)
    preprocessing: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        checked_name(self.name, "probe")
        who = f'Probe "{self.name}"'
        self._settle_tensors()
        if self.image.ndim != 4 or not self.image.is_floating_point():
            raise ValueError(
                f"{who} needs a floating-point image of four axes (c i j k), "
                f"but got {tuple(self.image.shape)} of {self.image.dtype}."
            )
        if not bool(torch.isfinite(self.image).all()):
            raise ValueError(f"{who} has NaN or infinity in its image. Repair or drop the volume.")
        if self.label is not None:
            if self.label.shape != self.shape:
                raise ValueError(
                    f"{who} has an image of {tuple(self.shape)} voxels but a label of "
                    f"{tuple(self.label.shape)}. Resample the label to the image."
                )
            if self.label.is_floating_point() or bool((self.label < 0).any()):
                raise ValueError(
                    f"{who} needs a label of non-negative whole numbers (the class of each voxel)."
                )
        for region, mask in self.regions.items():
            checked_name(region, "region")
            if mask.shape != self.shape or mask.dtype is not torch.bool:
                raise ValueError(
                    f'{who} needs its region "{region}" as a boolean mask of '
                    f"{tuple(self.shape)} voxels, but got {tuple(mask.shape)} of {mask.dtype}."
                )
        if len(self.spacing_mm) != 3 or not all(
            math.isfinite(s) and s > 0 for s in self.spacing_mm
        ):
            raise ValueError(
                f"{who} needs three positive edge lengths in mm as spacing_mm, "
                f"but got {self.spacing_mm}."
            )
        self._settle_affine(who)

    def _settle_tensors(self) -> None:
        """On the CPU and without a graph, whatever they come from; half precision is widened."""
        image = self.image.detach().cpu()
        half = image.dtype in (torch.float16, torch.bfloat16)
        object.__setattr__(self, "image", image.float() if half else image)
        if self.label is not None:
            object.__setattr__(self, "label", self.label.detach().cpu())
        object.__setattr__(self, "regions", {k: m.cpu() for k, m in self.regions.items()})

    def _settle_affine(self, who: str) -> None:
        if self.affine is None:
            object.__setattr__(self, "affine", np.diag([*self.spacing_mm, 1.0]))
            return
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"{who} needs a finite 4x4 affine, but got shape {affine.shape}.")
        edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        if not np.allclose(edges, self.spacing_mm, rtol=1e-3):
            raise ValueError(
                f"{who} has spacing_mm {self.spacing_mm}, but its affine says "
                f"{tuple(edges.round(4).tolist())}. Give the spacing of the affine."
            )
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> torch.Size:
        """Voxels along i, j, k."""
        return self.image.shape[1:]

    @cached_property
    def voxels(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the image as it is, to the last bit."""
        array = np.ascontiguousarray(self.image.numpy().astype("<f4"))
        return hashlib.sha256(array.data).hexdigest()[:16]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of all that an explanation depends on.

        Stored voxels (the source's digest where it is known, else the image as little-endian
        float32), label, regions, geometry and preprocessing; the name is not part of it. Runs are
        comparable only on equal fingerprints.
        """
        digest = hashlib.sha256()

        def add(what: str, array: np.ndarray) -> None:
            digest.update(f"{what} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())

        if self.source:
            digest.update(f"source {self.source} {tuple(self.image.shape)}\n".encode())
        else:
            add("image", self.image.detach().cpu().numpy().astype("<f4"))
        if self.label is not None:
            add("label", self.label.detach().cpu().numpy().astype("<i4"))
        for region in sorted(self.regions):
            add(f"region {region}", self.regions[region].detach().cpu().numpy().astype("|u1"))
        add(
            "affine", np.round(np.asarray(self.affine), 4).astype("<f4") + 0.0
        )  # + 0.0: no negative zero
        digest.update(self.preprocessing.encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Attribution:
    """What one method says of one target on one probe at one moment of the training.

    Args:
        probe: The volume that was explained.
        target: Name of the target, the key it was given under.
        method: Name of the method, likewise.
        layer: The network's layer that was explained, as a dotted path; empty for the input.
        values: The map on the probe's own grid; all NaN unless ``status`` is ``ok``.
        unit: Unit of the values.
        region: The voxels whose logits make the score.
        prediction: The network's class for each voxel.
        score: Mean weighted logit of the region on the unperturbed volume.
        epoch: Epoch of the training.
        step: Global step of the training.
        completeness_error: ``|sum(values) - dF| / |dF|`` with ``dF`` the score difference to the
            baseline; None without the axiom, or where ``dF`` vanishes.
        cancellation: ``sum |values| / |dF|``; large means that the map is mostly positive and
            negative parts cancelling each other.
        untrained_similarity: Spearman correlation of ``|values|`` with that of the untrained
            network's map, in [-1, 1]; None where that is not known.
        seconds: Wall time that the map took, its share of passes made for several methods included.
        status: How it ended.
        reason: Why, where it is not ``ok``.
    """

    probe: Probe
    target: str
    method: str
    layer: str
    values: Float[Tensor, "i j k"]
    unit: str
    region: Bool[Tensor, "i j k"]
    prediction: Int[Tensor, "i j k"]
    score: float
    epoch: int = 0
    step: int = 0
    completeness_error: float | None = None
    cancellation: float | None = None
    untrained_similarity: float | None = None
    seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""

    @property
    def doubtful(self) -> bool:
        """Whether the map breaks its axiom: an error above 10 %, or a cancellation above 1,000."""
        return (self.completeness_error or 0.0) > 0.10 or (self.cancellation or 0.0) > 1000.0

    @property
    def unmoved(self) -> bool:
        """Whether training left the map as it was: a similarity to the untrained one above 0.95.

        A map that stays so while the network learns does not depend on what it learned.
        """
        return (self.untrained_similarity or 0.0) > 0.95


@dataclass(frozen=True)
class Record:
    """One number, with everything that says what it is a number of: a row of ``records.csv``.

    ``method`` is empty for what belongs to the probe itself (``dice``, ``region_voxels``);
    ``value`` is NaN unless ``status`` is ``ok``.
    """

    run: str
    epoch: int
    step: int
    probe: str
    fingerprint: str
    target: str
    method: str
    layer: str
    metric: str
    unit: str
    value: float
    status: Status = "ok"

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(
                f"Record status must be one of {get_args(Status)}, but got {self.status!r}."
            )


RECORD_COLUMNS: tuple[str, ...] = tuple(column.name for column in fields(Record))
"""The header of ``records.csv``, in this order."""
