from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio

from lightning_segxai.data.sampling import cut, start_around, vessel_centers
from lightning_segxai.data.subjects import (
    PhantomCohort,
    check_subject,
    folder_subjects,
    phantom_subjects,
    preprocessed,
)

SHAPE = (8, 7, 6)


def write(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 10, shape).astype(np.float32)


def block(value=1, shape=SHAPE):
    label = np.zeros(shape, dtype=np.uint8)
    label[2:4, 2:4, 2:4] = value
    return label


def pair(root, name, image=None, label=None, affine=None):
    write(root / "images" / name, noise() if image is None else image)
    write(root / "labels" / name, block() if label is None else label, affine)


def only(root):
    (subject,) = folder_subjects(root)
    return subject


def test_folder_gives_pairs_sorted_by_name(tmp_path):
    """A folder's subjects are its image and label pairs, in the order of their names."""
    pair(tmp_path, "b.nii")
    pair(tmp_path, "a.nii.gz")
    (tmp_path / "images" / "notes.txt").write_text("not a volume")
    (tmp_path / "images" / "._a.nii.gz").write_text("a Mac's shadow")

    subjects = folder_subjects(tmp_path)

    assert [s["name"] for s in subjects] == ["a", "b"]
    assert subjects[0]["label"].data.sum() == 8


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: (r / "labels" / "a.nii.gz").unlink(), r"labels.* holds none"),
        (lambda r: write(r / "images" / "c.nii.gz", noise()), r"stand alone: .*images/c\.nii\.gz"),
        (lambda r: write(r / "labels" / "c.nii.gz", block()), r"stand alone: .*labels/c\.nii\.gz"),
        (lambda r: write(r / "images" / "a.nii", noise()), r"both 'a'"),
        (lambda r: write(r / "images" / "a b.nii", noise()), r"subject name 'a b'"),
    ],
)
def test_folder_refuses_what_it_cannot_pair(tmp_path, break_it, message):
    """Files that do not make pairs are named."""
    pair(tmp_path, "a.nii.gz")
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message):
        folder_subjects(tmp_path)


def test_folder_must_exist(tmp_path):
    """A missing folder is named."""
    with pytest.raises(ValueError, match=r"nowhere/images does not exist"):
        folder_subjects(tmp_path / "nowhere")


def shifted(mm):
    affine = np.eye(4)
    affine[0, 3] = mm
    return affine


def with_value(value):
    image = noise()
    image[1, 2, 3] = value
    return image


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"image": noise((8, 7))}, r"image of subject \"a\".*needed, not a slice"),
        ({"image": noise((8, 7, 6, 5))}, r"5 volumes of \(8, 7, 6\)"),
        ({"image": with_value(np.nan)}, r"NaN or infinity"),
        ({"image": with_value(np.inf)}, r"NaN or infinity"),
        ({"image": np.ones(SHAPE, dtype=np.float32)}, r"same value in every voxel"),
        ({"label": block(shape=(8, 7, 5))}, r"label .* \(8, 7, 5\) voxels, but .* \(8, 7, 6\)"),
        ({"affine": shifted(3.0)}, r"label .* lies 3 mm away"),
        ({"label": block(2)}, r"whole numbers from 0 to 1, but holds 2\b"),
        ({"label": block().astype(np.int16) * -1}, r"but holds -1"),
        ({"label": block().astype(np.float32) * 0.5}, r"but holds 0\.5"),
    ],
)
def test_check_names_what_is_wrong(tmp_path, files, message):
    """Every unusable volume is refused with what was found in it."""
    pair(tmp_path, "a.nii.gz", **files)
    with pytest.raises(ValueError, match=message):
        check_subject(only(tmp_path), classes=2)


@pytest.mark.parametrize("rest", [b"not a volume", None])
def test_check_refuses_broken_files(tmp_path, rest):
    """A file that is no NIfTI, or only the first half of one, is named."""
    pair(tmp_path, "a.nii.gz", image=noise((32, 32, 32)), label=block(shape=(32, 32, 32)))
    path = tmp_path / "images" / "a.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(rest or gzip.compress(raw[: len(raw) // 2]))
    with pytest.raises(ValueError, match=r"image of subject \"a\" .*a\.nii\.gz\) cannot be read"):
        check_subject(only(tmp_path))


def test_check_takes_good_subjects(tmp_path):
    """Headers that differ by rounding, and any whole classes where none are given, are fine."""
    pair(tmp_path, "a.nii.gz", label=block(7), affine=shifted(1e-3))
    check_subject(only(tmp_path))


