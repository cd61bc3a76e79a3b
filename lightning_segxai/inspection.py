"""The data before a training: a table of all subjects, what an epoch holds, and two pictures."""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_segxai.contact_sheet import Frame, contact_sheet
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.settings import told
from lightning_segxai.data.survey import SubjectRow, Survey, first_patches, survey

_TILES = 48
_WIDTH = 160  # of the table, where there is no terminal to say so


def inspect_data(data: object, out: str) -> None:
    """Print what is known of the subjects and what a training would draw from them.

    Writes ``subjects.png``, a projection of each subject, and ``patches.png``, the first patches of
    a training as the network would get them. All subjects are read, checked and kept as for a
    training; a cache on disk is filled.

    Args:
        data: The data module.
        out: Folder for the pictures, which are overwritten.

    Raises:
        ValueError: for another data module than ours, and at the end, where subjects cannot be
            used.
    """
    if not isinstance(data, MRADataModule):
        raise ValueError(
            "`segxai data` needs an `MRADataModule`, which knows its subjects, but the "
            f"configuration has `{type(data).__name__}`."
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = survey(data)
    except ValueError as error:
        if "\n" not in str(error):
            raise
        print(error, file=sys.stderr)  # line by line, which is one line no more below
        raise ValueError("The subjects cannot be listed, see above.") from error
    page = _page()
    page.print(subject_table(found.rows))
    page.print(_summary(data, found))
    for word, color, texts in (
        ("error", "red", found.errors),
        ("warning", "yellow", found.warnings),
    ):
        for text in texts:
            page.print(f"{word}: {' '.join(text.split())}", style=color, soft_wrap=True)
    _subjects_picture(found.rows).save(folder / "subjects.png")
    _patches_picture(data, found).save(folder / "patches.png")
    page.print(f"pictures: {folder / 'subjects.png'}, {folder / 'patches.png'}", soft_wrap=True)
    unusable = sum(bool(row.errors) for row in found.rows)
    if unusable:
        raise ValueError(f"{unusable} of {len(found.rows)} subjects cannot be used, see above.")
    if found.errors:
        raise ValueError(f"These {len(found.rows)} subjects cannot be used, see above.")


def _page() -> Console:
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def subject_table(rows: Sequence[SubjectRow]) -> Table:
    """A row for each volume."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    people = any(row.subject != row.name for row in rows)
    table.add_column("name", overflow="fold", max_width=40)
    if people:
        table.add_column("subject", overflow="fold", max_width=24)
    table.add_column("split")
    for head in ("voxels", "spacing mm", "min", "median", "99.95 %", "max", "vessel %", "voxels"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("problems", overflow="fold")
    for row in rows:
        troubles = [short(text, row.name) for text in (*row.errors, *row.warnings)]
        table.add_row(
            row.name,
            *([row.subject] if people else []),
            row.split or "?",
            _by(row.shape),
            _by(row.spacing_mm),
            *("-" * 4 if row.intensity is None else map(_number, row.intensity)),
            "-" if row.vessel_share is None else f"{100 * row.vessel_share:.3g}",
            "-" if row.vessel_voxels is None else f"{row.vessel_voxels:,}",
            "; ".join(troubles),
            style="red" if row.errors else "",
        )
    return table


def short(text: str, name: str) -> str:
    """A problem in a few words: without what a row of its own says already, and without advice.

    >>> short('The label of subject "a" (x/a.nii) has no vessel voxel: nothing to learn.', "a")
    'label has no vessel voxel: nothing to learn'
    """
    own = re.escape(f'subject "{name}"')
    text = re.sub(rf"^The (\w+) of {own}(?: \(.*?\))? ", r"\1 ", " ".join(text.split()))
    text = re.sub(rf"^{own}: ", "", text, flags=re.IGNORECASE)
    return text.split(". ")[0].rstrip(".")


def _summary(data: MRADataModule, found: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for split in ("train", "val", "test"):
        rows = [row for row in found.rows if row.split == split]
        people = len({row.subject for row in rows})
        table.add_row(split, f"{_count(len(rows), 'volume')} of {_count(people, 'subject')}")
    table.add_row("kept", _kept(data, found))
    table.add_row("spacing", _spacings(data, found))
    size = _by(data.patch_size)
    if found.plan is None:
        table.add_row("epoch", "nothing to train on")
    else:
        plan, shares = found.plan, [100 * share for share in found.vessel_shares]
        patches = plan.volumes * plan.samples_per_volume
        table.add_row(
            "epoch",
            f"{_count(patches, 'patch', 'es')}, {plan.samples_per_volume} of each volume, in "
            f"{_count(len(plan), 'batch', 'es')} of {plan.batch_size}, for one process",
        )
        empty = sum(share == 0 for share in shares)
        table.add_row(
            "patch",
            f"{size} voxels, {statistics.median(shares):.2g} % of them vessel (median); "
            f"{100 * empty / len(shares):.0f} % of the patches have none",
        )
    table.add_row("sampling", told(data.sampling))
    table.add_row("", "")
    return table


def _kept(data: MRADataModule, found: Survey) -> str:
    total = sum(row.nbytes for row in found.rows)
    where = {
        None: "nowhere, as none can be used",
        "memory": "in memory",
        "disk": f"on disk, in {data.cache_dir}",
        "none": "nowhere: read anew in every epoch",
    }[found.cache]
    why = "" if data.cache is None else f" (cache={data.cache})"
    return f"{total / 2**20:,.1f} MiB, {where}{why}"


def _spacings(data: MRADataModule, found: Survey) -> str:
    stored = _counted(row.spacing_mm for row in found.rows if row.spacing_mm is not None)
    if data.spacing_mm is None:
        return stored
    return f"{stored}; resampled to {_counted(found.spacings)}"


def _counted(spacings: Iterable[tuple[float, ...]]) -> str:
    counts = Counter(f"{_by(spacing)} mm" for spacing in spacings)
    return ", ".join(f"{spacing} ({n})" for spacing, n in counts.most_common()) or "unknown"


def _subjects_picture(rows: Sequence[SubjectRow]):
    shown = rows[:_TILES]
    frames = [
        Frame(
            row.name,
            f"{row.split or '?'} · {_by(row.spacing_mm)} mm",
            row.flat,
            "; ".join(short(text, row.name) for text in (*row.errors, *row.warnings)),
        )
        for row in shown
    ]
    count = _count(len(rows), "subject")
    title = count if len(shown) == len(rows) else f"{len(shown)} of {count}"
    notes = [
        "Largest intensity from head to foot, seen from the feet: the patient's right is left."
    ]
    return contact_sheet(frames, title=title, notes=notes, sides=True)


def _patches_picture(data: MRADataModule, found: Survey):
    probes = first_patches(data, found, batches=2, most=24)
    frames = []
    for probe in probes:
        frames.append(Frame(probe.name, "", probe))
    title = "The first patches of a training" if probes else "Nothing to train on"
    notes = [f"{_by(data.patch_size)} voxels, after sampling and augmentation, which may mirror."]
    return contact_sheet(frames, title=title, notes=notes if probes else [], sides=False)


def _by(numbers: Sequence[float] | None) -> str:
    return "-" if numbers is None else " x ".join(f"{n:.4g}" for n in numbers)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural if n != 1 else ''}"
