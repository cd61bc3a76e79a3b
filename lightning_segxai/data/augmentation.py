"""Random changes of a training batch: TorchIO's transforms, most of them run without TorchIO.

Made after the patches are cut and collated, in a worker of the loader or, where every transform
has a twin, on the GPU after the transfer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchio as tio
from jaxtyping import Int
from torch import Tensor

from lightning_segxai.data.vectorized import PatchImage, change, has_twin


def light_augmentation() -> list[tio.Transform]:
    """Flips left-right, gamma, noise; rarely blur, bias field, thicker slices and motion.

    Nothing here moves voxels of the label between their centers: an affine of 10 degrees with
    nearest neighbors tears 22 vessels into 43, and an elastic deformation costs 0.3 s for each
    patch of 64^3. All have twins: 1.7 ms for such a patch, less than a quarter of TorchIO's time.
    """
    return [
        tio.RandomFlip(axes=(0,)),  # left-right: volumes are RAS
        tio.RandomGamma(log_gamma=0.3, p=0.3),
        tio.RandomNoise(std=(0, 0.05), p=0.3),
        tio.RandomBlur(std=(0, 0.7), p=0.1),
        tio.RandomBiasField(coefficients=0.3, order=2, p=0.1),
        tio.RandomAnisotropy(axes=2, downsampling=(1.2, 2), p=0.1),
        tio.RandomMotion(degrees=2, translation=1, num_transforms=2, p=0.05),
    ]


@dataclass(frozen=True)
class Augmentation:
    """TorchIO transforms, one after the other, of every patch of a batch.

    Flips along numbered axes, gamma, noise, blur, bias field, anisotropy and motion have twins in
    torch that draw from the same distributions, have the same effects and run where the batch is
    (`lightning_segxai.data.vectorized`). Any other transform runs as TorchIO's on the CPU.

    The random numbers of a patch follow from its seed and the transform's place in the list
    alone: not from its batch, the workers or the global generators, which stay as they are.

    Args:
        transforms: In the order in which they are applied. They may change the values and, all
            patches alike, the shape of the images, but add none.
    """

    transforms: Sequence[tio.Transform]

    @property
    def vectorized(self) -> bool:
        """Whether every transform has a twin, so that it is as well called on the GPU."""
        return all(has_twin(transform) for transform in self.transforms)

    def __call__(self, batch: dict[str, Any], seeds: Int[Tensor, " b"]) -> dict[str, Any]:
        """Change a batch as TorchIO collates it, in place, and return it.

        Args:
            batch: ``batch["image"]["data"]`` (b c i j k) with its ``affine`` (b 4 4), and further
                images. Where an image tells no ``type``, whole numbers are labels.
            seeds: One for each patch.

        Raises:
            ValueError: for another number of seeds than patches, and where a transform leaves
                patches of several shapes or other images.
        """
        images = [key for key, entry in batch.items() if _is_image(entry)]
        for key in images:
            entry = batch[key]
            if len(seeds) != len(entry["data"]):
                raise ValueError(
                    f"`Augmentation` needs a seed for each patch, but got {len(seeds)} seeds for "
                    f"{len(entry['data'])} patches of {key!r}."
                )
            if _is_scalar(entry) and not entry["data"].is_floating_point():
                entry["data"] = entry["data"].float()
        numbers = [seed % 2**64 for seed in seeds.tolist()]
        for place, transform in enumerate(self.transforms):
            # As a child, so that no seed and place make the same numbers as two others
            sequences = [np.random.SeedSequence(seed, spawn_key=(place,)) for seed in numbers]
            generators = [np.random.default_rng(sequence) for sequence in sequences]
            if has_twin(transform):
                for n, generator in enumerate(generators):
                    change(transform, _patch(batch, images, n), generator)
            else:
                _run(transform, batch, images, generators)
        return batch


def _is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("data"), Tensor)


def _is_scalar(entry: dict[str, Any]) -> bool:
    if "type" in entry:
        return bool(entry["type"][0] != tio.LABEL)
    return bool(entry["data"].is_floating_point())


def _patch(batch: dict[str, Any], images: Sequence[str], n: int) -> list[PatchImage]:
    entries = [(key, batch[key]) for key in images]
    return [
        PatchImage(key, entry["data"][n], np.asarray(entry["affine"][n]), _is_scalar(entry))
        for key, entry in entries
    ]


def _run(
    transform: tio.Transform,
    batch: dict[str, Any],
    images: Sequence[str],
    generators: Sequence[np.random.Generator],
) -> None:
    """Apply a transform as TorchIO does, patch by patch, and write the results into the batch."""
    changed: dict[int, tio.Subject] = {}
    subjects: list[tio.Subject] = []
    with _generators_kept():
        for n, generator in enumerate(generators):
            subject = _subject(batch, images, n)
            _seed(transform, generator)
            subjects.append(transform(subject))
            # TorchIO returns what it got where a probability spares it
            if subjects[n] is not subject or not transform.copy:
                changed[n] = subjects[n]
    for subject in changed.values():
        found = list(subject.get_images_dict(intensity_only=False))
        if sorted(found) != sorted(images):
            raise ValueError(
                f"`Augmentation` needs transforms that keep a patch's images, {list(images)}, but "
                f"`{transform.name}` left {found}. Make them before the patches are cut."
            )
    for key in images if changed else ():
        entry = batch[key]
        tensors = [subject.get_image(key).data for subject in subjects]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise ValueError(
                f"`Augmentation` needs patches of one shape, but `{transform.name}` left {key!r} "
                f"in shapes {', '.join(map(str, shapes))}. Give it p=1, or a fixed shape."
            )
        if shapes[0] != tuple(entry["data"].shape[1:]):
            entry["data"] = entry["data"].new_empty((len(tensors), *shapes[0]))
            changed = dict(enumerate(subjects))
        for n in changed:
            entry["data"][n].copy_(tensors[n])
        entry["affine"] = np.stack([subject.get_image(key).affine for subject in subjects])


def _subject(batch: dict[str, Any], images: Sequence[str], n: int) -> tio.Subject:
    items = {
        key: value[n]
        for key, value in batch.items()
        if key not in images and isinstance(value, (list, tuple, Tensor, np.ndarray))
    }
    for image in _patch(batch, images, n):
        kind = tio.ScalarImage if image.scalar else tio.LabelMap
        items[image.name] = kind(tensor=image.data.cpu(), affine=image.affine)
    return tio.Subject(items)


def _seed(transform: Any, generator: np.random.Generator) -> None:
    """Seed the global generators, and those that MONAI's transforms have of their own."""
    seed = int(generator.integers(2**63))
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs, too
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for randomizable in _of_monai(transform):
        randomizable.set_random_state(seed=int(generator.integers(2**31)))


def _of_monai(transform: Any) -> Iterator[Any]:
    if isinstance(transform, tio.MonaiAdapter):
        if hasattr(transform.monai_transform, "set_random_state"):
            yield transform.monai_transform
    elif isinstance(transform, tio.Compose):
        for one in transform.transforms:
            yield from _of_monai(one)
    elif isinstance(transform, tio.OneOf):
        for one in transform.transforms_dict:
            yield from _of_monai(one)


@contextmanager
def _generators_kept() -> Iterator[None]:
    # TorchIO's own noise calls torch.manual_seed, so the GPUs' generators are kept as well
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
