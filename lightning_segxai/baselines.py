"""Baselines: the volume that "nothing to see here" looks like, for paths and perturbations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from scipy import ndimage
from torch import Tensor

from lightning_segxai.values import Volume

Blank = Literal["blurred", "noise", "minimum", "zero"] | float
"""How a user names a baseline: a kind, or the number that fills it."""

_KINDS = get_args(get_args(Blank)[0])


@dataclass(frozen=True)
class Baseline:
    """A recipe for a volume without the evidence; it belongs to whole volumes, never to windows.

    Every choice is blind to something. A constant one (``minimum``, ``zero``, a number) is blind to
    evidence at its own value and has no variance, so that instance and group norms divide by almost
    nothing there; ``noise`` adds chance; ``blurred`` is blind to what is smoother than its width.

    Args:
        blank: ``blurred``: the volume under a Gaussian; ``noise``: normal noise of each channel's
            mean and standard deviation; ``minimum``: each channel's smallest value; ``zero``; or a
            number that fills the volume.
        sigma_mm: Standard deviation of the Gaussian in millimetres.

    Raises:
        ValueError: for another word, or a width that is not positive.

    References:
        Sturmfels et al., "Visualizing the impact of feature attribution baselines", Distill, 2020.
    """

    blank: Blank = "blurred"
    sigma_mm: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.blank, str) and self.blank not in _KINDS:
            raise ValueError(
                f"`baseline={self.blank!r}` must be one of {', '.join(_KINDS)}, or a number."
            )
        if not self.sigma_mm > 0:
            raise ValueError(f"`sigma_mm` must be positive, but got {self.sigma_mm}.")

    def make(
        self, x: Volume, spacing_mm: tuple[float, float, float], generator: torch.Generator
    ) -> Volume:
        """The baseline of a volume.

        Args:
            x: The volume.
            spacing_mm: Edge lengths of a voxel in millimetres.
            generator: A CPU generator for the noise, so that it is the same on every device.
        """
        if self.blank == "blurred":
            sigma = [0.0, *(self.sigma_mm / edge for edge in spacing_mm)]
            blurred = ndimage.gaussian_filter(x.detach().cpu().numpy(), sigma, mode="nearest")
            return torch.from_numpy(blurred).to(x)
        if self.blank == "noise":
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
            return _each(x.mean(dim=(1, 2, 3))) + _each(x.std(dim=(1, 2, 3))) * noise
        if self.blank == "minimum":
            return _each(x.amin(dim=(1, 2, 3))).expand_as(x)
        return torch.full_like(x, 0.0 if self.blank == "zero" else float(self.blank))


def _each(of_channels: Tensor) -> Tensor:
    return of_channels[:, None, None, None]
