"""What a time-of-flight scan makes of a head: inflow, tissue, coil, point spread and noise.

Intensities follow a clinical 3 T angiogram: background about 100, vessels 300 to 900.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Integer
from scipy import ndimage

from lightning_segxai.data.vessel_tree import Ellipsoid


@dataclass(frozen=True)
class ToFContrast:
    """What the scanner makes of the anatomy.

    Args:
        fresh: Signal of fast blood that has just entered.
        saturated: Signal of blood that no longer flows.
        fast_mm: Radius of a vessel that shows 63 % of the inflow effect where the blood enters.
        reach_mm: Way after which 63 % of the effect is lost in a vessel of 1 mm radius.
        slab_mm: Thickness of a slab of the MOTSA acquisition.
        slab_loss: Share of the vessel signal that is lost on the border of two slabs, 0 to 1.
        noise: Standard deviation of the noise in each of the two channels.
        bias: Largest deviation of the coil's sensitivity from 1.
        psf_voxels: Standard deviation of the point spread function.
    """

    fresh: float = 900.0
    saturated: float = 450.0
    fast_mm: float = 0.7
    reach_mm: float = 450.0
    slab_mm: float = 26.0
    slab_loss: float = 0.18
    noise: float = 5.0
    bias: float = 0.12
    psf_voxels: float = 0.45

    def __post_init__(self) -> None:
        for name in ("fresh", "fast_mm", "reach_mm", "slab_mm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`ToFContrast({name}={getattr(self, name)})` needs more than 0.")
        for name in ("saturated", "slab_loss", "noise", "bias", "psf_voxels"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`ToFContrast({name}={getattr(self, name)})` needs at least 0.")

    def blood(
        self, radius_mm: Float[np.ndarray, " n"], transit: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        r"""Inflow signal of blood in a vessel of some radius after some transit.

        $$S = S_\infty + (S_0 - S_\infty) (1 - e^{-r / r_f}) e^{-\tau / L},\quad
        \tau = \int \frac{ds}{r(s)}$$

        Murray's law makes the flow go with $r^3$, so the speed with $r$: in thin vessels less blood
        is replaced between two pulses, and it meets more pulses on its way.
        """
        inflow = (1 - np.exp(-radius_mm / self.fast_mm)) * np.exp(-transit / self.reach_mm)
        return self.saturated + (self.fresh - self.saturated) * inflow

    def slabs(self, size: int, edge_mm: float) -> Float[np.ndarray, " k"]:
        """Sensitivity along k: 1 in the middle of a slab, less on the borders."""
        place = (np.arange(size) + 0.5) * edge_mm / self.slab_mm
        return 1 - self.slab_loss * np.abs(2 * (place % 1.0) - 1) ** 4


def voxel_rho(
    head: Ellipsoid, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> Float32[np.ndarray, "i j k"]:
    """Distance of every voxel from the head's center in semi-axes."""
    axes = [
        (((np.arange(n) * edge - c) / a) ** 2).astype(np.float32)
        for n, edge, c, a in zip(shape, spacing_mm, head.center_mm, head.semi_mm, strict=True)
    ]
    return np.sqrt(axes[0][:, None, None] + axes[1][:, None] + axes[2])


def texture(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    grain_mm: float,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "i j k"]:
    """A smooth random field of mean 0 and standard deviation 1, as coarse as the grain."""
    bases = []
    for n, edge in zip(shape, spacing_mm, strict=True):
        knots = np.arange(-2 * grain_mm, (n - 1) * edge + 3 * grain_mm, grain_mm)
        basis = np.exp(-(((np.arange(n)[:, None] * edge - knots) / grain_mm) ** 2))
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:  # each turn consumes the first axis and appends its fine one
        field = np.tensordot(field, basis, axes=([0], [1]))
    return field


def _tissue(
    head: Ellipsoid,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
) -> Float32[np.ndarray, "i j k"]:
    """White and gray matter, fluid, skull, scalp and air, without vessels."""
    size = float(np.prod(head.semi_mm) ** (1 / 3))
    folds = np.abs(texture(shape, spacing_mm, 0.085 * size, rng))
    coarse = texture(shape, spacing_mm, 0.3 * size, rng)
    rho = voxel_rho(head, shape, spacing_mm)
    shell = rho + 0.02 * coarse  # no head is an ellipsoid
    image = np.where(folds < 0.6 * np.clip((rho - 0.45) * 3, 0, 1), 122.0, 98.0)  # gray, white
    image += 8 * coarse + 9 * texture(shape, spacing_mm, 1.5 * max(spacing_mm), rng)
    image[folds < 0.16 * np.clip((rho - 0.55) * 4, 0, 1)] = 42.0  # sulci
    (x, y, z), (a, b, c) = head.center_mm, head.semi_mm
    for side in (-1, 1):
        lobe = Ellipsoid(
            (x + 0.12 * side * a, y - 0.05 * b, z + 0.18 * c), (0.085 * a, 0.33 * b, 0.20 * c)
        )
        image[voxel_rho(lobe, shape, spacing_mm) + 0.1 * coarse < 1] = 38.0  # ventricles
    # from within: fluid, inner table of the skull, marrow, outer table, scalp, air
    for border, value in (
        (0.99, 42.0),
        (1.035, 22.0),
        (1.055, 60.0),
        (1.08, 22.0),
        (1.10, 175.0),
        (1.16, 3.0),
    ):
        image[shell > border] = value
    return image.astype(np.float32)


def scan(
    voxels: Integer[np.ndarray, " n"],
    fraction: Float[np.ndarray, " n"],
    blood: Float[np.ndarray, " n"],
    head: Ellipsoid,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    contrast: ToFContrast,
) -> Float32[np.ndarray, "i j k"]:
    """Mix blood into the tissue by volume; then coil, point spread and Rician noise."""
    image = _tissue(head, shape, spacing_mm, rng)
    slabs = contrast.slabs(shape[2], spacing_mm[2])
    image *= (0.7 + 0.3 * slabs).astype(np.float32)  # stationary tissue loses less
    blood = blood * slabs[voxels % shape[2]]
    image.flat[voxels] = (1 - fraction) * image.flat[voxels] + fraction * blood
    extent = max(n * edge for n, edge in zip(shape, spacing_mm, strict=True))
    coil = np.tanh(texture(shape, spacing_mm, 0.6 * extent, rng))
    image *= 1 + contrast.bias * (coil - coil.mean())
    blurred = ndimage.gaussian_filter(image, contrast.psf_voxels, truncate=3.0)
    return noisy(blurred, contrast.noise, contrast.psf_voxels, rng)


def noisy(
    signal: Float32[np.ndarray, "i j k"],
    sigma: float,
    psf_voxels: float,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "i j k"]:
    r"""Magnitude of a signal in two noisy channels: Rician, $\sqrt{(s + n_1)^2 + n_2^2}$.

    In the plane of i and j the noise passes the point spread function too, as zero-filled noise
    does; its standard deviation stays what was asked for.

    References:
        Gudbjartsson and Patz, "The Rician distribution of noisy MRI data", MRM 34, 1995.
    """
    impulse = np.zeros((17, 17), dtype=np.float32)
    impulse[8, 8] = 1
    gain = np.linalg.norm(ndimage.gaussian_filter(impulse, psf_voxels, truncate=3.0))
    real, imaginary = (
        ndimage.gaussian_filter(
            rng.standard_normal(signal.shape, dtype=np.float32),
            (psf_voxels, psf_voxels, 0),
            mode="wrap",
            truncate=3.0,
        )
        * np.float32(sigma / gain)
        for _ in range(2)
    )
    return np.hypot(signal + real, imaginary)
