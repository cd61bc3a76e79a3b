"""Hiding parts of a volume: what stands in their place, and the score of what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lightning_segxai.baselines import Baseline, Blank
from lightning_segxai.scored import ScoredModel
from lightning_segxai.values import Volume

PerPass = int | Literal["auto"]
"""How many perturbed volumes are made and scored at once."""


@dataclass(frozen=True, eq=False)
class Veil:
    """A volume, and the one that shows where parts of it are hidden.

    Args:
        model: The network.
        x: The volume.
        behind: What shows where the volume is hidden.
    """

    model: ScoredModel
    x: Volume
    behind: Volume

    @classmethod
    def of(cls, model: ScoredModel, x: Volume, baseline: Blank, sigma_mm: float) -> Veil:
        """With a baseline behind."""
        recipe = Baseline(baseline, sigma_mm)
        return cls(model, x, recipe.make(x, model.probe.spacing_mm, model.generator()))

    @torch.no_grad()
    def score(self, kept: Shaped[Tensor, "b i j k"]) -> Float[Tensor, " b"]:
        """The score of the volume under masks: 1 keeps a voxel, 0 hides it, in all channels."""
        return self.model(self.shown(kept))

    def shown(self, kept: Shaped[Tensor, "b i j k"]) -> Float[Tensor, "b c i j k"]:
        """The volume under each of the masks."""
        kept = kept[:, None].to(self.x.dtype)
        return kept * self.x + (1 - kept) * self.behind

    def per_pass(self, wanted: PerPass) -> int:
        """How many volumes go together; ``auto`` as many as windows would."""
        if wanted != "auto":
            return wanted
        return self.model.predictor.batch(self.model.windows.places[0])


def check_counts(method: object, **counts: int | str) -> None:
    """Refuse a count below one, and any word but ``auto`` for the volumes of a pass.

    Raises:
        ValueError: saying which.
    """
    for name, count in counts.items():
        if name == "perturbations_per_pass" and count == "auto":
            continue
        if not isinstance(count, int) or count < 1:
            or_auto = ' or "auto"' if name == "perturbations_per_pass" else ""
            raise ValueError(
                f"`{type(method).__name__}({name}={count!r})` must be at least 1{or_auto}."
            )
