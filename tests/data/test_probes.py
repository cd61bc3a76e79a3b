from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, list_data_collate

from lightning_segxai.data.batches import batch_probes
from lightning_segxai.data.file_grid import to_file_grid
from lightning_segxai.data.preparation import prepared
from lightning_segxai.data.probes import ProbeFile, read_probe, volume_probe

SHARED = Path(os.environ.get("SEGXAI_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
CROP = SHARED / "topcow_066_crop_mra.nii.gz"
SHAPE = (10, 9, 8)
LPS = np.array([[-0.5, 0, 0, 40], [0, -0.5, 0, 30], [0, 0, 0.8, -20], [0, 0, 0, 1.0]])
RAS = np.diag([0.5, 0.5, 0.8, 1.0])


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 10, shape).astype(np.float32)


def write(path, array, affine=LPS):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def brightest_world(array, affine):
    return affine @ [*np.unravel_index(array.argmax(), array.shape), 1]


def test_read_probe_is_ras_and_keeps_the_world(tmp_path):
    """A file stored LPS becomes RAS: turned voxels, same millimeters, same label below them."""
    image = noise()
    image[2, 3, 4] = 500
    path = write(tmp_path / "head.nii.gz", image)
    label = write(tmp_path / "vessels.nii.gz", (image > 400).astype(np.uint8) * 2)

    probe = read_probe(path, label, regions={"bright": label})

    assert probe.name == "head"
    assert nib.aff2axcodes(probe.affine) == ("R", "A", "S")
    assert probe.spacing_mm == pytest.approx((0.5, 0.5, 0.8))
    assert np.allclose(
        brightest_world(probe.image[0].numpy(), probe.affine), brightest_world(image, LPS)
    )
    assert probe.label[probe.image[0] > 400].tolist() == [2]
    assert torch.equal(probe.regions["bright"], probe.label > 0)


def test_read_probe_preprocesses_and_says_so(tmp_path):
    """The network's input is scaled, and how is part of the probe's fingerprint."""
    path = write(tmp_path / "head.nii.gz", noise())
    raw = read_probe(path)
    scaled = read_probe(path, preprocessing=tio.ZNormalization())

    assert abs(float(scaled.image.mean())) < 1e-5
    assert scaled.fingerprint != raw.fingerprint
    assert "ZNormalization" in scaled.preprocessing


def test_reading_is_the_same_everywhere_and_draws_no_random_number(tmp_path):
    """The fingerprint is the same in another process and folder; every generator stays put."""
    # In processes of their own also because beartype draws python's random numbers here
    code = (
        "import random, sys\n"
        "import numpy as np, torch, torchio as tio\n"
        "from lightning_segxai.data.probes import read_probe\n"
        "steps = [tio.ZNormalization(masking_method=tio.ZNormalization.mean),"
        "tio.Lambda(lambda x: x + 1), tio.Resample(sys.argv[1])]\n"
        "def state(): return torch.get_rng_state().tolist(), str(np.random.get_state()[1:]), "
        "random.getstate()\n"
        "before = state()\n"
        "probe = read_probe(sys.argv[1], preprocessing=tio.Compose(steps))\n"
        "print(probe.preprocessing, probe.fingerprint, state() == before)"
    )
    runs = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder / "head.nii.gz", noise())
        command = [sys.executable, "-c", code, str(path)]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8"))
    told = [run.communicate(timeout=120)[0] for run in runs]

    assert told[0] == told[1]
    assert told[0].endswith(" True\n")
    assert "0x" not in told[0]
    assert str(tmp_path) not in told[0]
    assert "Transform.mean" in told[0]


def test_probe_file_reads_like_read_probe(tmp_path):
    """A probe named in a configuration is the probe read by hand."""
    path = str(write(tmp_path / "head.nii.gz", noise()))
    step = tio.ZNormalization()
    probe = ProbeFile(path, name="mine").read(step)

    assert probe.name == "mine"
    assert probe.fingerprint == read_probe(path, preprocessing=step).fingerprint


def test_read_probe_refuses_missing_files_and_other_grids(tmp_path):
    """What is missing, and what does not fit, is named."""
    path = write(tmp_path / "head.nii.gz", noise())
    other = write(tmp_path / "other.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"label=.*found no file .*none\.nii"):
        read_probe(path, tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) voxels, but its image"):
        read_probe(path, other)
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) voxels, but its image"):
        read_probe(path, regions={"brain": other})


ORDERS = st.permutations(range(3))
SIGNS = st.tuples(*[st.sampled_from([-1, 1])] * 3)


