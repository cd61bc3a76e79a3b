"""What an attribution method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_segxai.passes import Look, walk
from lightning_segxai.rules.interception import Rule
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.trajectories import Here, Trajectory
from lightning_segxai.values import Logits, Map, Shape, Volume


@dataclass(frozen=True, eq=False)
class Complete:
    """A map whose sum should be the score minus where it started: the completeness axiom.

    Args:
        values: The map.
        start: The score without the evidence: of the baseline, or 0 for what conserves the score.
    """

    values: Map
    start: float


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
    def attribute(self, model: ScoredModel, x: Volume) -> Map | Complete:
        """The map of ``x``, channels summed, not divided by anything.

        Args:
            model: ``model(volumes)`` gives the score of each volume ``b c i j k`` of a batch, and
                is differentiable; ``model.probe`` is the probe.
            x: The volume to explain.

        Returns:
            The map; a `Complete` one where the method has the axiom, so that the error is reported.
        """

    @property
    def parts(self) -> tuple[LookMethod, ...]:
        """The methods that fold looks, of whose maps it is made; none for one that walks alone."""
        return ()

    def join(self, model: ScoredModel, x: Volume, maps: Sequence[Map | Complete]) -> Map | Complete:
        """The map of ``x``, from those of the parts."""
        return maps[0]

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """Windows that the method itself sends through, for a volume, beyond the looks it shares.

        Args:
            shape: Voxels of the volume.
            windows: Number of windows that cover it.
        """
        return Passes()

    def passes_alone(self, shape: Shape, windows: int) -> Passes:
        """Windows that `attribute` sends through: those of its own, and the looks of its parts."""
        own = self.extra_passes(shape, windows)
        passes = Passes(own.forward, own.backward)
        for part in self.parts:
            if part.trajectory is not None:
                rows = windows * (2 if part.rule is not None and part.rule.partner else 1)
                passes.forward += rows * (part.trajectory.count + part.trajectory.ends)
                passes.backward += rows * part.trajectory.count
        return passes


class LookMethod(AttributionMethod):
    """A method that folds looks, and so shares its passes with all others on its trajectory.

    A subclass writes `start`, `update` and `finish`, and names another `trajectory`, `rule` or
    `layers` where it needs them.
    """

    @property
    def trajectory(self) -> Trajectory | None:
        """Where to look; None if it cannot be said by one, and `attribute` does it all."""
        return Here()

    @property
    def rule(self) -> Rule | None:
        """How some functions run backward; None for the gradient."""
        return None

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
    def finish(self, model: ScoredModel, x: Volume, state: Any) -> Map | Complete:
        """The map of ``x``, from the looks at all windows of all points."""

    @property
    def parts(self) -> tuple[LookMethod, ...]:
        """Itself."""
        return () if self.trajectory is None else (self,)

    def attribute(self, model: ScoredModel, x: Volume) -> Map | Complete:
        """The map of ``x``, by passes of its own."""
        return self.finish(model, x, self.looked(model, x))

    def looked(self, model: ScoredModel, x: Volume) -> Any:
        """The state after a walk of its own."""
        assert self.trajectory is not None
        fold = MapInMaking(self, model, self.start(model, x))

        def aim(_: Logits) -> list[MapInMaking]:
            return [fold]

        walk(
            model.predictor,
            model.probe,
            x,
            self.trajectory,
            self.rule,
            self.layers,
            aim,
            model.generator(),
        )
        return fold.state


class JointMethod(AttributionMethod):
    """A method whose map is joined from those of several that fold looks."""

    def attribute(self, model: ScoredModel, x: Volume) -> Map | Complete:
        """The map of ``x``, by passes of its own."""
        return self.join(model, x, [part.attribute(model, x) for part in self.parts])


@dataclass(frozen=True, eq=False)
class MapInMaking:
    """A method's state while the passes go on."""

    method: LookMethod
    model: ScoredModel
    state: Any

    def see(self, look: Look) -> None:
        """Fold one look in."""
        self.method.update(self.state, look)


def values_of(made: Map | Complete) -> Map:
    """The map itself, complete or not."""
    return made.values if isinstance(made, Complete) else made
