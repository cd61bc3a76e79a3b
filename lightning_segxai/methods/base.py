"""What an attribution method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning_segxai.baselines import Baseline
from lightning_segxai.passes import Here, Look, Trajectory, walk
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Logits, Map, Shape, Volume


class AttributionMethod(ABC):
    """Turns a network, seen through a target, into a map of what mattered.

    A subclass is a frozen dataclass whose fields are its hyper-parameters. `attribute` is all that
    it must write; the model is in eval mode, with gradients enabled and a seeded RNG, and
    everything is restored behind it.
    """

    @property
    def unit(self) -> str:
        """Unit of the map once it is divided by the voxels of the target's region."""
        return "logit"

    @property
    def shares_score(self) -> bool:
        """Whether the map distributes the score, and is divided by the voxels of the region."""
        return True

    @property
    def layer(self) -> str:
        """The layer that is explained, as the user names it; empty for the input."""
        return ""

    @abstractmethod
    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``, channels summed, not divided by anything.

        Args:
            model: ``model(volumes)`` gives the score of each volume ``b c i j k`` of a batch, and
                is differentiable; ``model.probe`` is the probe.
            x: The volume to explain.
        """

    @property
    def reference(self) -> Baseline | None:
        """The baseline to whose score the map's sum is the difference: the completeness axiom.

        None for a method without the axiom.
        """
        return None

    def extra_passes(self, shape: Shape, windows: int) -> int:
        """Windows sent forward by the method itself for a volume, beyond the looks it shares.

        Args:
            shape: Voxels of the volume.
            windows: Number of windows that cover it.
        """
        return 0


class LookMethod(AttributionMethod):
    """A method that folds looks, and so shares its passes with all others on its trajectory.

    A subclass writes `start`, `update` and `finish`, and names another `trajectory` or `layers`
    where it needs them.
    """

    @property
    def trajectory(self) -> Trajectory | None:
        """Where to look; None if it cannot be said by one, and `attribute` does it all."""
        return Here()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers to tap."""
        return (self.layer,) if self.layer else ()

    @abstractmethod
    def start(self, model: ScoredModel, x: Volume) -> Any:
        """An empty state for explaining ``x``."""

    @abstractmethod
    def update(self, state: Any, look: Look) -> None:
        """Fold one window of one point into the state."""

    @abstractmethod
    def finish(self, model: ScoredModel, x: Volume, state: Any) -> Map:
        """The map of ``x``, from the looks at all windows of all points."""

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``, by passes of its own."""
        assert self.trajectory is not None
        fold = MapInMaking(self, model, self.start(model, x))

        def aim(_: Logits) -> list[MapInMaking]:
            return [fold]

        walk(model.predictor, model.probe, x, self.trajectory, self.layers, aim, model.generator())
        return self.finish(model, x, fold.state)


@dataclass(frozen=True, eq=False)
class MapInMaking:
    """A method's state while the passes go on."""

    method: LookMethod
    model: ScoredModel
    state: Any

    def see(self, look: Look) -> None:
        """Fold one look in."""
        self.method.update(self.state, look)
