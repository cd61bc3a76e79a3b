"""Supervoxels taken away one at a time: for the baseline, or for voxels from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from captum.attr import FeatureAblation as CaptumFeatureAblation
from jaxtyping import Float, Int
from torch import Tensor

from lightning_segxai.baselines import Blank
from lightning_segxai.methods.hiding import PerPass, Veil
from lightning_segxai.methods.perturbation.switches import (
    HidingMethod,
    SupervoxelMethod,
    Switches,
)
from lightning_segxai.scored import Passes, ScoredModel
from lightning_segxai.values import Map, Shape, Volume


@dataclass(frozen=True)
class FeatureAblation(HidingMethod):
    r"""How far the score falls when a supervoxel is replaced by the baseline.

    $$a(v) = \frac{1}{|P|} \big( S(x) - S(x_{P \to b}) \big), \quad v \in P$$

    The effect is the supervoxel's, and shared out evenly over its voxels: the map's sum is the sum
    of the effects. With supervoxels of one voxel and a linear network it is the input minus the
    baseline, times the weights; what needs several supervoxels at once to change is missing, or
    counted for each. Costs one forward pass for each supervoxel, of which there are at most as many
    as asked for, and one for the volume; by Captum, on SLIC's supervoxels of the probe.

    Args:
        supervoxels: Number of supervoxels that is asked for.
        compactness: Difference of intensity, as a fraction of the probe's range, that counts as
            much as the distance from one supervoxel to the next: small ones follow edges, large
            ones are cubes.
        baseline: What hides, as for `IntegratedGradients`.
        sigma_mm: Standard deviation of the blur in millimeters.
        perturbations_per_pass: Perturbed volumes that are made and scored at once; ``auto``: as
            many as windows go through the network at once.

    Raises:
        ValueError: for less than one supervoxel or perturbation per pass, a compactness or width
            that is not positive, an unknown baseline.

    References:
        Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2013,
        arXiv:1311.2901; of supervoxels as in Captum. Achanta et al., "SLIC superpixels compared to
        state-of-the-art superpixel methods", IEEE TPAMI 34, 2012.
    """

    supervoxels: int = 64
    compactness: float = 0.1
    baseline: Blank = "blurred"
    sigma_mm: float = 5.0
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        self.check()

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        switches = self.switches(model, x)
        return switches.map(_effects(switches, self.perturbations_per_pass))

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The supervoxels and the volume itself; less where SLIC finds fewer."""
        return Passes((self.most(shape) + 1) * windows)


@dataclass(frozen=True)
class FeaturePermutation(SupervoxelMethod):
    r"""How far the score falls when a supervoxel is filled with voxels from the rest of the volume.

    $$a(v) = \frac{1}{|P|} \big( S(x) - \mathbb E\, S(x_{P \to \pi(x)}) \big), \quad v \in P$$

    where the voxels ``π(x)`` are drawn from outside the supervoxel, all channels of a voxel
    together: without replacement where there are enough, and from the supervoxel itself where it is
    the whole volume. Nothing is changed that a histogram of the volume would show, and no baseline
    is chosen; the noise that fills a supervoxel is no image, though. On a constant volume it is 0.
    Shared out as for `FeatureAblation`, with which it agrees where the baseline is what is drawn.
    Costs ``samples`` times one forward pass for each supervoxel, of which there are at most as many
    as asked for, and one for the volume; by Captum.

    Args:
        supervoxels: Number of supervoxels that is asked for.
        compactness: Difference of intensity that counts as much as distance, as for
            `FeatureAblation`.
        samples: Number of draws that are averaged.
        perturbations_per_pass: Perturbed volumes that are made and scored at once, or ``auto``.

    Raises:
        ValueError: for less than one supervoxel, draw or perturbation per pass, a compactness that
            is not positive.

    References:
        Breiman, "Random forests", Machine Learning 45, 2001; Fisher et al., "All models are wrong,
        but many are useful", 2018, arXiv:1801.01489. There, values come from other cases; a probe
        is alone, and they come from its other places.
    """

    supervoxels: int = 64
    compactness: float = 0.1
    samples: int = 4
    perturbations_per_pass: PerPass = "auto"

    def __post_init__(self) -> None:
        self.check(samples=self.samples)

    def attribute(self, model: ScoredModel, x: Volume) -> Map:
        """The map of ``x``."""
        # Captum's FeaturePermutation skips batches of one, whatever its perm_func (0.9); what it
        # does is ablation by a baseline that is drawn.
        numbers, generator = self.cut(model), model.generator()
        maps = []
        for _ in range(self.samples):
            switches = Switches(Veil(model, x, drawn(x, numbers, generator)), numbers)
            maps.append(switches.map(_effects(switches, self.perturbations_per_pass)))
        return torch.stack(maps).mean(dim=0)

    def extra_passes(self, shape: Shape, windows: int) -> Passes:
        """The supervoxels and the volume itself, for each draw; less where SLIC finds fewer."""
        return Passes(self.samples * (self.most(shape) + 1) * windows)


def drawn(x: Volume, numbers: Int[Tensor, "i j k"], generator: torch.Generator) -> Volume:
    """Each voxel replaced by one from outside its supervoxel, none of them twice if possible."""
    order = torch.randperm(numbers.numel(), generator=generator).to(x.device)
    numbers = numbers.flatten()
    source = torch.empty_like(order)
    for region, size in enumerate(torch.bincount(numbers).tolist()):
        outside = order[numbers[order] != region]
        outside = outside if len(outside) else order
        source[numbers == region] = outside.repeat(-(-size // len(outside)))[:size]
    return x.flatten(1)[:, source].reshape(x.shape)


def _effects(switches: Switches, per_pass: PerPass) -> Float[Tensor, "1 regions"]:
    """How far the score falls with each supervoxel alone switched off."""
    effects: Tensor = CaptumFeatureAblation(switches).attribute(
        switches.all_on,
        perturbations_per_eval=switches.veil.per_pass(per_pass),
        show_progress=False,
    )
    return effects
