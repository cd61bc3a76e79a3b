"""Motion of the head between parts of an acquisition, as `tio.Motion` makes it, in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # the world of SimpleITK, in which TorchIO turns
_SLAB_VOXELS = 2**16


def move_(
    image: Float[Tensor, "c i j k"],
    affine: Float[np.ndarray, "4 4"],
    degrees: Float[np.ndarray, "poses 3"],
    translations: Float[np.ndarray, "poses 3"],
    times: Float[np.ndarray, " poses"],
) -> None:
    """Compose the spectrum of the image in several poses, as `tio.Motion` with linear sampling.

    The poses follow each other along the frequencies of k; the middle ones are of the image as it
    is. Because they follow along k only, the transforms along i and j cancel, and one along k is
    enough. As in TorchIO, rotations are about the origin of the world, not the image's center, and
    what comes from outside is the image's minimum.

    Args:
        image: Values.
        affine: Voxel indices to world millimeters (RAS).
        degrees: Rotations about the world's axes (LPS).
        translations: In millimeters, along the world's axes (LPS).
        times: When each pose begins, rising, in (0, 1).
    """
    to_world = _TO_LPS @ np.asarray(affine, dtype=np.float64)
    values = image if image.dtype == torch.float64 else image.float()  # FFTs of halves are rare
    poses = [values]
    for turn, shift in zip(degrees, translations, strict=True):
        motion = np.eye(4)
        motion[:3, :3] = _rotation(np.radians(turn, dtype=np.float64))
        motion[:3, 3] = shift
        poses.append(_sampled(values, np.linalg.solve(to_world, motion @ to_world)))
    late = np.flatnonzero(times > 0.5)
    middle = int(late[0]) if len(late) else len(times)
    poses[0], poses[middle] = poses[middle], poses[0]

    n = image.shape[-1]
    ends = [0, *(n * times).astype(int).tolist(), n]
    spectrum = torch.zeros((), dtype=torch.complex64, device=image.device)
    for pose, first, end in zip(poses, ends[:-1], ends[1:], strict=True):
        share = np.zeros(n)
        share[first:end] = 1
        share = np.fft.ifftshift(share)
        # The real part of what comes back: half of each frequency and of its negative
        share = (share + np.roll(share[::-1], 1)) / 2
        weights = torch.as_tensor(share[: n // 2 + 1], dtype=values.dtype).to(values.device)
        spectrum = spectrum + torch.fft.rfft(pose).mul_(weights)
    image.copy_(torch.fft.irfft(spectrum, n=n))


def _rotation(radians: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3 3"]:
    """Turns about y, then x, then z, as ITK's ``Euler3DTransform``."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(radians), np.sin(radians)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def _sampled(
    image: Float[Tensor, "c i j k"], to_source: Float64[np.ndarray, "4 4"]
) -> Float[Tensor, "c i j k"]:
    """Values at transformed indices, linearly; the minimum beyond half a voxel outside."""
    slices, *plane = image.shape[1:]
    # Tables of few voxels stay in the CPU's cache and in memory that it has at hand
    slab = max(_SLAB_VOXELS // math.prod(plane), 1) if image.device.type == "cpu" else slices
    minimum = image.amin(dim=(1, 2, 3), keepdim=True)
    pose = torch.empty_like(image)
    for first in range(0, slices, slab):
        part = pose[:, first : first + slab]
        values, inside = _slab(image, to_source, np.arange(first, first + part.shape[1]))
        torch.where(inside, values.view(part.shape), minimum, out=part)
    return pose


def _slab(
    image: Float[Tensor, "c i j k"],
    to_source: Float64[np.ndarray, "4 4"],
    slices: Int[np.ndarray, " m"],
) -> tuple[Float[Tensor, "c mjk"], Bool[Tensor, "m j k"]]:
    """Values of some slices, from the outermost voxels where outside, and which are inside."""
    shape = image.shape[1:]
    inside = torch.ones((), dtype=torch.bool, device=image.device)
    start = torch.zeros((), dtype=torch.int32, device=image.device)
    shares, steps = [], []
    for axis, n in enumerate(shape):
        indices = (slices, np.arange(shape[1]), np.arange(shape[2]))
        lines = [to_source[axis, other] * index for other, index in enumerate(indices)]
        lines[0] = lines[0] + to_source[axis, 3]
        along_i, along_j, along_k = (torch.as_tensor(t, dtype=image.dtype) for t in lines)
        at = (along_i[:, None] + along_j).to(image.device)[..., None] + along_k.to(image.device)
        kept = at.clamp(0, n - 1)
        inside = inside & at.sub_(kept).abs_().le(0.5)
        lower = kept.int().clamp_(max=max(n - 2, 0))
        shares.append(kept.sub_(lower).flatten())
        stride = math.prod(shape[axis + 1 :])
        start = start + lower.mul_(stride)
        steps.append(stride if n > 1 else 0)
    flat, index = image.flatten(1), start.flatten()

    def between(axis: int, offset: int) -> Tensor:
        if axis == 3:
            return flat[:, offset:].index_select(1, index)
        lower, upper = between(axis + 1, offset), between(axis + 1, offset + steps[axis])
        return lower.lerp_(upper, shares[axis])

    return between(0, 0), inside
