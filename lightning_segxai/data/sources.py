"""What researchers have on disk, or made-up heads: volumes with their labels, not yet read.

The data module finds them (``finding``), splits them (``splits``), and then reads and checks each
(``subjects``).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchio as tio

from lightning_segxai.data.phantom import tof_phantom
from lightning_segxai.data.subjects import NIFTI, PhantomCohort, absence, file_stem
from lightning_segxai.values import checked_name

Text = str
if not TYPE_CHECKING:  # what YAML makes of 7 and of nothing; `SubjectFiles` makes text of it
    Text = str | int | float | None


class Source(ABC):
    """One volume with its label, not yet read.

    Attributes:
        name: Its own, no other volume has it.
        subject: The person; several volumes may share one.
        split: ``train``, ``val`` or ``test``, also in other words for them; empty if not given.
        metadata: What else is known of it.
    """

    name: str
    subject: str
    split: str
    metadata: Mapping[str, str]

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """All files whose contents decide what is read, in an order that stays."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What decides beside the files' contents, the same in whatever folder they lie."""

    @abstractmethod
    def read(self) -> tio.Subject:
        """The subject: ``image``, ``label`` if there is one, further maps, and ``name``."""


@dataclass(frozen=True)
class SubjectFiles(Source):
    """One volume, its label and its maps, each a path.

    A path is that of a ``.nii``, ``.nii.gz``, ``.nrrd``, ``.nhdr``, ``.mha`` or ``.mhd`` file, or
    of a folder with one DICOM series.

    Args:
        image: The angiogram.
        label: Class of every voxel, where the truth is known.
        name: Its name in tables and panels; the image file's, or the DICOM folder's, where it is
            empty.
        subject: The person, who is never both trained and validated on; the name where it is empty.
        split: ``train``, ``val`` or ``test``, where it is given; for all volumes or for none.
        maps: Further label maps on the same grid, by name, such as ``brain``.
        weights: How often a patch is drawn around each voxel, not negative; any scale.
        metadata: What else is known, to be written beside the split.

    In YAML, numbers may stand for name, subject and metadata, but YAML reads ``01`` as 1, as which
    it may be another subject: quote it.

    Raises:
        ValueError: for a bad name of the volume or of a map.
    """

    image: str
    label: str | None = None
    name: Text = ""
    subject: Text = ""
    split: str = ""
    maps: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None
    metadata: Mapping[str, Text] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = checked_name(_text(self.name) or file_stem(self.image), "subject")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "subject", _text(self.subject) or name)
        metadata = {key: _text(value) for key, value in self.metadata.items()}
        object.__setattr__(self, "metadata", metadata)
        for key in self.maps:
            if checked_name(key, "map") in ("image", "label", "weights", "name"):
                raise ValueError(f'Subject "{name}" cannot have a map named {key!r}. Rename it.')

    @property
    def paths(self) -> dict[str, Path]:
        """Where the image, the label and the maps lie, by their keys in the subject."""
        given = {"image": self.image, "label": self.label}
        given |= {key: self.maps[key] for key in sorted(self.maps)} | {"weights": self.weights}
        return {k: Path(path).expanduser() for k, path in given.items() if path is not None}

    @property
    def files(self) -> tuple[Path, ...]:
        found = []
        for key, path in self.paths.items():
            for one in [path] if absence(path) else _files_of(path):
                if state := absence(one):
                    raise ValueError(f'The {key} of subject "{self.name}" ({one}) {state}.')
                found.append(one)
        return tuple(found)

    @property
    def described(self) -> str:
        return ", ".join([self.name, *(f"{key}={path.name}" for key, path in self.paths.items())])

    def read(self) -> tio.Subject:
        for key, path in self.paths.items():
            if (better := _readable(path)) != path:
                raise ValueError(
                    f'The {key} of subject "{self.name}" ({path}) cannot be read with capitals in '
                    f"its ending. Rename it to {better.name}."
                )
        # Weights are a label map to TorchIO, so that no intensity transform changes them. What is
        # not there is told by `check_subject`, along with all else that is wrong
        return tio.Subject(
            {
                key: (tio.ScalarImage if key == "image" else tio.LabelMap)(path, verify_path=False)
                for key, path in self.paths.items()
            },
            name=self.name,
        )


@dataclass(frozen=True)
class PhantomSubject(Source):
    """One made-up head, with its brain as a map.

    Args:
        cohort: The subjects it is one of.
        number: Which one, from 0.
    """

    cohort: PhantomCohort
    number: int
    name: str = field(init=False)
    subject: str = field(init=False)
    split: str = field(init=False, default="")
    metadata: Mapping[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.cohort.subjects:
            raise ValueError(
                f"`PhantomSubject(number={self.number})` must be one of the cohort's "
                f"{self.cohort.subjects} subjects, from 0."
            )
        object.__setattr__(self, "name", f"phantom-{self.number:02d}")
        object.__setattr__(self, "subject", self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def described(self) -> str:
        return f"{self.name} of {self.cohort}"

    def read(self) -> tio.Subject:
        # Ten thousand heads apart, so that cohorts of neighboring seeds share none
        seed = self.cohort.seed * 10_000 + self.number
        shape, spacing = self.cohort.shape, self.cohort.spacing_mm
        phantom = tof_phantom(shape=shape, spacing_mm=spacing, seed=seed)
        affine = np.diag([*phantom.spacing_mm, 1.0])
        label, brain = (np.asarray(m, dtype=np.uint8) for m in (phantom.label, phantom.brain))
        return tio.Subject(
            image=tio.ScalarImage(tensor=torch.from_numpy(phantom.image)[None], affine=affine),
            label=tio.LabelMap(tensor=torch.from_numpy(label)[None], affine=affine),
            brain=tio.LabelMap(tensor=torch.from_numpy(brain)[None], affine=affine),
            name=self.name,
        )


def _text(value: Text | None) -> str:
    return "" if value is None else str(value)


def _readable(path: Path) -> Path:
    """The path, or one that can be read: ITK does not know all endings in capitals."""
    ending = path.name[len(file_stem(path)) :]
    small = ending.lower()
    known = small in (".nrrd", ".nhdr") or (small in NIFTI and ending.isupper())
    if known or ending == small or path.is_dir():
        return path
    return path.with_name(file_stem(path) + small)


def _files_of(path: Path) -> list[Path]:
    """The file itself, with the data files that it names, or the files of a DICOM folder."""
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return [path]
    header = path.read_text(encoding="latin-1")
    named = re.search(r"^(?:ElementDataFile *=|data ?file:) *(.+)((?:\n.*)*)", header, re.M | re.I)
    if named is None or named[1].strip().upper() in ("", "LOCAL"):
        return [path]
    names = [named[1].strip()]
    if names[0].split()[0] == "LIST":
        names = named[2].split("\n")
    elif "%" in names[0]:  # slice_%03d.raw 1 20 1
        pattern = re.sub(r"%\d*d", "*", names[0].split()[0])
        names = sorted(p.name for p in path.parent.glob(pattern))
    return [path, *(path.parent / name.strip() for name in names if name.strip())]


def refuse(root: Path, problems: list[str]) -> None:
    """Raise one error for all that is wrong with what lies at ``root``."""
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{root} cannot be used as it is:\n  {lines}")
