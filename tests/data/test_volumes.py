from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given
from hypothesis import strategies as st

from lightning_segxai.data.volumes import Volume, batch_of, patch, patch_affine

SHAPE = (7, 6, 5)
TURNED = np.array([[0, 0.7, 0, 5], [-0.6, 0, 0, 6], [0, 0, 0.8, 7], [0, 0, 0, 1.0]])


def volume(name="a", seed=0, shape=SHAPE, kind=torch.uint8, **maps):
    numbers = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=numbers)
    label = torch.randint(0, 3, shape, generator=numbers).to(kind)
    return Volume(name, image, {"label": label, **maps}, TURNED.copy(), float(image.min()))


def plain_patch(values, start, size, fill):
    """Pad by far more than enough with NumPy, then cut."""
    far = 64
    padded = np.pad(values.numpy(), far, constant_values=fill)
    return padded[tuple(slice(far + a, far + a + s) for a, s in zip(start, size, strict=True))]


PLACES = {
    "start": st.tuples(*[st.integers(-20, 20)] * 3),
    "size": st.tuples(*[st.integers(1, 9)] * 3),
}


@given(**PLACES)
def test_patch_is_padding_and_cutting(start, size):
    """A patch inside, across the border or outside is what padding and cutting gives."""
    one = volume()
    for values, fill in ((one.image, one.floor), (one.maps["label"], 0)):
        found = patch(values, start, size, fill)
        assert found.dtype is values.dtype
        assert np.array_equal(found.numpy(), plain_patch(values, start, size, fill))


def test_a_patch_inside_is_a_view_and_one_across_is_not():
    """No copy is made where none is needed, and padding never writes into the volume."""
    values = torch.zeros(SHAPE)
    patch(values, (1, 1, 1), (2, 2, 2), 9)[:] = 1
    assert values.sum() == 8
    patch(values, (-1, 1, 1), (3, 2, 2), 9)[:] = 5
    assert values.sum() == 8


@given(**PLACES, voxel=st.tuples(*[st.integers(0, 8)] * 3))
def test_affine_of_a_patch_keeps_the_world(start, size, voxel):
    """A voxel of a patch lies where the same voxel of the volume lies."""
    one = volume()
    inside = np.add(start, voxel)
    world = patch_affine(one, start) @ [*voxel, 1]
    assert np.allclose(world, one.affine @ [*inside, 1], atol=1e-12)
    assert np.array_equal(one.affine, TURNED)


def as_subject(volume):
    """The volume as TorchIO knows it."""
    label = tio.LabelMap(tensor=volume.maps["label"][None], affine=volume.affine)
    image = tio.ScalarImage(tensor=volume.image[None], affine=volume.affine)
    return tio.Subject(image=image, label=label, name=volume.name)


def test_a_batch_is_what_torchio_collates():
    """Keys, kinds, affines and places are those of TorchIO's loader over TorchIO's crops."""
    volumes, size = [volume("a"), volume("b", seed=1)], (4, 3, 2)
    starts = [(1, 2, 3), (3, 0, 0)]
    batch = batch_of(list(zip(volumes, starts, strict=True)), size)

    crops = []
    for one, start in zip(volumes, starts, strict=True):
        bounds = [(a, n - a - s) for a, s, n in zip(start, size, SHAPE, strict=True)]
        subject = tio.Crop(tuple(b for pair in bounds for b in pair))(as_subject(one))
        end = [a + s for a, s in zip(start, size, strict=True)]
        subject["location"] = torch.tensor([*start, *end])
        crops.append(subject)
    theirs = next(iter(tio.SubjectsLoader(crops, batch_size=2)))

    assert theirs.keys() == batch.keys()
    for key in ("image", "label"):
        assert batch[key].keys() >= {"data", "affine", "type", "path"}
        assert batch[key]["data"].dtype is theirs[key]["data"].dtype
        assert torch.equal(batch[key]["data"], theirs[key]["data"])
        assert batch[key]["affine"].dtype == theirs[key]["affine"].dtype
        assert np.allclose(batch[key]["affine"], theirs[key]["affine"])
        assert batch[key]["type"] == theirs[key]["type"]
    assert batch["name"] == theirs["name"]
    assert torch.equal(batch["location"], theirs["location"])
    assert batch["location"].dtype is theirs["location"].dtype


def test_torchio_makes_subjects_of_a_batch():
    """TorchIO takes a batch apart into subjects again."""
    one = volume()
    batch = batch_of([(one, (0, 0, 0)), (one, (-2, 1, 1))], (4, 4, 4))
    first, second = tio.utils.get_subjects_from_batch(batch)

    assert isinstance(first["label"], tio.LabelMap)
    assert torch.equal(first["image"].data[0], one.image[:4, :4, :4])
    assert np.allclose(second["image"].affine, patch_affine(one, (-2, 1, 1)))
    assert second["name"] == "a"


def test_labels_of_mixed_kinds_become_the_widest():
    """No class is lost where one volume has more classes than a byte holds."""
    few, many = volume(kind=torch.uint8), volume(kind=torch.int32, seed=1)
    many.maps["label"][0, 0, 0] = 70_000
    for pair in ([few, many], [many, few]):
        label = batch_of([(one, (0, 0, 0)) for one in pair], (2, 2, 2))["label"]["data"]
        assert label.dtype is torch.int32
        assert label[pair.index(many), 0, 0, 0, 0] == 70_000


def test_a_volume_without_label_leaves_the_label_out():
    """A batch has labels only where every volume has one; other maps stay behind."""
    labeled = volume(brain=torch.ones(SHAPE, dtype=torch.uint8))
    bare = Volume("b", torch.zeros(SHAPE), {}, np.eye(4), 0.0)
    assert set(batch_of([(labeled, (0, 0, 0))], (2, 2, 2))) == {
        "image",
        "label",
        "name",
        "location",
    }
    assert "label" not in batch_of([(labeled, (0, 0, 0)), (bare, (0, 0, 0))], (2, 2, 2))


def test_a_batch_is_its_own_memory():
    """An augmentation that writes into a batch leaves the volume as it is."""
    one = volume()
    before = one.image.clone()
    batch = batch_of([(one, (0, 0, 0))], SHAPE)
    batch["image"]["data"].zero_()
    batch["image"]["affine"][:] = 0
    assert torch.equal(one.image, before)
    assert np.array_equal(one.affine, TURNED)


def test_what_is_known_of_a_volume():
    """Shape, spacing and bytes follow from the arrays."""
    one = volume(brain=torch.ones(SHAPE, dtype=torch.uint8))
    one = Volume(one.name, one.image, one.maps, one.affine, one.floor, {"x": np.zeros(3)}, "", "s")
    voxels = 7 * 6 * 5
    assert one.about.shape == one.shape == SHAPE
    assert one.spacing_mm == pytest.approx((0.6, 0.7, 0.8))
    assert one.about.source == "s"
    assert one.nbytes == voxels * (4 + 1 + 1) + 24
