"""Every number that a run may record, with what a reader of it needs: ``segxai metrics``."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_segxai.faithfulness.base import FaithfulnessMetric
from lightning_segxai.faithfulness.deletion import Deletion
from lightning_segxai.faithfulness.random_map import RandomBaseline
from lightning_segxai.focus.base import FocusMetric, ShiftMetric

# A new kind of metric gets its line here.
KINDS: tuple[tuple[type, str], ...] = (
    (FocusMetric, "focus: where one map lies"),
    (ShiftMetric, "shift: how far it moved from the first, previous and best map"),
    (
        FaithfulnessMetric,
        "faithfulness: whether the network does what the map says (faithfulness=, assess)",
    ),
)
ALWAYS = "of every observation: recorded where it can be, without being asked"
_SETTING = 24  # characters of a default, at most
_NARROW = 24  # of the first column, where the metrics with their settings do not fit


@dataclass(frozen=True)
class Entry:
    """A number that a run may record.

    Args:
        kind: The group that it is told in.
        name: Class of a metric, or what stands in the table of a run.
        settings: Of the metric, each with its default: ``region="label"``.
        unit: As in the table of a run.
        range: The least and the largest value.
        higher_is_better: None where neither direction is.
        reading: Reading help of one sentence.
    """

    kind: str
    name: str
    settings: tuple[str, ...]
    unit: str
    range: tuple[float, float]
    higher_is_better: bool | None
    reading: str

    @property
    def range_text(self) -> str:
        """The range in words."""
        low, high = self.range
        if math.isinf(low):
            return "any" if math.isinf(high) else f"{high:g} or less"
        return f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"

    @property
    def better(self) -> str:
        """The better direction: ``higher``, ``lower``, or ``-``."""
        return {True: "higher", False: "lower", None: "-"}[self.higher_is_better]

    def call(self, width: int) -> str:
        """The name with its settings, on lines of their own where they do not fit.

        >>> print(Entry("", "Reach", ('region="target"',), "mm", (0, 9), None, "").call(20))
        Reach(
          region="target")
        """
        if not self.settings:
            return self.name
        settings = ", ".join(self.settings) + ")"
        if len(self.name) + 1 + len(settings) <= width:
            return f"{self.name}({settings}"
        return f"{self.name}(\n" + textwrap.fill(
            settings,
            width,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )


_SHARE, _SCORE, _COUNT = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)
# What `measure` and `observe` record without being asked.
_ALWAYS = (
    (
        "dice",
        "1",
        _SHARE,
        True,
        "Overlap of the prediction with the probe's label, mean of its classes; 1: the same.",
    ),
    ("region_voxels", "voxel", _COUNT, None, "How many voxels' logits the target explains."),
    (
        "completeness_error",
        "1",
        _COUNT,
        False,
        "By what share the map's sum misses the change of the score, where it should be equal.",
    ),
    (
        "cancellation",
        "1",
        _COUNT,
        False,
        "1: all of the map has one sign; large: it is mostly parts that cancel each other.",
    ),
    (
        "doubtful",
        "1",
        _SHARE,
        False,
        "1: completeness_error above 0.1 or cancellation above 1,000; do not trust the map.",
    ),
    (
        "untrained_similarity",
        "1",
        _SCORE,
        None,
        "Rank correlation with the untrained network's map; 1: the same order of voxels.",
    ),
    (
        "unmoved",
        "1",
        _SHARE,
        False,
        "1: untrained_similarity above 0.95; the map does not depend on what was learned.",
    ),
    (
        "agreement",
        "1",
        _SCORE,
        None,
        "Mean rank correlation with the maps of the other methods; 0: no relation.",
    ),
    (
        "same_region/<reference>",
        "1",
        _SHARE,
        None,
        "1: the first, previous or best map explains the same voxels; 0: others, hence a shift.",
    ),
)


def catalogue(exported: Iterable[object]) -> list[Entry]:
    """What a run may record, by kind: the metrics among the names, then what is always recorded.

    Args:
        exported: What the package exports; all that is no metric is passed over.
    """
    things = list(exported)
    return [
        Entry(
            kind,
            thing.__name__,
            tuple(_setting(f) for f in fields(thing)) if is_dataclass(thing) else (),
            one.unit,
            one.range,
            one.higher_is_better,
            one.reading,
        )
        for base, kind in KINDS
        for thing in things
        if isinstance(thing, type) and issubclass(thing, base) and not inspect.isabstract(thing)
        for one in [example(thing)]
    ] + [Entry(ALWAYS, name, (), *told) for name, *told in _ALWAYS]


def example(metric: type[Any]) -> Any:
    """A metric of the class to ask, as some answer by their settings; else the class."""
    if metric is RandomBaseline:
        return RandomBaseline(Deletion())
    asks = any(f.default is MISSING and f.default_factory is MISSING for f in fields(metric))
    return metric if asks else metric()


def _setting(field: Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return field.name
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)
    return f"{field.name}={text if len(text) <= _SETTING else text[: _SETTING - 3] + '...'}"


def show_catalogue(exported: Iterable[object]) -> None:
    """Print the catalogue, as wide as the terminal, or else in 80 columns.

    Args:
        exported: What the package exports.
    """
    page = Console(markup=False, emoji=False, highlight=False)
    with page.capture() as printed:
        for kind, table in _tables(catalogue(exported), page.width).items():
            page.print(kind, style="bold")
            page.print(table)
            page.print()
    lines = [line.rstrip() for line in printed.get().splitlines()]
    try:
        print(*lines[:-1], sep="\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush


def _tables(entries: list[Entry], width: int) -> dict[str, Table]:
    """One of each kind, with columns as wide in all of them."""
    heads = ("unit", "range", "better")
    cells = {id(e): (e.unit, e.range_text, e.better) for e in entries}
    rooms = [max(map(len, column)) for column in zip(heads, *cells.values(), strict=True)]
    widest = max(len(e.call(sys.maxsize)) for e in entries)
    if width < 2 * widest + sum(rooms):  # settings go below the names
        widest = max(len(line) for e in entries for line in e.call(_NARROW).splitlines())
    tables: dict[str, Table] = {}
    for kind in dict.fromkeys(e.kind for e in entries):
        table = tables[kind] = Table(
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
            width=width,
        )
        table.add_column("metric", width=widest, overflow="fold")
        for head, room in zip(heads, rooms, strict=True):
            table.add_column(head, width=room, overflow="fold")
        table.add_column("reading help", ratio=1, overflow="fold")
        for e in entries:
            if e.kind == kind:
                table.add_row(e.call(widest), *cells[id(e)], e.reading)
    return tables
