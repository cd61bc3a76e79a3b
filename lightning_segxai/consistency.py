"""Deformation-aware learning of DS6: a network must answer a deformed volume as it deforms it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_segxai.deformations import SplineDeformation, warp
from lightning_segxai.losses import FocalTverskyLoss, finest, foreground
from lightning_segxai.values import Shape


@dataclass(frozen=True)
class DeformationConsistency:
    r"""Trains on a deformed copy of each batch, and for predictions that deform with the volume.

    $$L = \ell(f(x), y) + \ell(f(Tx), Ty) + w \, FTL(p(Tx), T p(x))$$

    with one random deformation T for the batch, the task's loss $\ell$ and the foreground
    probabilities $p$ of the first output of full resolution. The last term needs no label. It is
    logged, without its weight, as ``train_consistency``, and is least where both predictions are
    the same and sure. As in DS6 neither side is detached: the network moves both predictions
    towards each other. A step costs two passes through the network and up to three warps, so
    about twice the time and memory.

    It differs from DS6 in two points. Ty takes for each voxel the class of the nearest one, so that
    any loss of class indices can be used; DS6 warps y linearly, to fractions (cut at 1/2 they
    would lose 9 % of thin vessels). With DS6's small deformations Ty is therefore next to always y.
    And DS6's published code compares p(Tx) to the warped logits; here, as in the paper, both are
    probabilities.

    Args:
        deformation: What T is drawn from.
        loss: Compares p(Tx), as what was found, to T p(x), as the truth; without one, focal Tversky
            as in DS6.
        weight: Of the last term.
        seed: Of the deformations. Each depends on it, the epoch, the batch and the rank alone, so
            that a resumed training sees the same ones, and the run's own random numbers are left.

    Raises:
        ValueError: for a negative weight or seed.

    References:
        Chatterjee et al., "DS6, Deformation-Aware Semi-Supervised Learning: Application to Small
        Vessel Segmentation with Noisy Training Data", J. Imaging 8(10):259, 2022.
    """

    deformation: SplineDeformation = field(default_factory=SplineDeformation)
    loss: FocalTverskyLoss | None = None
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.weight >= 0 or self.seed < 0:
            raise ValueError(
                f"`DeformationConsistency(weight={self.weight}, seed={self.seed})` needs both to "
                "be at least 0."
            )

    def draw(self, shape: Shape, step: tuple[int, int, int]) -> Float[Tensor, "3 i j k"]:
        """The displacements of one step, see `SplineDeformation.draw`; on the CPU.

        Args:
            shape: Voxels of the volumes.
            step: Epoch, batch and rank.
        """
        [state] = np.random.SeedSequence((self.seed, *step)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return self.deformation.draw(shape, generator)

    def terms(
        self,
        net: nn.Module,
        loss: nn.Module,
        image: Float[Tensor, "b c i j k"],
        label: Int[Tensor, "b 1 i j k"],
        outputs: Any,
        step: tuple[int, int, int],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of the deformed batch, and how much the two predictions differ.

        Args:
            net: Gives logits of the deformed volumes.
            loss: The task's.
            image: The volumes as they are.
            label: Their classes.
            outputs: What the network returned for them.
            step: Epoch, batch and rank.
        """
        shape = (image.shape[2], image.shape[3], image.shape[4])
        moved = self.draw(shape, step).to(image.device)
        deformed = net(warp(image, moved))
        supervised = loss(deformed, warp(label, moved, "nearest"))
        found = foreground(finest(deformed, shape, net))
        truth = warp(foreground(finest(outputs, shape, net)), moved)
        compare = FocalTverskyLoss() if self.loss is None else self.loss
        return supervised, compare.between(found, truth)