@settings(max_examples=20, deadline=None)
@given(order=ORDERS, signs=SIGNS)
def test_file_grid_round_trip_is_exact(tmp_path_factory, order, signs):
    """For every order and direction of a file's axes the map returns voxel by voxel."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([0.5, 0.6, 0.8])[:, order] * signs
    affine[:3, 3] = (11, -7, 3)
    image = noise()
    path = write(tmp_path_factory.mktemp("grid") / "head.nii.gz", image, affine)
    probe = read_probe(path)

    back, back_affine = to_file_grid(probe.image[0], probe, path)

    assert np.array_equal(back, image)
    assert np.array_equal(back_affine, nib.load(path).affine)


def test_file_grid_of_a_patch_is_zero_elsewhere(tmp_path):
    """A map of a patch returns to its place in the file; padding falls away."""
    image = noise()
    path = write(tmp_path / "head.nii.gz", image)
    whole = prepared(tio.Subject(image=tio.ScalarImage(path), name="head"), tio.ToCanonical())
    with pytest.warns(UserWarning, match="smaller than the patch"):
        probe = volume_probe(whole, "patch", center=(2, 4, 4), size=(4, 5, 12))

    back, _ = to_file_grid(probe.image[0], probe, path)

    # RAS i 0..3 are the file's 9..6, RAS j 2..6 the file's 6..2
    expected = np.zeros_like(image)
    expected[6:10, 2:7] = image[6:10, 2:7]
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("spacing", [0.4, 1.1])
def test_file_grid_after_resampling_keeps_sum_and_place(tmp_path, spacing):
    """A map made on resampled voxels returns with its sum, negative parts too, and its center."""
    path = write(tmp_path / "head.nii.gz", noise((20, 18, 16)))
    probe = read_probe(path, preprocessing=tio.Resample(spacing))
    i, j, k = np.indices(probe.shape)
    middle = (np.array(probe.shape) - 1) / 2
    far = ((i - middle[0]) ** 2 + (j - middle[1]) ** 2 + (k - middle[2]) ** 2) * spacing**2
    values = torch.from_numpy(np.exp(-far / 4) - 0.5 * np.exp(-far / 16))

    back, affine = to_file_grid(values, probe, path)

    assert back.shape == (20, 18, 16)
    assert back.sum() == pytest.approx(float(values.sum()), rel=1e-9)
    assert np.abs(back).sum() == pytest.approx(float(values.abs().sum()), rel=0.05)
    positive = back.clip(min=0)
    center = [
        float((positive * np.indices(back.shape)[a]).sum() / positive.sum()) for a in range(3)
    ]
    world = affine @ [*center, 1]
    assert np.allclose(world, probe.affine @ [*middle, 1], atol=0.1)


def test_file_grid_refuses_other_maps(tmp_path):
    """A map of another shape, and a file that is none, are named."""
    path = write(tmp_path / "head.nii.gz", noise())
    probe = read_probe(path)
    with pytest.raises(ValueError, match=r"map of \(10, 9, 8\) voxels"):
        to_file_grid(torch.zeros(3, 3, 3), probe, path)
    with pytest.raises(ValueError, match=r"cannot read .*none\.nii"):
        to_file_grid(probe.image[0], probe, tmp_path / "none.nii")


@pytest.mark.skipif(not CROP.is_file(), reason=f"needs the real crop {CROP}")
def test_real_crop_returns_to_its_own_grid():
    """The TopCoW crop, oblique and stored LPS, returns voxel by voxel and in the same place."""
    file = nib.load(CROP)
    image = file.get_fdata(dtype=np.float32)
    probe = read_probe(CROP, CROP.with_name("topcow_066_crop_binseg.nii.gz"))
    # The map: one voxel of the probe
    at = tuple(np.unravel_index(int(probe.image[0].argmax()), tuple(probe.shape)))
    values = torch.zeros(probe.shape)
    values[at] = 1.0

    back, affine = to_file_grid(values, probe, CROP)
    same, _ = to_file_grid(probe.image[0], probe, CROP)

    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    assert nib.aff2axcodes(probe.affine) == ("R", "A", "S")
    assert np.array_equal(same, image)
    assert back.sum() == 1
    assert np.allclose(brightest_world(back, affine), probe.affine @ [*at, 1], atol=1e-3)
    assert np.allclose(brightest_world(back, affine), brightest_world(image, file.affine))


def subject(name="head"):
    image = torch.from_numpy(noise())[None]
    return tio.Subject(
        image=tio.ScalarImage(tensor=image, affine=RAS),
        label=tio.LabelMap(tensor=(image > 110).int(), affine=RAS),
        brain=tio.LabelMap(tensor=(image > 90).int(), affine=RAS),
        name=name,
    )


def test_volume_probe_cuts_around_its_center():
    """A patch has its size, its voxels, its place in the world and its regions."""
    volume = prepared(subject(), tio.ToCanonical())
    probe = volume_probe(volume, "head-1", center=(5, 5, 5), size=4)

    assert torch.equal(probe.image[0], subject()["image"].data[0, 3:7, 3:7, 3:7])
    assert np.allclose(probe.affine[:3, 3], (1.5, 1.5, 2.4))
    assert torch.equal(probe.regions["brain"], probe.image[0] > 90)
    assert volume_probe(volume, "whole").shape == SHAPE


def test_fingerprint_is_of_the_stored_voxels(tmp_path):
    """How preprocessing rounds does not matter, nor how the file is turned; its voxels do."""
    image = noise()
    path = write(tmp_path / "lps.nii.gz", image)
    turned = write(tmp_path / "ras.nii.gz", image[::-1, ::-1], RAS @ _to_corner(image.shape))
    other = image.copy()
    other[1, 2, 3] += 1

    class Rounded(tio.ZNormalization):
        def apply_transform(self, subject):
            subject = super().apply_transform(subject)
            subject["image"].set_data(subject["image"].data * (1 + 1e-7))
            return subject

    Rounded.__qualname__ = Rounded.__name__ = "ZNormalization"
    same = [read_probe(p, preprocessing=tio.ZNormalization()) for p in (path, turned)]
    rounded = read_probe(path, preprocessing=Rounded())
    changed = read_probe(write(tmp_path / "x.nii.gz", other), preprocessing=tio.ZNormalization())

    assert same[0].fingerprint == same[1].fingerprint == rounded.fingerprint
    assert rounded.voxels != same[0].voxels
    assert changed.fingerprint != same[0].fingerprint


def _to_corner(shape):
    """From voxels of the turned array to millimeters of the LPS one, but for the scale of RAS."""
    corner = np.eye(4)
    corner[:3, 3] = (LPS @ [shape[0] - 1, shape[1] - 1, 0, 1])[:3] / np.diag(RAS)[:3]
    return corner


def loaded(*names):
    loader = tio.SubjectsLoader([subject(n) for n in names], batch_size=len(names))
    return next(iter(loader))


def plain():
    image = torch.from_numpy(np.stack([noise(seed=n) for n in range(3)]))[:, None]
    return image, (image > 110).to(torch.uint8)


def test_batch_probes_of_torchio():
    """A TorchIO batch gives its subjects' probes, under unique safe names."""
    first, second, third = batch_probes(loaded("a b", "a b", "..c"), 8)

    assert [p.name for p in (first, second, third)] == ["a_b-1", "a_b-2", "c-1"]
    assert first.fingerprint == second.fingerprint
    assert np.allclose(first.affine, RAS)
    assert torch.equal(first.label, (first.image[0] > 110).long())


