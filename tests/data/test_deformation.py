"""The augmentation: one deformation for image and label, repeatable, with TorchIO's options."""

from __future__ import annotations

import pytest
import torch
import torchio as tio

from lightning_segxai.data.deformation import FixedSplineDeformation, RandomSplineDeformation
from lightning_segxai.deformations import SplineDeformation, warp

STRONG = SplineDeformation(displacement=(0.4,))
SHAPE = (16, 12, 14)


def subject() -> tio.Subject:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *SHAPE, generator=generator)
    return tio.Subject(
        image=tio.ScalarImage(tensor=image),
        ramp=tio.ScalarImage(tensor=torch.arange(14).expand(1, *SHAPE).short().contiguous()),
        label=tio.LabelMap(tensor=(image > 0.5).long() * 3),
        name="case",
    )


def test_image_and_label_are_deformed_by_one_field():
    """The image linearly, integers too, the label by its nearest voxels; the rest is left."""
    before = subject()
    after = FixedSplineDeformation(5, STRONG)(before)
    field = STRONG.draw(SHAPE, torch.Generator().manual_seed(5))
    assert torch.equal(after.image.data, warp(before.image.data[None], field)[0])
    assert torch.equal(after.ramp.data, warp(before.ramp.data[None].float(), field)[0])
    assert torch.equal(after.label.data, warp(before.label.data[None], field, "nearest")[0])
    assert set(after.label.data.unique().tolist()) == {0, 3}
    assert not torch.equal(after.label.data, before.label.data)
    assert torch.equal(before.image.data, subject().image.data)
    assert after["name"] == "case"


def test_the_global_seed_decides_and_the_history_repeats_it():
    """Equal seeds deform equally, and what a subject remembers deforms again in the same way."""
    deformed = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        deformed.append(RandomSplineDeformation(STRONG)(subject()))
    first, again, other = deformed
    assert torch.equal(first.image.data, again.image.data)
    assert not torch.equal(first.image.data, other.image.data)
    replayed = first.get_composed_history()(subject())
    assert torch.equal(replayed.image.data, first.image.data)
    assert torch.equal(replayed.label.data, first.label.data)


def test_options_of_torchio():
    """``p`` of 0 leaves the subject alone, ``exclude`` an image; the defaults are DS6's."""
    assert torch.equal(
        RandomSplineDeformation(STRONG, p=0)(subject()).image.data, subject().image.data
    )
    after = RandomSplineDeformation(STRONG, exclude=["ramp"])(subject())
    assert torch.equal(after.ramp.data, subject().ramp.data)
    assert not torch.equal(after.image.data, subject().image.data)
    assert RandomSplineDeformation().deformation == SplineDeformation()


def test_batches_of_deformed_subjects():
    """A loader collates them, as those of every other augmentation."""
    data = tio.SubjectsDataset([subject(), subject()], RandomSplineDeformation(STRONG))
    [batch] = tio.SubjectsLoader(data, batch_size=2)
    assert batch["image"]["data"].shape == (2, 1, *SHAPE)
    assert not torch.equal(batch["image"]["data"][0], batch["image"]["data"][1])


def test_images_of_two_shapes_are_refused():
    """One field does not fit both."""
    odd = tio.Subject(
        image=tio.ScalarImage(tensor=torch.rand(1, 8, 8, 8)),
        label=tio.LabelMap(tensor=torch.ones(1, 8, 8, 9)),
    )
    with pytest.raises(RuntimeError, match="shape"):
        RandomSplineDeformation()(odd)