def test_phantoms_repeat_and_differ():
    """A cohort is the same each time; its heads and those of the next seed are not."""
    cohort = PhantomCohort(subjects=2, shape=(32, 32, 32))
    first, again = phantom_subjects(cohort), phantom_subjects(cohort)
    other = phantom_subjects(PhantomCohort(subjects=2, shape=(32, 32, 32), seed=1))

    assert torch.equal(first[1]["image"].data, again[1]["image"].data)
    heads = [s["image"].data for s in first + other]
    assert not any(torch.equal(a, b) for n, a in enumerate(heads) for b in heads[:n])
    check_subject(first[0], classes=2)


def test_cohort_needs_a_subject():
    """An empty cohort is refused."""
    with pytest.raises(ValueError, match="subjects=0"):
        PhantomCohort(subjects=0)


def ramp():
    image = torch.arange(8 * 7 * 6, dtype=torch.float32).reshape(1, *SHAPE)
    affine = np.array([[0, 2, 0, 5], [-1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    return tio.Subject(
        image=tio.ScalarImage(tensor=image, affine=affine),
        label=tio.LabelMap(tensor=torch.ones_like(image, dtype=torch.int32), affine=affine),
        name="ramp",
    )


def test_cut_agrees_with_torchio():
    """A patch has the voxels and the place in the world that TorchIO's crop has."""
    ours = cut(ramp(), (1, 2, 3), (4, 3, 2))
    theirs = tio.Crop((1, 3, 2, 2, 3, 1))(ramp())

    for key in ("image", "label"):
        assert torch.equal(ours[key].data, theirs[key].data)
        assert np.allclose(ours[key].affine, theirs[key].affine)
    assert ours["location"].tolist() == [1, 2, 3, 5, 5, 5]


def test_cut_pads_small_volumes():
    """Beyond the volume an image continues with its minimum and a label with 0."""
    subject = ramp()
    subject["image"].set_data(subject["image"].data + 3)
    size = (12, 7, 4)
    start = start_around((4, 3, 3), size, SHAPE)

    patch = cut(subject, start, size)

    assert start == (-2, 0, 1)
    assert patch["image"].spatial_shape == size
    assert torch.equal(patch["image"].data[0, 2:10], subject["image"].data[0, :, :, 1:5])
    assert (patch["image"].data[0, :2] == 3).all()
    assert (patch["image"].data[0, 10:] == 3).all()
    assert patch["label"].data.sum() == 8 * 7 * 4
    world = patch["image"].affine @ [2, 0, 0, 1]
    assert np.allclose(world, subject["image"].affine @ [0, 0, 1, 1])


def test_vessel_centers_match_plain_counting():
    """The first center holds as many vessel voxels as any patch around one; others are apart."""
    label = (torch.rand(16, 14, 12, generator=torch.Generator().manual_seed(0)) > 0.97).int()
    size = (6, 5, 20)

    def held(center):
        i, j, k = start_around(center, size, label.shape)
        return int(label[i : i + 6, j : j + 5, max(k, 0) :].sum())

    centers = vessel_centers(label, size, 4)

    assert held(centers[0]) == max(held(v.tolist()) for v in label.nonzero())
    starts = [start_around(c, size, label.shape) for c in centers]
    for n, a in enumerate(starts):
        assert all(
            max(abs(x - y) / s for x, y, s in zip(a, b, size, strict=True)) >= 0.25
            for b in starts[:n]
        )


def test_vessel_centers_without_vessels():
    """An empty label gives the middle of the volume; a patch as large as the volume one place."""
    assert vessel_centers(torch.zeros(8, 6, 4), (4, 4, 4), 3) == [(4, 3, 2)]
    assert len(vessel_centers(torch.ones(8, 6, 4), (8, 6, 4), 3)) == 1


def test_preprocessing_draws_no_random_number():
    """Preprocessing leaves the global generator alone and gives float32 and int32."""
    subject = ramp()
    before = torch.get_rng_state()
    done = preprocessed(subject, tio.Compose([tio.ToCanonical(), tio.RandomNoise()]))

    assert torch.equal(torch.get_rng_state(), before)
    assert done["image"].data.dtype is torch.float32
    assert done["label"].data.dtype is torch.int32
    assert done["image"].orientation == ("R", "A", "S")


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (tio.ZNormalization(masking_method=lambda x: x > 1e9), "gave NaN or infinity"),
        (tio.Lambda(lambda x: x.reshape(1)), "failed: shape"),
    ],
)
def test_failing_preprocessing_names_the_subject(step, message):
    """An error inside a transform, or NaN out of it, says whose volume it was."""
    with pytest.raises(ValueError, match=rf'preprocessing of subject "ramp" {message}'):
        preprocessed(ramp(), step)
