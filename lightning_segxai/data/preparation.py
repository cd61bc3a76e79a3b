"""From a subject on disk to the volume that patches are cut from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchio as tio
from jaxtyping import Shaped
from torch import Tensor

from lightning_segxai.data.cache import VolumeCache
from lightning_segxai.data.provenance import provenance
from lightning_segxai.data.sampling import Sampling
from lightning_segxai.data.settings import told
from lightning_segxai.data.sources import Source
from lightning_segxai.data.subjects import check_subject
from lightning_segxai.data.volumes import Volume


@dataclass(frozen=True)
class Preparation:
    """How a source becomes a volume.

    Args:
        source: The subject's volume, not yet read.
        transform: The preprocessing.
        sampling: Makes the index.
        classes: Number of classes to check labels against; any where it is None.
    """

    source: Source
    transform: tio.Transform
    sampling: Sampling
    classes: int | None = None

    def volume(self) -> Volume:
        """Read, check and preprocess it, and make its index.

        Raises:
            ValueError: where it cannot be used, naming the subject and saying why.
        """
        subject = self.source.read()
        check_subject(subject, self.classes, labeled=True)
        volume = prepared(subject, self.transform)
        if not bool(volume.maps["label"].any()):
            raise ValueError(
                f'The label of subject "{volume.name}" has no vessel voxel left after the '
                "preprocessing. Resample to a finer `spacing_mm`."
            )
        return replace(volume, index=self.sampling.index(volume))

    def again(self, index: Mapping[str, np.ndarray]) -> Volume:
        """Read and preprocess it, with the index that was made before."""
        return replace(prepared(self.source.read(), self.transform), index=index)

    def key(self, cache: VolumeCache) -> str:
        """Name of its entry in the cache: what it is made of, by what settings and what code."""
        made_of = (
            [cache.content(file) for file in self.source.files],
            self.source.described,
            told(self.transform),
            told(self.sampling),
            self.classes,
            provenance([self.transform, self.sampling], cache.content),
        )
        return hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]


def prepared(subject: tio.Subject, transform: tio.Transform) -> Volume:
    """Preprocess a subject; the result holds no more memory than its volumes need.

    Args:
        subject: With an ``image`` and, where there is one, a ``label``.
        transform: The preprocessing.

    Raises:
        ValueError: where the preprocessing fails or gives NaN, naming the subject.
    """
    digest = source_digest(subject)
    ready = preprocessed(subject, transform)
    image = ready.get_image("image")
    values = image.data[0].contiguous()
    if values.untyped_storage().nbytes() > values.nbytes:
        values = values.clone()
    return Volume(
        name=str(ready["name"]),
        image=values,
        maps={
            key: _small(one.data[0])
            for key, one in ready.get_images_dict(intensity_only=False).items()
            if isinstance(one, tio.LabelMap)
        },
        affine=np.asarray(image.affine, dtype=np.float64),
        floor=float(values.min()),
        preprocessing=told(transform),
        source=digest,
    )


def preprocessed(subject: tio.Subject, transform: tio.Transform) -> tio.Subject:
    """The transformed subject: label maps of whole numbers in int32, all else in float32.

    No random number is drawn: TorchIO asks the global generator whether to apply a transform even
    when it always does, and a probe must not shift the random numbers of the training.

    Raises:
        ValueError: where the transform fails or gives NaN, naming the subject.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed: it would reseed GPUs too
        try:
            subject = transform(subject)
        except Exception as error:  # transforms are anybody's code
            name = subject.get("name", "?")
            raise ValueError(f'The preprocessing of subject "{name}" failed: {error}') from error
    for image in subject.get_images(intensity_only=False):
        whole = isinstance(image, tio.LabelMap) and bool((image.data == image.data.round()).all())
        image.set_data(image.data.to(torch.int32 if whole else torch.float32))
        if not bool(torch.isfinite(image.data).all()):
            raise ValueError(
                f'The preprocessing of subject "{subject.get("name", "?")}" gave NaN or infinity. '
                f"It was {transform}."
            )
    return subject


def source_digest(subject: tio.Subject) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the image's voxels as they were stored.

    Turned to RAS first, which moves voxels and computes nothing: a file saved again with other
    axes is the same volume.
    """
    with torch.random.fork_rng(devices=[]):  # any TorchIO transform draws a number
        image = tio.ToCanonical()(subject.get_image("image"))
    voxels = np.ascontiguousarray(image.data.numpy().astype("<f4"))
    digest = hashlib.sha256(str(voxels.shape).encode())
    digest.update(voxels.data)
    return digest.hexdigest()[:16]


def _small(values: Shaped[Tensor, "i j k"]) -> Shaped[Tensor, "i j k"]:
    if values.is_floating_point():  # weights to sample by
        return values.float().contiguous()
    fits = int(values.min()) >= 0 and int(values.max()) < 256
    return values.to(torch.uint8 if fits else torch.int32).contiguous()
