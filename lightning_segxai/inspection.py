"""The data before a training: a table of all subjects, what an epoch holds, and two pictures."""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from PIL.Image import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_segxai.contact_sheet import Frame, contact_sheet
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.settings import told
from lightning_segxai.data.subject_rows import SubjectRow
from lightning_segxai.data.survey import Survey, first_patches, survey

_TILES = 48
_WIDTH = 160  # of the table, where there is no terminal to say so
# Columns that a narrow terminal goes without, the first one first; problems are told below, too
_LEFT_OUT = ("problems", "vessel voxels", "min", "median", "subject", "max", "99.95 %", "split")


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
    page.print(subject_table(found.rows, page.width))
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


def subject_table(rows: Sequence[SubjectRow], width: int) -> Table:
    """A row for each volume; where the width does not do, columns are left out and named.

    Args:
        rows: Of all volumes.
        width: Characters of a line.
    """
    columns = _columns(rows)
    rooms = {head: max(map(len, (head, *cells))) + 2 for head, cells in columns.items()}
    widest = {"name": 40, "subject": 24, "problems": 32}
    rooms = {head: min(room, widest.get(head, room) + 2) for head, room in rooms.items()}
    left_out = []
    for head in _LEFT_OUT:
        if head in columns and sum(rooms[head] for head in columns) > width:
            columns.pop(head)
            left_out.append(head)
    told = f"for want of width without: {', '.join(left_out)}" if left_out else None
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=told, caption_justify="left"
    )
    for head in columns:
        words = head in ("name", "subject", "split", "problems")
        side: Literal["left", "right"] = "left" if words else "right"
        most = widest.get(head) if head != "problems" else None
        table.add_column(head, justify=side, overflow="fold", no_wrap=not words, max_width=most)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*cells, style="red" if row.errors else "")
    return table


def _columns(rows: Sequence[SubjectRow]) -> dict[str, list[str]]:
    """The cells of the table, by the heads of its columns."""
    columns = {"name": [row.name for row in rows]}
    if any(row.subject != row.name for row in rows):
        columns["subject"] = [row.subject for row in rows]
    columns["split"] = [row.split or "?" for row in rows]
    columns["voxels"] = [_by(row.shape) for row in rows]
    columns["spacing mm"] = [_by(row.spacing_mm) for row in rows]
    for n, head in enumerate(("min", "median", "99.95 %", "max")):
        columns[head] = ["-" if r.intensity is None else _number(r.intensity[n]) for r in rows]
    shares, counts = [row.vessel_share for row in rows], [row.vessel_voxels for row in rows]
    columns["vessel %"] = ["-" if share is None else f"{100 * share:.3g}" for share in shares]
    columns["vessel voxels"] = ["-" if count is None else f"{count:,}" for count in counts]
    columns["problems"] = [
        "; ".join([*(short(text, row.name) for text in row.errors), *row.warnings]) for row in rows
    ]
    return columns


def short(text: str, name: str) -> str:
    """A problem in a few words: without what a row of its own says already, and without advice.

    >>> short('The label of subject "a" (x/a.nii) has no vessel voxel: nothing to learn.', "a")
    'label has no vessel voxel: nothing to learn'
    """
    own = re.escape(f'subject "{name}"')
    text = re.sub(rf"^The (\w+) of {own}(?: \(.*?\))? ", r"\1 ", " ".join(text.split()))
    text = text.split(". ")[0].split(", which ")[0].rstrip(".")
    return text if len(text) < 90 else text.split(": ")[0]


def _summary(data: MRADataModule, found: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for split in ("train", "val", "test"):
        rows = [row for row in found.rows if row.split == split]
        people = _count(len({row.subject for row in rows}), "subject")
        broken = sum(bool(row.errors) for row in rows)
        text = f"{_count(len(rows), 'volume')} of {people}" if rows else "none"
        table.add_row(split, text + f", {broken} of which cannot be used" * bool(broken))
    table.add_row("kept", _kept(data, found))
    table.add_row("spacing", _spacings(data, found))
    if found.plan is None:
        table.add_row("epoch", "nothing to train on")
    else:
        plan, shares = found.plan, [100 * share for share in found.vessel_shares]
        patches = plan.volumes * plan.samples_per_volume
        table.add_row(
            "epoch",
            f"{_count(patches, 'patch', 'es')}, {plan.samples_per_volume} of each volume, in "
            f"{_count(len(plan), 'batch', 'es')} of at most {plan.batch_size}, on one device",
        )
        empty = 100 * sum(share == 0 for share in shares) / len(shares)
        table.add_row(
            "patch",
            f"{_by(data.patch_size)} voxels, {statistics.median(shares):.2g} % of them vessel in "
            f"the median; no vessel in {empty:.0f} % of the patches",
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


def _subjects_picture(rows: Sequence[SubjectRow]) -> Image:
    shown = rows[:_TILES]
    frames = [
        Frame(
            row.name,
            (row.split or "?") + (f" · {_by(row.spacing_mm)} mm" if row.spacing_mm else ""),
            row.flat,
            "; ".join([short(text, row.name) for text in row.errors] or row.warnings),
        )
        for row in shown
    ]
    splits = Counter(row.split or "?" for row in rows)
    parts = [_count(len(rows), "volume"), *(f"{n} {split}" for split, n in splits.items())]
    notes = [
        "Largest intensity along the body's axis, seen from the feet: the patient's right is on "
        "the left."
    ]
    if len(shown) < len(rows):
        notes.append(f"The first {len(shown)} of {len(rows)} are shown.")
    return contact_sheet(frames, title=" · ".join(parts), notes=notes, sides=True)


def _patches_picture(data: MRADataModule, found: Survey) -> Image:
    frames = [
        Frame(flat.name, f"{100 * share:.2g} % vessel", flat)
        for flat, share in first_patches(data, found, batches=2, most=24)
    ]
    title = "The first patches of a training" if frames else "Nothing to train on"
    notes = [f"{_by(data.patch_size)} voxels, after sampling and augmentation, which may mirror."]
    return contact_sheet(frames, title=title, notes=notes if frames else [], sides=False)


def _by(numbers: Sequence[float] | None) -> str:
    return (
        "-"
        if numbers is None
        else " x ".join(str(n) if isinstance(n, int) else f"{n:.3g}" for n in numbers)
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural if n != 1 else ''}"
