"""Small networks trained on volumes with a planted cause: seconds each, and equal for equal seeds.

`planted.py` and the tests hold the methods against them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_segxai import FocalTverskyLoss, Planted, Probe, planted_spots, planted_tubes

Kind = Literal["spots", "control", "shortcut"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PAIRS = 24
"""Pairs of training volumes; those of a pair differ in the band alone, or, of spots, altogether."""
HELD_OUT = 1_000_000
"""From this seed on, volumes are not trained on."""


class TwoScales(nn.Module):
    """A fine path, a coarse one that sees far, and what joins them; no norms, logits of class 1."""

    def __init__(self, channels: int = 6, pool: int = 2) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.LeakyReLU(0.1))
        self.coarse = nn.Sequential(
            nn.Conv3d(channels, 2 * channels, pool, stride=pool),
            nn.LeakyReLU(0.1),
            nn.Conv3d(2 * channels, 2 * channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv3d(2 * channels, 2 * channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Upsample(scale_factor=pool),
        )
        self.join = nn.Sequential(
            nn.Conv3d(3 * channels, channels, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv3d(channels, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        logits: Tensor = self.join(torch.cat([fine, self.coarse(fine)], dim=1))
        return logits


@dataclass(frozen=True)
class Recipe:
    """How a kind of volume is made, and how many steps of training it takes.

    Args:
        make: The volume of a seed, with a band or not.
        steps: Steps of Adam, each on one pair.
    """

    make: Callable[[int, bool], Planted]
    steps: int


def _tubes(arm: Literal["control", "shortcut"]) -> Callable[[int, bool], Planted]:
    return lambda seed, band: planted_tubes(arm, (12, 12, 20), seed=seed, tubes=2, band=band)


RECIPES: dict[Kind, Recipe] = {
    "spots": Recipe(lambda seed, band: planted_spots((12, 12, 12), seed=2 * seed + band), 100),
    "control": Recipe(_tubes("control"), 100),
    "shortcut": Recipe(_tubes("shortcut"), 200),
}


def trained(kind: Kind, seed: int) -> nn.Module:
    """The network of that seed, in eval mode; it was trained on volumes of its own."""
    recipe = RECIPES[kind]
    own = range(seed * PAIRS, (seed + 1) * PAIRS)
    x, y = batch([recipe.make(n, band) for n in own for band in (False, True)])
    chosen = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TwoScales()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=recipe.steps)
    dice = FocalTverskyLoss(0.5, 0.5, 1.0)
    for _ in range(recipe.steps):
        first = 2 * int(torch.randint(PAIRS, (1,), generator=chosen))
        image, label = x[first : first + 2], y[first : first + 2]
        logits = net(image)
        # never quite sure: logits stay small, and gradients clear of the slow subnormal numbers
        sure = label.float().clamp(0.01, 0.99)
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], sure)
        loss = dice(logits, label) + entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def batch(volumes: list[Planted]) -> tuple[Tensor, Tensor]:
    """Images ``b 1 i j k`` and labels ``b i j k``."""
    images = [torch.from_numpy(volume.image)[None] for volume in volumes]
    return torch.stack(images), torch.stack([torch.from_numpy(v.label).long() for v in volumes])


def held_out(kind: Kind, seed: int) -> Probe:
    """A volume that no network was trained on, with something to find; tubes have a band."""
    return RECIPES[kind].make(HELD_OUT + seed, True).probe(f"{kind}-{seed:02d}")


def overlap(net: nn.Module, volumes: list[Planted]) -> float:
    """Dice over all voxels of the volumes together."""
    x, y = batch(volumes)
    with torch.no_grad():
        found = net(x)[:, 0] > 0
    both = (found & (y > 0)).sum()
    return float(2 * both / (found.sum() + (y > 0).sum()))
