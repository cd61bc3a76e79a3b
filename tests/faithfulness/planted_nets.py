"""Trained networks and volumes of a planted cause, made once for all tests of a process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from lightning_segxai.values import Probe

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

from planted_training import HELD_OUT, RECIPES, Kind, held_out, overlap, trained


@dataclass(frozen=True, eq=False)
class PlantedCase:
    """A network that was trained to decide by the cause, and a volume it has not seen.

    Args:
        net: In eval mode; half a second of training for spots, two for tubes.
        probe: Its region ``cause`` holds the voxels that decide; tubes lie beside a band.
    """

    net: nn.Module
    probe: Probe


@cache
def planted_case(kind: Kind, seed: int) -> PlantedCase:
    """The case of a seed: ``spots``, ``control`` or ``shortcut``. Do not change its network."""
    return PlantedCase(trained(kind, seed), held_out(kind, seed))


def held_out_dice(kind: Kind, seed: int) -> float:
    """Of the case's network on six volumes it has not seen, half of the tubes beside a band."""
    volumes = [RECIPES[kind].make(HELD_OUT + 100 + n, n % 2 == 0) for n in range(6)]
    return overlap(planted_case(kind, seed).net, volumes)
