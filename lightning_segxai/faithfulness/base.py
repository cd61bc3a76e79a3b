"""What a faithfulness metric is: one number of a map, held against the network that it explains."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_segxai.baselines import Blank
from lightning_segxai.guard import undisturbed
from lightning_segxai.methods.base import AttributionMethod, values_of
from lightning_segxai.methods.hiding import Veil
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Attribution, Map, Shape, UnsupportedError, Volume


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
    def assess(
        self,
        model: ScoredModel,
        attribution: Attribution,
        method: AttributionMethod | None = None,
    ) -> float | None:
        """The number, or None where it cannot be had.

        Args:
            model: The network seen through the target that was explained: ``model(volumes)`` gives
                the score of each volume ``b c i j k`` of a batch; in eval mode, with a seeded RNG,
                and everything is restored behind it.
            attribution: The map, on the CPU; finite and not zero everywhere.
            method: What made the map, to be asked again; None where that is not known.
        """

    @abstractmethod
    def passes(self, shape: Shape, windows: int, method: AttributionMethod | None = None) -> Passes:
        """Windows that go through the network for one map.

        Args:
            shape: Voxels of the volume.
            windows: Number of windows that cover it.
            method: What made the map.
        """


def known(metric: FaithfulnessMetric, method: AttributionMethod | None) -> AttributionMethod:
    """The method that made a map, for a metric that asks it again.

    Raises:
        UnsupportedError: where it is not known.
    """
    if method is None:
        raise UnsupportedError(
            f"`{type(metric).__name__}` explains the network again, but the method of the map is "
            "not known. Give `methods=` as it was given to `examine`."
        )
    return method


def explained(model: ScoredModel, method: AttributionMethod, x: Volume) -> Map:
    """The method's map of a volume, in the unit of `Attribution.values`, on the CPU."""
    # somebody's code, and as `explain` runs it: the same noise each time
    with undisturbed(model.predictor.module, model.seed):
        made = values_of(method.attribute(model, x)).detach()
    return (made / (model.voxels if method.shares_score else 1)).cpu()


def volume(model: ScoredModel) -> Volume:
    """The probe's volume where the network is."""
    return model.probe.image.detach().to(model.predictor.device)


def veiled(model: ScoredModel, baseline: Blank, sigma_mm: float) -> Veil:
    """The probe's volume where the network is, with a baseline behind it."""
    return Veil.of(model, volume(model), baseline, sigma_mm)


def together(model: ScoredModel) -> int:
    """How many perturbed volumes are made and scored at once.

    As many as fill a pass with their windows: more would be held, and go through no faster.
    """
    places = model.windows.places
    return max(1, model.predictor.batch(places[0]) // len(places))
