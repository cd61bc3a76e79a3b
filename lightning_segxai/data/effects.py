"""What TorchIO's augmentations do to an image, for given parameters, in torch and in place.

Each function equals the deterministic TorchIO transform that its docstring names. Tensors may lie
on any device; small tables of the axes are made in NumPy, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor


def flip_(image: Shaped[Tensor, "c i j k"], axes: Sequence[int]) -> None:
    """Reverse the voxels along axes out of 0, 1, 2, as `tio.Flip`."""
    if axes:
        image.copy_(image.flip([1 + axis for axis in axes]))


def power_(image: Float[Tensor, "c i j k"], gamma: float) -> None:
    """Raise absolute values to ``gamma`` and keep their signs, as `tio.Gamma`.

    TorchIO does so only where an image has negative values; for others it is the plain power.
    """
    # exp(gamma log x) costs a quarter of pow(), and 0 stays 0: exp(-inf)
    image.copy_(image.abs().log_().mul_(gamma).exp_().copysign_(image))


def add_noise_(image: Float[Tensor, "c i j k"], mean: float, std: float, seed: int) -> None:
    """Add independent Gaussian noise to every voxel, as `tio.Noise`, from other random numbers."""
    generator = torch.Generator(image.device).manual_seed(seed)
    image.add_(torch.empty_like(image).normal_(mean, std, generator=generator))


def blur_(image: Float[Tensor, "c i j k"], sigmas: Sequence[float]) -> None:
    """Blur with a Gaussian along each axis, cut at 4 sigma, mirrored at the borders.

    As `tio.Blur`.

    Args:
        image: Values.
        sigmas: Standard deviation along i, j, k in voxels.
    """
    blurred: Tensor = image
    for axis, sigma in enumerate(sigmas):
        if sigma > 1e-15:  # as SciPy
            blurred = _product(_gaussian(image.shape[1 + axis], sigma), blurred, axis)
    image.copy_(blurred)


def _gaussian(n: int, sigma: float) -> Float64[np.ndarray, "n n"]:
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    rows = np.arange(n)[:, None]
    columns = (rows + offsets) % (2 * n)
    columns = np.minimum(columns, 2 * n - 1 - columns)  # d c b a | a b c d | d c b a
    spread = np.broadcast_to(weights / weights.sum(), columns.shape)
    places = (rows * n + columns).ravel()
    return np.bincount(places, spread.ravel(), minlength=n * n).reshape(n, n)


def shade_(image: Float[Tensor, "c i j k"], coefficients: Sequence[float], order: int) -> None:
    r"""Multiply by $\exp \sum_{a + b + c \le order} q_{abc} x^a y^b z^c$, as `tio.BiasField`.

    Args:
        image: Values.
        coefficients: $q_{abc}$, the last exponent running fastest.
        order: Largest sum of exponents; $x$, $y$, $z$ lie in [-1, 1] along i, j, k.
    """
    exponents = [(a, b, c) for a, b, c in np.ndindex(*[order + 1] * 3) if a + b + c <= order]
    table = np.zeros([order + 1] * 3)
    table[tuple(np.transpose(exponents))] = coefficients
    x, y, z = (
        (np.arange(n) - (n - 1) / 2) / max((n - 1) / 2, 0.5)  # the middle of a single voxel: 0
        for n in image.shape[1:]
    )
    powers_y, powers_z = (t ** np.arange(order + 1)[:, None] for t in (y, z))
    planes = _like(powers_y.T @ table @ powers_z, image)  # the factor of each power of x
    along_i = _like(x[:, None, None], image)
    field = planes[order].expand(image.shape[1:])
    for a in reversed(range(order)):
        field = torch.addcmul(planes[a], field, along_i)
    image.mul_(field.exp())


def thicken_(image: Float[Tensor, "c i j k"], axis: int, downsampling: float) -> None:
    """Keep the nearest of every few slices and interpolate linearly between them.

    What `tio.RandomAnisotropy` does. As there, the kept slices lie around the middle, and what is
    more than half a thick slice away from the outermost ones becomes 0. Where the middle lies
    between two slices, the second is kept (SimpleITK's choice hangs on a rounding).

    Args:
        image: Values.
        axis: Across the slices: 0, 1, 2.
        downsampling: Slices that become one; at least 1.
    """
    n = image.shape[1 + axis]
    kept = max(int(n / downsampling), 1)
    sources = (n - 1) / 2 + (np.arange(kept) - (kept - 1) / 2) * downsampling
    nearest = np.floor(sources + 0.5).clip(0, n - 1).astype(np.int64)
    at = (np.arange(n) - (n - 1) / 2) / downsampling + (kept - 1) / 2
    inside = (at >= -0.5) & (at <= kept - 0.5)
    lower = np.floor(at).clip(0, max(kept - 2, 0)).astype(np.int64)
    upper = np.minimum(lower + 1, kept - 1)
    share = (at - lower).clip(0, 1)
    matrix, rows = np.zeros((n, n)), np.arange(n)
    matrix[rows, nearest[lower]] += (1 - share) * inside
    matrix[rows, nearest[upper]] += share * inside
    image.copy_(_product(matrix, image, axis))


def _product(matrix: Float64[np.ndarray, "n n"], image: Tensor, axis: int) -> Tensor:
    # Faster than shifted sums or gathers for patches up to 128^3. In float64, because products of
    # float32 keep 3 digits where `torch.set_float32_matmul_precision` says so; MPS has no float64
    exact = torch.float32 if image.device.type == "mps" else torch.float64
    factor, values = torch.as_tensor(matrix, dtype=exact).to(image.device), image.to(exact)
    if axis == 0:
        return (factor @ values.flatten(2)).view(image.shape)
    return factor @ values if axis == 1 else values @ factor.T


def _like(values: Float64[np.ndarray, "..."], image: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=image.dtype).to(image.device)
