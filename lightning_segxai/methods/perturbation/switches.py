"""Supervoxels as switches: what Captum is given in place of the volume."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.methods.base import AttributionMethod
from lightning_segxai.methods.hiding import PerPass, Veil, check_counts
from lightning_segxai.methods.supervoxels import per_voxel, supervoxels
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True, eq=False)
class Switches:
    """The score as a function of which supervoxels are there: 1 there, 0 hidden.

    Captum sees one number for each supervoxel, and no volume: on a mask of the volume it walks
    through all voxels in Python for each permutation (0.9, `ShapleyValueSampling`), and holds one
    for each perturbation.

    Args:
        veil: The volume, and what stands behind it.
        numbers: The supervoxel of each voxel.
    """

    veil: Veil
    numbers: Int[Tensor, "i j k"]

    def __call__(self, on: Float[Tensor, "b regions"]) -> Float[Tensor, " b"]:
        """The score of each setting of the switches."""
        return self.veil.score(on[:, self.numbers])

    @property
    def all_on(self) -> Float[Tensor, "1 regions"]:
        """The volume itself."""
        return self.veil.x.new_ones(1, int(self.numbers.max()) + 1)

    def map(self, effects: Float[Tensor, "1 regions"]) -> Map:
        """The effect of each supervoxel, shared out evenly over its voxels."""
        return per_voxel(effects[0].to(self.veil.x.dtype), self.numbers)


class SupervoxelMethod(AttributionMethod):
    """A method that says what each supervoxel does to the score."""

    @property
    @abstractmethod
    def supervoxels(self) -> int:
        """The number wanted; a field of the subclass, like all below."""

    @property
    @abstractmethod
    def compactness(self) -> float:
        """How much place counts against intensity."""

    @property
    @abstractmethod
    def perturbations_per_pass(self) -> PerPass:
        """How many perturbed volumes go together."""

    def cut(self, model: ScoredModel) -> Int[Tensor, "i j k"]:
        """The supervoxel of each voxel: of the probe, whatever noise a copy has."""
        probe = model.probe
        numbers = supervoxels(probe.image, probe.spacing_mm, self.supervoxels, self.compactness)
        return numbers.to(model.predictor.device)

    def most(self, shape: Shape) -> int:
        """The most supervoxels that there can be."""
        return min(self.supervoxels, math.prod(shape))

    def check(self, **counts: int) -> None:
        """Refuse settings that all such methods refuse.

        Args:
            counts: The method's own numbers of what must be there at least once.
        """
        check_counts(
            self,
            supervoxels=self.supervoxels,
            perturbations_per_pass=self.perturbations_per_pass,
            **counts,
        )
        if not 0 < self.compactness < math.inf:
            raise ValueError(
                f"`{type(self).__name__}(compactness={self.compactness})` must be positive."
            )


class HidingMethod(SupervoxelMethod):
    """... when it is replaced by the baseline."""

    @property
    @abstractmethod
    def baseline(self) -> Blank:
        """What hides."""

    @property
    @abstractmethod
    def sigma_mm(self) -> float:
        """Standard deviation of the blur in millimeters."""

    def switches(self, model: ScoredModel, x: Volume) -> Switches:
        """The supervoxels of the volume, with the baseline behind."""
        return Switches(Veil.of(model, x, self.baseline, self.sigma_mm), self.cut(model))

    def check(self, **counts: int) -> None:
        """... and an unknown baseline."""
        super().check(**counts)
        Baseline(self.baseline, self.sigma_mm)
