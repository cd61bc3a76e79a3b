"""What becomes of a failure: it is told once, recorded every time, and training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

OnError = Literal["warn", "disable", "raise"]


@dataclass(eq=False)
class Failures:
    """Keeps failures of the monitor away from the training.

    Args:
        on_error: ``warn``: tell it and go on; ``disable``: and do not try that method or metric
            again; ``raise``: let it out.
        methods: Names of the methods that failed.
        metrics: Names of the metrics that failed.
    """

    on_error: OnError
    methods: set[str] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)
    _told: set[str] = field(default_factory=set)

    def cell(self, probe: str, target: str, name: str, error: Exception) -> None:
        """A cell failed; ``name`` is a method, or ``method/metric``."""
        method, *metric = name.split("/")
        (self.metrics if metric else self.methods).add(metric[0] if metric else method)
        self._tell(
            f"{probe}/{target}/{name}",
            f'{name} of target "{target}" failed on probe "{probe}"',
            error,
        )

    def attempt(
        self, who: str, work: Callable[[], Any], let_out: tuple[type[Exception], ...] = ()
    ) -> None:
        """Do what may fail at the ends, on a full disk or a dead server; but let some kinds out."""
        try:
            work()
        except Exception as error:  # sinks, disks and servers fail in every way
            if self.on_error == "raise" or isinstance(error, let_out):
                raise
            self._tell(who, f"{who} failed", error)

    def _tell(self, about: str, text: str, error: Exception) -> None:
        if about not in self._told:
            self._told.add(about)
            warnings.warn(
                f"`AttributionMonitor`: {text}: {type(error).__name__}: {error}. Training goes on.",
                stacklevel=3,
            )


@dataclass(eq=False)
class Mistakes:
    """Told of failed cells while something is tried out; keeps what a user can mend.

    It is let out afterwards, not at once: an error that leaves the cell that it belongs to would be
    taken for that of the others on the same walk.

    Args:
        other: Told of all other failures.
    """

    other: Callable[[str, str, str, Exception], None]
    first: Exception | None = None

    def __call__(self, probe: str, target: str, name: str, error: Exception) -> None:
        """A cell failed."""
        if not isinstance(error, ValueError | TypeError):
            self.other(probe, target, name, error)
        elif self.first is None:
            self.first = error

    def let_out(self) -> None:
        """Raise the first mistake, if there was one."""
        if self.first is not None:
            raise self.first
