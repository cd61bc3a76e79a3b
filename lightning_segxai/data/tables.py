"""Subjects from a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from lightning_segxai.data.sources import SubjectFiles, refuse

_HEADS = ("image", "label", "split", "subject", "name", "weights", "map_")


def table_subjects(path: Path) -> list[SubjectFiles]:
    """The volumes of a CSV; see `find_subjects` for its columns.

    Raises:
        ValueError: once for all that is wrong, with the lines.
    """
    rows, problems = rows_of(path, _HEADS)
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
    path: Path, known: Sequence[str]
) -> tuple[list[tuple[int, dict[str, str]]], list[tuple[int, str]]]:
    """The filled cells of a table's rows by column, and what is wrong, each with its line.

    Args:
        path: A text with commas, semicolons or tabs between cells.
        known: The columns with a meaning, whether written in capitals or small letters; the first
            must be there. One that ends with an underscore is the beginning of others.

    Raises:
        ValueError: where the columns cannot be understood.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Save it as such.") from error
    # A cell of a TSV may begin with a quote that never ends
    quoted = path.suffix.lower() != ".tsv"
    reader_of = partial(csv.reader, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    heads = {
        mark: [_column(_cell(cell, quoted), known) for cell in cells]
        for mark in ",;\t"
        for cells in islice(reader_of(text.splitlines(), delimiter=mark), 1)
    }
    mark = next((mark for mark, columns in heads.items() if known[0] in columns), ",")
    columns = heads.get(mark, [])
    if known[0] not in columns:
        told = ", ".join(columns) or None
        raise ValueError(f"{path} needs a column `{known[0]}`, but has {told}.")
    alike = [column.lower() if column.startswith("map_") else column for column in columns]
    twice = sorted({column for column in alike if column and alike.count(column) > 1})
    if twice:
        raise ValueError(f"{path} has these columns more than once: {', '.join(twice)}.")
    rows: list[tuple[int, dict[str, str]]] = []
    problems: list[tuple[int, str]] = []
    reader = reader_of(io.StringIO(text), delimiter=mark, strict=True)
    try:
        next(reader)
        for cells in reader:
            filled = [_cell(cell, quoted) for cell in cells]
            if any(filled[len(columns) :]):
                told = f"there are {len(cells)} cells for {len(columns)} columns"
                problems.append((reader.line_num, told))
            elif any(filled):
                pairs = zip(columns, filled, strict=False)  # trailing cells may be left out
                rows.append((reader.line_num, {key: cell for key, cell in pairs if key and cell}))
    except csv.Error as error:
        problems.append((reader.line_num, f"the cells cannot be told apart ({error})"))
    return rows, problems


def _column(head: str, known: Sequence[str]) -> str:
    """The head, in small letters as far as it is a known one."""
    small = head.lower()
    starts = (one for one in known if small == one or (one[-1] == "_" and small.startswith(one)))
    start = next(starts, "")
    return start + head[len(start) :]


def _cell(text: str, quoted: bool) -> str:
    """What a cell says; R writes all texts of a TSV in quotes."""
    text = text.strip()
    in_quotes = len(text) > 1 and text[0] == text[-1] == '"'
    return text if quoted or not in_quotes else text[1:-1].strip()
