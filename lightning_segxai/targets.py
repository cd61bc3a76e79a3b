"""Targets: what of a segmentation is explained, as a fixed weight for every logit.

A network says a whole volume of logits; an explanation needs one number. A target gives each logit
a weight, fixed on the unperturbed volume, and the score is ``(weights * logits).sum()``. Sum, not
mean: a mean under float16 autocast zeroes the gradient of large volumes. Logits, not
probabilities: these saturate. The region never moves while a method perturbs the input, so
completeness and linearity hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_segxai.values import Logits, Mask, Probe, UnsupportedError

Region = Literal[
    "truth", "predicted", "true_positive", "false_positive", "false_negative", "everywhere"
]


class Target(ABC):
    """A weight for every logit of a volume. A subclass is a frozen dataclass."""

    @abstractmethod
    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        """The weights, on the device of ``logits``; all zero where there is nothing to explain.

        Args:
            probe: The volume that is explained.
            logits: The network's logits of the unperturbed volume, with one channel for each class,
                background first; the decision is their argmax. A sigmoid network's background
                is a channel of zeros.
        """


def voxels(weights: Float[Tensor, "classes i j k"]) -> Mask:
    """The region of a target: the voxels that have a weight."""
    return (weights != 0).any(dim=0)


@dataclass(frozen=True)
class ClassEvidence(Target):
    """The summed logits of one class over a region: what speaks for the class there.

    Args:
        label: The class.
        region: Where. ``truth``: the voxels of this class in the probe's label, the same at every
            epoch, so that a change is the network's; ``predicted``: where the network says this
            class; ``true_positive``, ``false_positive``, ``false_negative``: where the two agree
            or do not; ``everywhere``: the whole volume. On a probe without a label ``truth``
            means ``predicted``.

    Raises:
        ValueError: if the network has no such class.
        UnsupportedError: for a region that compares with a label on a probe that has none.
    """

    label: int = 1
    region: Region = "truth"

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        region = class_region(self, self.label, self.region, probe, logits)
        return summed(self.label, region, logits)


@dataclass(frozen=True)
class ClassMargin(Target):
    """The logit of one class minus that of another: what speaks for the one against the other.

    Args:
        label: The class that is spoken for.
        versus: The class that it is held against.
        region: Where, as for `ClassEvidence`, of the class ``label``.

    Raises:
        ValueError: if the two classes are one, or the network lacks one of them.
        UnsupportedError: for a region that compares with a label on a probe that has none.
    """

    label: int = 1
    versus: int = 0
    region: Region = "truth"

    def __post_init__(self) -> None:
        if self.label == self.versus:
            raise ValueError(
                f"`ClassMargin` needs two different classes, but both are {self.label}."
            )

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        check_class(self, self.versus, logits)
        region = class_region(self, self.label, self.region, probe, logits).to(logits.dtype)
        weights = torch.zeros_like(logits)
        weights[self.label] = region
        weights[self.versus] = -region
        return weights


@dataclass(frozen=True)
class VoxelEvidence(Target):
    """The logit of one class at one voxel: what the decision at that place rests on.

    Args:
        ijk: Voxel indices in the probe.
        label: The class.

    Raises:
        ValueError: if the voxel lies outside the probe, or the network has no such class.
    """

    ijk: tuple[int, int, int]
    label: int = 1

    def weights(self, probe: Probe, logits: Logits) -> Float[Tensor, "classes i j k"]:
        check_class(self, self.label, logits)
        if not all(0 <= at < size for at, size in zip(self.ijk, probe.shape, strict=True)):
            raise ValueError(
                f'`{self}` lies outside probe "{probe.name}" of {tuple(probe.shape)} voxels.'
            )
        weights = torch.zeros_like(logits)
        weights[(self.label, *self.ijk)] = 1
        return weights


def check_class(who: Target, label: int, logits: Logits) -> None:
    """Raise a ValueError unless the network has the class."""
    if not 0 <= label < len(logits):
        raise ValueError(
            f"`{who}` needs a network with a class {label}, but its classes are "
            f"0 to {len(logits) - 1}."
        )


def summed(label: int, region: Mask, logits: Logits) -> Float[Tensor, "classes i j k"]:
    """Weights that sum the logits of one class over a region, on the device of ``logits``."""
    weights = torch.zeros_like(logits)
    weights[label] = region.to(weights)
    return weights


def true_region(who: Target, label: int, probe: Probe) -> Mask:
    """The voxels of a class in the probe's label; an UnsupportedError where there is none."""
    if probe.label is None:
        raise UnsupportedError(
            f'`{who}` needs a label, but probe "{probe.name}" has none. '
            "Give it one, or explain what is predicted."
        )
    return probe.label == label


def class_region(
    who: Target, label: int, region: Region, probe: Probe, logits: Logits
) -> Bool[Tensor, "i j k"]:
    """The voxels that a region's name means for a class, as `ClassEvidence` documents."""
    predicted = logits.argmax(dim=0) == label
    if region == "everywhere":
        return torch.ones_like(predicted)
    if region == "predicted" or (region == "truth" and probe.label is None):
        return predicted
    truth = true_region(who, label, probe).to(logits.device)
    if region == "truth":
        return truth
    if region == "true_positive":
        return truth & predicted
    if region == "false_positive":
        return predicted & ~truth
    if region == "false_negative":
        return truth & ~predicted
    raise ValueError(f"`{who}`: no region is named {region!r}; use one of {get_args(Region)}.")
