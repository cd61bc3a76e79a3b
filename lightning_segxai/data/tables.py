"""Subjects from a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from lightning_segxai.data.sources import SubjectFiles, refuse


def table_subjects(path: Path) -> list[SubjectFiles]:
    """The volumes of a CSV; see `find_subjects` for its columns.

    Raises:
        ValueError: once for all that is wrong, with the lines.
    """
    rows, problems = rows_of(path, "image")
    sources: list[SubjectFiles] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        try:
            source = _row_subject(path.parent, row)
        except ValueError as error:
            problems.append((line, str(error)))
            continue
        first = lines.setdefault(source.name, line)
        if first != line:
            told = f"the name {source.name!r} is that of line {first} too; a column `name` tells"
            problems.append((line, f"{told} volumes apart whose files have the same name"))
        sources.append(source)
    if not rows and not problems:
        problems.append((2, "there is no row below the columns"))
    refuse(path, [f"line {line}: {told}" for line, told in sorted(problems)])
    return sources


def _row_subject(folder: Path, row: Mapping[str, str]) -> SubjectFiles:
    if "image" not in row:
        raise ValueError("there is no image")
    texts = {key: row.get(key, "") for key in ("name", "subject", "split")}
    maps = [key for key in row if key.startswith("map_")]
    paths = {
        key: str(folder / Path(row[key]).expanduser())
        for key in ("image", "label", "weights", *maps)
        if key in row
    }
    return SubjectFiles(
        image=paths["image"],
        label=paths.get("label"),
        maps={key.removeprefix("map_"): paths[key] for key in maps},
        weights=paths.get("weights"),
        metadata={key: row[key] for key in row if key not in texts and key not in paths},
        **texts,
    )


def rows_of(
    path: Path, needed: str
) -> tuple[list[tuple[int, dict[str, str]]], list[tuple[int, str]]]:
    """The filled cells of a table's rows by column, and what is wrong, each with its line.

    Args:
        path: A text with commas, semicolons or tabs between cells.
        needed: A column that must be there.

    Raises:
        ValueError: where the columns cannot be understood.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Save it as such.") from error
    heads = {mark: _cells(text, mark) for mark in ",;\t"}
    mark = next((mark for mark, cells in heads.items() if needed in cells), ",")
    columns = heads[mark]
    if needed not in columns:
        raise ValueError(f"{path} needs a column `{needed}`, but has {', '.join(columns) or None}.")
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise ValueError(f"{path} has these columns more than once: {', '.join(twice)}.")
    rows: list[tuple[int, dict[str, str]]] = []
    problems: list[tuple[int, str]] = []
    reader = csv.reader(io.StringIO(text), delimiter=mark, strict=True)
    try:
        next(reader)
        for cells in reader:
            filled = [cell.strip() for cell in cells]
            if any(filled[len(columns) :]):
                told = f"there are {len(cells)} cells for {len(columns)} columns"
                problems.append((reader.line_num, told))
            elif any(filled):
                pairs = zip(columns, filled, strict=False)  # trailing cells may be left out
                rows.append((reader.line_num, {key: cell for key, cell in pairs if key and cell}))
    except csv.Error as error:
        problems.append((reader.line_num, f"the cells cannot be told apart ({error})"))
    return rows, problems


def _cells(text: str, mark: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader(text.splitlines(), delimiter=mark), [])]
