"""What a faithfulness metric is: one number of a map, held against the network that it explains."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_segxai.baselines import Blank
from lightning_segxai.methods.hiding import Veil
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Shape


class FaithfulnessMetric(ABC):
    """Whether the network does what a map says, as one number.

    A subclass is a frozen dataclass whose fields are its settings. It carries what a reader of a
    panel needs, and says what it costs. There is no zero that all networks share: read it against
    `RandomBaseline`.
    """

    @property
    @abstractmethod
    def unit(self) -> str:
        """Unit of the number."""

    @property
    @abstractmethod
    def range(self) -> tuple[float, float]:
        """What it can be."""

    @property
    @abstractmethod
    def higher_is_better(self) -> bool | None:
        """The better direction; None where there is none."""

    @property
    @abstractmethod
    def reading(self) -> str:
        """One sentence of help with reading it."""

    @abstractmethod
    def assess(self, model: ScoredModel, attribution: Attribution) -> float | None:
        """The number, or None where it cannot be had.

        Args:
            model: The network seen through the target that was explained: ``model(volumes)`` gives
                the score of each volume ``b c i j k`` of a batch; in eval mode, with a seeded RNG,
                and everything is restored behind it.
            attribution: The map, on the CPU; finite and not zero everywhere.
        """

    @abstractmethod
    def passes(self, shape: Shape, windows: int) -> Passes:
        """Windows that go through the network for one map.

        Args:
            shape: Voxels of the volume.
            windows: Number of windows that cover it.
        """


def veiled(model: ScoredModel, baseline: Blank, sigma_mm: float) -> Veil:
    """The probe's volume where the network is, with a baseline behind it."""
    x = model.probe.image.detach().to(model.predictor.device)
    return Veil.of(model, x, baseline, sigma_mm)


def together(model: ScoredModel) -> int:
    """How many perturbed volumes are made and scored at once.

    As many as fill a pass with their windows: more would be held, and go through no faster.
    """
    places = model.windows.places
    return max(1, model.predictor.batch(places[0]) // len(places))
