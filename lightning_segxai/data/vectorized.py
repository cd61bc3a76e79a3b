"""Twins of TorchIO's random transforms: the same distributions and effects, without the detours.

A twin takes its settings from the TorchIO transform and its random numbers from one generator,
and changes the images of a patch in place, on the device where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torchio as tio
from jaxtyping import Float, Shaped
from torch import Tensor

from lightning_segxai.data.effects import add_noise_, blur_, flip_, power_, shade_, thicken_
from lightning_segxai.data.grids import spacing_of
from lightning_segxai.data.motion import move_


@dataclass(frozen=True, eq=False)
class PatchImage:
    """One image of a patch, sharing the memory of its batch.

    Args:
        name: Its key in the batch.
        data: Its values.
        affine: Voxel indices to world millimeters.
        scalar: Whether it holds intensities, not classes.
    """

    name: str
    data: Shaped[Tensor, "c i j k"]
    affine: Float[np.ndarray, "4 4"]
    scalar: bool


def has_twin(transform: tio.Transform) -> bool:
    """Whether `change` knows the transform, with its settings; no subclass, it may do anything."""
    return (
        type(transform) in _TWINS
        and transform.keep is None
        and transform.label_keys is None
        # A name of an axis would depend on the affine
        and all(isinstance(axis, int) for axis in getattr(transform, "axes", ()))
        and getattr(transform, "image_interpolation", "linear") == "linear"
        and getattr(transform, "scalars_only", True)
    )


def change(
    transform: tio.Transform, patch: Sequence[PatchImage], generator: np.random.Generator
) -> None:
    """Do to a patch what the transform would, in place, or nothing if its ``p`` falls so.

    Args:
        transform: One that `has_twin`.
        patch: All images; the transform's ``include`` and ``exclude`` choose among them.
        generator: The only source of random numbers.
    """
    if generator.random() >= transform.probability:
        return
    spatial = isinstance(transform, tio.RandomFlip)
    images = [
        image
        for image in patch
        if (image.scalar or spatial)
        and (transform.include is None or image.name in transform.include)
        and (transform.exclude is None or image.name not in transform.exclude)
    ]
    _TWINS[type(transform)](transform, images, generator)


def _flip(flip: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    chosen = generator.random(3) < flip.flip_probability
    axes = [axis for axis in range(3) if chosen[axis] and axis in flip.axes]
    for image in images:
        flip_(image.data, axes)


def _gamma(gamma: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    for image in images:
        for channel in image.data.split(1):
            power_(channel, math.exp(generator.uniform(*gamma.log_gamma_range)))


def _noise(noise: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    for image in images:
        mean, std = generator.uniform(*noise.mean_range), generator.uniform(*noise.std_range)
        add_noise_(image.data, mean, std, seed=int(generator.integers(2**63)))


def _blur(blur: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    for image in images:
        stds_mm = generator.uniform(blur.std_ranges[::2], blur.std_ranges[1::2])
        blur_(image.data, (stds_mm / spacing_of(image.affine)).tolist())


def _bias_field(bias: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    for image in images:
        count = math.comb(bias.order + 3, 3)
        coefficients = _uniform(generator, bias.coefficients_range, count)
        shade_(image.data, coefficients.tolist(), bias.order)


def _anisotropy(thick: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    axis = thick.axes[generator.integers(len(thick.axes))]
    downsampling = generator.uniform(*thick.downsampling_range)
    for image in images:
        thicken_(image.data, axis, downsampling)


def _motion(motion: Any, images: Sequence[PatchImage], generator: np.random.Generator) -> None:
    count = motion.num_transforms
    for image in images:
        degrees = _uniform(generator, motion.degrees_range, (count, 3))
        translations = _uniform(generator, motion.translation_range, (count, 3))
        jitter = generator.uniform(-0.3, 0.3, size=count)
        times = (np.arange(1, count + 1) + jitter) / (count + 1)
        move_(image.data, image.affine, degrees, translations, times)


def _uniform(
    generator: np.random.Generator, bounds: tuple[float, float], size: int | tuple[int, int]
) -> np.ndarray:
    low, high = bounds
    return generator.uniform(low, high, size)


_Twin = Callable[[Any, Sequence[PatchImage], np.random.Generator], None]
_TWINS: Mapping[type[tio.Transform], _Twin] = {
    tio.RandomFlip: _flip,
    tio.RandomGamma: _gamma,
    tio.RandomNoise: _noise,
    tio.RandomBlur: _blur,
    tio.RandomBiasField: _bias_field,
    tio.RandomAnisotropy: _anisotropy,
    tio.RandomMotion: _motion,
}
