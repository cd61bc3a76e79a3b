"""What a focus metric and a shift metric are: one number of a map, or of a map and an earlier one.

A metric is a frozen dataclass, its fields are its settings; it carries what a reader of a panel
needs: unit, range, the better direction and one sentence of reading help.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from lightning_segxai.values import Attribution


class FocusMetric(ABC):
    """Where the attribution of one map lies, as one number."""

    unit: ClassVar[str]
    range: ClassVar[tuple[float, float]]
    higher_is_better: ClassVar[bool | None]
    reading: ClassVar[str]

    @abstractmethod
    def measure(self, attribution: Attribution) -> float | None:
        """The number, or None where it cannot be had (a probe without a label, say).

        The map is finite and not zero everywhere; maps that are not are handled before.
        """


class ShiftMetric(ABC):
    """How far a map moved from an earlier map of the same cell, as one number."""

    unit: ClassVar[str]
    range: ClassVar[tuple[float, float]]
    higher_is_better: ClassVar[bool | None]
    reading: ClassVar[str]

    @abstractmethod
    def measure(self, attribution: Attribution, reference: Attribution) -> float | None:
        """The number, or None where it cannot be had.

        Both maps lie on the same grid, are finite and not zero everywhere.
        """
