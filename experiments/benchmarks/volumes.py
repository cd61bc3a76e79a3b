"""The volumes of the benchmarks: smooth seeded noise with a labeled cube, z-scored or in [0, 1]."""

from __future__ import annotations

import torch
from scipy import ndimage

from lightning_segxai import Probe

SCALES = ("z-scored", "[0, 1]")


def probe(size: int = 32, scale: str = "z-scored", seed: int = 0) -> Probe:
    """A cube of so many voxels along each axis, in float64; a fifth of each axis is labeled."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, size, generator=generator).numpy()
    image = torch.from_numpy(ndimage.gaussian_filter(noise, 2.0)).double()[None]
    if scale == "z-scored":
        image = (image - image.mean()) / image.std()
    else:
        image = (image - image.min()) / (image.max() - image.min())
    label = torch.zeros(size, size, size, dtype=torch.long)
    label[(slice(size // 3, size // 3 + size // 5),) * 3] = 1
    return Probe("cube", image, label)
