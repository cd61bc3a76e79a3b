"""Subjects from a BIDS folder: an index of its angiograms and masks, by the names of files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_segxai.data.sources import SubjectFiles, refuse
from lightning_segxai.data.subjects import NIFTI, absence, file_stem
from lightning_segxai.data.tables import rows_of


def bids_subjects(root: Path) -> list[SubjectFiles]:
    """The angiograms of a BIDS folder with their masks; see `find_subjects` for their names.

    Raises:
        ValueError: once for all that is wrong.
    """
    table = root / "participants.tsv"
    people, problems = _participants(table)
    masks = _masks(root / "derivatives")
    places = ("sub-*/anat", "sub-*/ses-*/anat")
    images = sorted(
        path
        for place in places
        for path in root.glob(f"{place}/sub-*_angio.*")
        if path.name.lower().endswith(NIFTI) and file_stem(path).endswith("_angio")
    )
    sources: dict[str, SubjectFiles] = {}
    for image in images:
        name, subject = file_stem(image).removesuffix("_angio"), image.relative_to(root).parts[0]
        found = {
            kind: masks.get(_entities(image.name) | {f"desc-{kind}"}, [])
            for kind in ("vessel", "brain")
        }
        # another pipeline's brain mask may lie on another scan's grid
        beside = {path.parent for path in found["vessel"]}
        found["brain"] = [path for path in found["brain"] if path.parent in beside]
        for kind, paths in found.items():
            if len(paths) > 1:
                told = ", ".join(map(str, paths))
                problems.append(f"{image} has {len(paths)} {kind} masks: {told}. Keep one of them")
        if name in sources:
            problems.append(f"{image} and {sources[name].image} are both {name!r}")
        metadata = dict(people.get(subject, {}))
        try:
            sources[name] = SubjectFiles(
                image=str(image),
                label=str(found["vessel"][0]) if found["vessel"] else None,
                name=name,
                subject=subject,
                split=metadata.pop("split", ""),
                maps={"brain": str(found["brain"][0])} if found["brain"] else {},
                metadata=metadata,
            )
        except ValueError as error:
            problems.append(f"{image}: {error}")
    if not images:
        problems.append(f"no image lies at {' or '.join(places)}/sub-*_angio.nii.gz")
    subjects = sorted({source.subject for source in sources.values()})
    if people and subjects and people.keys().isdisjoint(subjects):
        problems.append(
            f"{table} needs the subjects of the images as `participant_id` ({_some(subjects)}), "
            f"but has none of them, only {_some(sorted(people))}"
        )
    refuse(root, problems)
    return list(sources.values())


def _participants(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    if state := absence(path):
        return {}, [f"{path} {state}"] if path.is_symlink() else []
    try:
        rows, problems = rows_of(path, ("participant_id", "split"))
    except ValueError as error:
        return {}, [str(error).rstrip(".")]
    people = {}
    for line, row in rows:
        # "n/a" is how BIDS leaves a cell empty
        known = {key: cell for key, cell in row.items() if cell != "n/a"}
        if person := known.pop("participant_id", ""):
            people["sub-" + person.removeprefix("sub-")] = known
        else:
            problems.append((line, "there is no participant_id"))
    return people, [f"{path}, line {line}: {told}" for line, told in sorted(problems)]


def _masks(derivatives: Path) -> dict[frozenset[str], list[Path]]:
    """All masks, by the entities of their names."""
    found: dict[frozenset[str], list[Path]] = {}
    for folder, folders, names in os.walk(derivatives):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("sub-") and name.lower().endswith(("_mask.nii.gz", "_mask.nii")):
                found.setdefault(_entities(name), []).append(Path(folder, name))
    return found


def _entities(name: str) -> frozenset[str]:
    """The entities of a BIDS name, without those that tell a derivative's grid."""
    entities = file_stem(name).split("_")[:-1]
    grid = ("space-", "res-", "den-")
    return frozenset(entity for entity in entities if not entity.startswith(grid))


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)])