def test_batch_probes_of_torchio_under_other_keys():
    """Other keys than image and label are told apart by their TorchIO type."""
    batch = loaded("a", "b")
    batch = {"vessels": batch["label"], "mra": batch["image"]}

    assert torch.equal(batch_probes(batch, 1)[0].image[0], subject()["image"].data[0])


def test_batch_probes_of_monai():
    """MONAI's dictionaries give tensors, or MetaTensors with their affine."""
    image, label = plain()
    bare = batch_probes({"image": image, "label": label}, 2)
    rows = [
        {"image": MetaTensor(i, affine=torch.as_tensor(LPS)), "label": MetaTensor(c)}
        for i, c in zip(image, label, strict=True)
    ]
    meta = batch_probes(list_data_collate(rows), 2)

    assert len(bare) == len(meta) == 2
    assert bare[0].spacing_mm == (1.0, 1.0, 1.0)
    assert np.allclose(meta[1].affine, LPS)
    assert meta[1].spacing_mm == pytest.approx((0.5, 0.5, 0.8))
    assert type(meta[1].image) is torch.Tensor
    assert torch.equal(meta[1].image, bare[1].image)
    assert torch.equal(meta[1].label, bare[1].label)


@pytest.mark.parametrize("kind", [tuple, list])
def test_batch_probes_of_pairs(kind):
    """Pairs, with or without the label's channel, and an image alone give probes."""
    image, label = plain()
    with_channel = batch_probes(kind([image, label]), 1)[0]
    without = batch_probes(kind([image, label[:, 0]]), 1)[0]

    assert with_channel.fingerprint == without.fingerprint
    assert batch_probes(image.half(), 3)[2].image.dtype is torch.float32
    assert batch_probes(image, 1)[0].label is None


def test_batch_probes_do_not_change_with_the_batch():
    """A probe keeps its voxels when the batch's memory is used again."""
    image, label = plain()
    probe = batch_probes((image, label), 1)[0]
    image.zero_()

    assert probe.image.abs().sum() > 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"mri": torch.zeros(2, 1, 4, 4, 4)}, r"mri: a tensor of shape \(2, 1, 4, 4, 4\)"),
        ((torch.zeros(2, 1, 4, 4), None), r"tuple of 2 \(a tensor of shape \(2, 1, 4, 4\), NoneT"),
        ({"image": torch.zeros(1, 1, 4, 4, 4), "label": torch.zeros(1, 2, 4, 4, 4)}, r"label: a"),
        ("nothing", r"Found str"),
    ],
)
def test_batch_probes_say_what_they_found(batch, message):
    """A batch of another form is described in the error."""
    with pytest.raises(ValueError, match=message):
        batch_probes(batch, 1)
