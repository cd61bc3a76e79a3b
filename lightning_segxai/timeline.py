"""The story of each cell: its first, previous and best map, kept as files for the shift metrics.

A cell is one probe, target and method. The memory of a timeline is a few names of files, so it
fits in a checkpoint; the maps themselves stay in the run's folder.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from lightning_segxai.folder import RunFolder, moment, region_note
from lightning_segxai.values import Attribution, checked_name

Reference = Literal["first", "previous", "best"]
"""An earlier map of a cell; ``best`` is that of the validation with the highest mean Dice."""


@dataclass(eq=False)
class Timeline:
    """Remembers which files are the first, previous and best map of each cell.

    At each validation `references` is read before `advance` is called.

    Args:
        folder: Where the maps lie.
        keep: Which other maps stay: all, only the last, or those of every n-th validation.

    Raises:
        ValueError: for a ``keep`` that is none of these.
    """

    folder: RunFolder
    keep: Literal["all", "last"] | int = "all"
    _cells: dict[str, dict[Reference, str]] = field(default_factory=dict, init=False)
    _passing: dict[str, list[str]] = field(default_factory=dict, init=False)
    _validations: int = field(default=0, init=False)
    _best_score: float = field(default=-math.inf, init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.keep not in ("all", "last") and not (isinstance(self.keep, int) and self.keep > 0):
            raise ValueError(
                f'`keep` must be "all", "last" or a positive number of validations, '
                f"but got {self.keep!r}."
            )

    def references(self, attribution: Attribution) -> dict[Reference, Attribution]:
        """The earlier maps of the attribution's cell, those that there are.

        What they share with the attribution is the cell and the grid; their own are ``values``,
        ``epoch`` and ``step``. Whether the region is the same, `same_region` says.
        """
        found: dict[Reference, Attribution] = {}
        loaded: dict[str, Float[Tensor, "i j k"] | None] = {}
        for reference, name in self._cells.get(_cell(attribution), {}).items():
            if name not in loaded:
                loaded[name] = self._load(name)
            values = loaded[name]
            when = moment(PurePosixPath(name).name)
            if values is not None and when is not None:
                found[reference] = dataclasses.replace(
                    attribution,
                    values=values.to(attribution.values),
                    epoch=when[0],
                    step=when[1],
                )
        return found

    def same_region(self, attribution: Attribution, reference_name: Reference) -> bool:
        """Whether the reference explains the very voxels that the attribution explains.

        False also where there is no such reference.
        """
        name = self._cells.get(_cell(attribution), {}).get(reference_name)
        if name is None:
            return False
        try:
            note = self.folder.read_note(self.folder.root / name)
        except (OSError, EOFError):
            return False
        return note == region_note(attribution.region)

    def advance(self, attributions: Iterable[Attribution], score: float | None) -> None:
        """Take in the maps of one validation, once written, and delete those no longer kept.

        A cell without a map of status ``ok`` keeps the references it has.

        Args:
            attributions: All that the validation brought.
            score: How good the network is, higher is better; None where nobody knows.
        """
        self.advance_maps(
            [
                self.folder.map_path(a.probe.name, a.target, a.method, a.epoch, a.step)
                for a in attributions
                if a.status == "ok"
            ],
            score,
        )

    def advance_maps(self, paths: Iterable[Path], score: float | None) -> None:
        """As `advance`, for maps that lie in the folder already."""
        score = -math.inf if score is None else score
        best = score > self._best_score  # False for NaN
        if best:
            self._best_score = score
        stays = self.keep == "all" or (
            isinstance(self.keep, int) and self._validations % self.keep == 0
        )
        self._validations += 1
        for path in paths:
            name = path.relative_to(self.folder.root).as_posix()
            cell = name.removeprefix("maps/").rsplit("/", 1)[0]
            self._advance_cell(cell, name, best=best, stays=stays)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, of primitives only."""
        return {
            "cells": {cell: dict(names) for cell, names in self._cells.items()},
            "passing": {cell: list(names) for cell, names in self._passing.items()},
            "validations": self._validations,
            "best_score": self._best_score,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: if a name in it is not that of a map in the run's folder.
        """
        for names in [*(n.values() for n in state["cells"].values()), *state["passing"].values()]:
            for name in names:
                _check_place(name)
        self._cells = {cell: dict(names) for cell, names in state["cells"].items()}
        self._passing = {cell: list(names) for cell, names in state["passing"].items()}
        self._validations = state["validations"]
        self._best_score = state["best_score"]

    def _advance_cell(self, cell: str, name: str, *, best: bool, stays: bool) -> None:
        names = self._cells.setdefault(cell, {"first": name})
        names["previous"] = name
        if best:
            names["best"] = name
        passing = self._passing.setdefault(cell, [])
        if not stays and name not in passing:
            passing.append(name)
        for old in [n for n in passing if n not in names.values()]:
            passing.remove(old)
            (self.folder.root / old).unlink(missing_ok=True)

    def _load(self, name: str) -> Float[Tensor, "i j k"] | None:
        try:
            return self.folder.read_nifti(self.folder.root / name)
        except (OSError, EOFError) as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The earlier map {name} cannot be read from {self.folder.root} ({error}); "
                    "shift metrics that refer to it are left out. Said once.",
                    stacklevel=2,
                )
            return None


def _cell(attribution: Attribution) -> str:
    return f"{attribution.probe.name}/{attribution.target}/{attribution.method}"


def _check_place(name: str) -> None:
    """A name from a checkpoint is read and may be deleted: it must stay inside the folder."""
    folder, *cell, file = name.split("/") if name.count("/") == 4 else ("", "")
    if folder != "maps" or moment(file) is None:
        raise ValueError(
            f"The checkpoint names {name!r} as a map, but a map is "
            "maps/<probe>/<target>/<method>/e<epoch>-s<step>.nii.gz. "
            "Resume from another checkpoint."
        )
    for part in cell:
        checked_name(part, "folder")
