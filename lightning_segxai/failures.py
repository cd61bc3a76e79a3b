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
        if self.on_error == "raise":
            raise error
        method, *metric = name.split("/")
        (self.metrics if metric else self.methods).add(metric[0] if metric else method)
        self._tell(
            f"{probe}/{target}/{name}",
            f'{name} of target "{target}" failed on probe "{probe}"',
            error,
        )

    def configured_cell(self, probe: str, target: str, name: str, error: Exception) -> None:
        """As `cell`, in a rehearsal: what is wrong with the configuration is let out."""
        if isinstance(error, ValueError | TypeError):
            raise error
        self.cell(probe, target, name, error)

    def attempt(
        self, who: str, work: Callable[[], Any], let_out: tuple[type[Exception], ...] = ()
    ) -> None:
        """Do what may fail at the ends, on a full disk or a dead server; but let some kinds out."""
        try:
            work()
        except Exception as error:
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
