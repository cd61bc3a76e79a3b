"""Baselines: the volume that "nothing to see here" looks like, for paths and perturbations."""

from __future__ import annotations

import math
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
        sigma_mm: Standard deviation of the Gaussian in millimeters.
        draw: Which of several noises.

    Raises:
        ValueError: for another word, a volume, or a width that is not positive.

    References:
        Sturmfels et al., "Visualizing the impact of feature attribution baselines", Distill, 2020.
    """

    blank: Blank = "blurred"
    sigma_mm: float = 5.0
    draw: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.blank, str | int | float) or (
            isinstance(self.blank, str) and self.blank not in _KINDS
        ):
            given = getattr(self.blank, "shape", None)
            what = f"a volume of {tuple(given)}" if given is not None else repr(self.blank)
            raise ValueError(
                f"`baseline` must be one of {', '.join(_KINDS)}, or a number that fills a volume "
                f"of any shape, but got {what}."
            )
        if not isinstance(self.blank, str) and not math.isfinite(self.blank):
            raise ValueError(f"`baseline={self.blank}` must be a finite number.")
        if self.draw < 0:
            raise ValueError(f"`Baseline(draw={self.draw})` must not be negative.")
        if not self.sigma_mm > 0:
            raise ValueError(f"`sigma_mm` must be positive, but got {self.sigma_mm}.")

    def make(
        self, x: Volume, spacing_mm: tuple[float, float, float], generator: torch.Generator
    ) -> Volume:
        """The baseline of a volume.

        Args:
            x: The volume.
            spacing_mm: Edge lengths of a voxel in millimeters.
            generator: A CPU generator for the noise, so that it is the same on every device.
        """
        if self.blank == "blurred":
            sigma = [0.0, *(self.sigma_mm / edge for edge in spacing_mm)]
            blurred = ndimage.gaussian_filter(x.detach().cpu().numpy(), sigma, mode="nearest")
            return torch.from_numpy(blurred).to(x)
        if self.blank == "noise":
            for _ in range(self.draw + 1):
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
            return _each(x.mean(dim=(1, 2, 3))) + _each(x.std(dim=(1, 2, 3))) * noise
        if self.blank == "minimum":
            return _each(x.amin(dim=(1, 2, 3))).expand_as(x)
        return torch.full_like(x, 0.0 if self.blank == "zero" else float(self.blank))


def draws(count: int, sigma_mm: float) -> tuple[Baseline, ...]:
    """A small distribution of baselines: blurred ones of several widths, and noises, in turn.

    The widths are powers of two around ``sigma_mm``. It is the same at every epoch.

    >>> [(b.blank, b.sigma_mm, b.draw) for b in draws(3, 4.0)]
    [('blurred', 4.0, 0), ('noise', 4.0, 0), ('blurred', 2.0, 0)]
    """
    widths = [sigma_mm * 2.0 ** ((-1) ** n * (n + 1) // 2) for n in range(count)]
    return tuple(
        Baseline("noise", sigma_mm, n // 2) if n % 2 else Baseline("blurred", widths[n // 2])
        for n in range(count)
    )


def _each(of_channels: Tensor) -> Tensor:
    return of_channels[:, None, None, None]
