"""Smooth random deformations of image and label, as an augmentation of TorchIO."""

from __future__ import annotations

from typing import Any

import torch
import torchio as tio
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.spatial_transform import SpatialTransform

from lightning_segxai.deformations import SplineDeformation, warp


class RandomSplineDeformation(RandomTransform, SpatialTransform):
    """Deforms all images of a subject in the same way, smoothly and without folds.

    Images are interpolated linearly, label maps take the class of the nearest voxel. Costs about
    60 ms for a patch of 64^3, most of it for the flow. Draws one number from torch's global
    generator, besides the one for ``p``.

    Args:
        deformation: What to draw from; without one, the small deformations of DS6, which next to
            never change a label of 64^3 voxels. For larger ones, raise its ``displacement``.
        **kwargs: TorchIO's, of every transform.
    """

    def __init__(self, deformation: SplineDeformation | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.deformation = SplineDeformation() if deformation is None else deformation

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        drawn = FixedSplineDeformation(
            self._get_random_seed(), self.deformation, **self._get_base_args()
        )
        return drawn(subject)


class FixedSplineDeformation(SpatialTransform):
    """One deformation of `RandomSplineDeformation`, as it stands in the history of a subject.

    Args:
        seed: What was drawn.
        deformation: What it was drawn from.
        **kwargs: TorchIO's, of every transform.
    """

    def __init__(self, seed: int, deformation: SplineDeformation, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed, self.deformation = seed, deformation
        self.args_names = ["seed", "deformation"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        subject.check_consistent_spatial_shape()
        field = self.deformation.draw(
            subject.spatial_shape, torch.Generator().manual_seed(self.seed)
        )
        for image in self.get_images(subject):
            if isinstance(image, tio.LabelMap):
                moved = warp(image.data[None], field, "nearest")
            else:
                moved = warp(image.data[None].float(), field)
            image.set_data(moved[0])
        return subject
