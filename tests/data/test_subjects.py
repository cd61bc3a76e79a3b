from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import torchio as tio

from lightning_segxai.data.preparation import preprocessed
from lightning_segxai.data.subjects import PhantomCohort, check_subject, file_stem

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


def subject_of(**paths):
    """A subject of image files, read later; those that end in ``weights`` are no labels."""
    scalars = ("image", "weights")
    images = {
        key: (tio.ScalarImage if key in scalars else tio.LabelMap)(path, verify_path=False)
        for key, path in paths.items()
    }
    return tio.Subject(images, name="a")


def pair(root, image=None, label=None, affine=None):
    return subject_of(
        image=write(root / "images" / "a.nii.gz", noise() if image is None else image),
        label=write(root / "labels" / "a.nii.gz", block() if label is None else label, affine),
    )


def series(folder, uid="1.2.3.1", slices=range(6), start_mm=0.0, ending=".dcm"):
    """A DICOM series of slices 0.8 mm apart."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    for k in slices:
        array = np.random.default_rng(k).integers(0, 1000, (7, 8), dtype=np.int16)
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((0.5, 0.6))
        for tag, value in {
            "0008|0060": "MR",
            "0008|0018": f"{uid}.{k + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(k + 1),
            "0020|0032": f"0\\0\\{start_mm + 0.8 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}-{start_mm}-{k}{ending}"))
        writer.Execute(image)
    return folder


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
    with pytest.raises(ValueError, match=message):
        check_subject(pair(tmp_path, **files), classes=2)


@pytest.mark.parametrize("rest", [b"not a volume", None])
def test_check_refuses_broken_files(tmp_path, rest):
    """A file that is no NIfTI, or only the first half of one, is named."""
    subject = pair(tmp_path, image=noise((32, 32, 32)), label=block(shape=(32, 32, 32)))
    path = tmp_path / "images" / "a.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(rest or gzip.compress(raw[: len(raw) // 2]))
    with pytest.raises(ValueError, match=r"image of subject \"a\" .*a\.nii\.gz\) cannot be read"):
        check_subject(subject)


def test_check_takes_good_subjects(tmp_path):
    """Headers that differ by rounding, and any whole classes where none are given, are fine."""
    check_subject(pair(tmp_path, label=block(7), affine=shifted(1e-3)), labeled=True)
    check_subject(pair(tmp_path, label=block(0)), classes=2)


def test_labels_are_needed_where_they_are_asked_for(tmp_path):
    """Without a label, or without a vessel in it, there is nothing to learn."""
    subject = pair(tmp_path, label=block(0))
    with pytest.raises(ValueError, match=r"label of .*has no vessel voxel"):
        check_subject(subject, labeled=True)
    alone = tio.Subject(image=subject["image"], name="a")
    check_subject(alone)
    with pytest.raises(ValueError, match=r"image of .*has no label"):
        check_subject(alone, labeled=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [(np.full(SHAPE, -1.0), "between -1 and -1"), (np.zeros(SHAPE), "between 0 and 0")],
)
def test_weights_must_be_weights(tmp_path, weights, message):
    """Patches cannot be drawn by negative weights, nor by none."""
    image = write(tmp_path / "a.nii", noise())
    good = write(tmp_path / "good.nii", block().astype(np.float32))
    check_subject(subject_of(image=image, weights=good))
    bad = write(tmp_path / "bad.nii", weights)
    with pytest.raises(ValueError, match=rf"weights of subject \"a\" .*{message}"):
        check_subject(subject_of(image=image, weights=bad))


OTHERS = ["nrrd", "nhdr", "mha", "mhd"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("ending", OTHERS)
def test_other_formats_are_checked_too(tmp_path, ending, kind, value):
    """NRRD and MetaImage are read as they are, and NaN or infinity in them is found."""
    path, good = tmp_path / f"a.{ending}", noise().T.astype(kind)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(good), path)
    subject = subject_of(image=path)
    check_subject(subject)
    assert np.array_equal(subject["image"].data[0].numpy(), good.T)

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(with_value(value).T.astype(kind)), path)
    with pytest.raises(ValueError, match=r"NaN or infinity"):
        check_subject(subject_of(image=path))


@pytest.mark.parametrize("ending", OTHERS)
def test_other_formats_may_be_broken(tmp_path, ending):
    """A file cut off, or without its data file, and one of several volumes are named."""
    path, many = tmp_path / f"a.{ending}", tmp_path / f"many.{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise()), path)
    data = tmp_path / "a.raw" if (tmp_path / "a.raw").exists() else path
    data.write_bytes(data.read_bytes()[:-99])
    with pytest.raises(ValueError, match=rf"a\.{ending}\) cannot be read.*data file"):
        check_subject(subject_of(image=path))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise((5, 8, 7, 6)), isVector=False), many)
    with pytest.raises(ValueError, match=r"5 volumes of \(6, 7, 8\)"):
        check_subject(subject_of(image=many))


def test_missing_files_are_told(tmp_path):
    """A path to nothing is told as such, and a link to nothing as what DataLad leaves."""
    link = tmp_path / "link.nii"
    link.symlink_to(tmp_path / "annex")
    with pytest.raises(ValueError, match=r"a\.nii\) does not exist\."):
        check_subject(subject_of(image=tmp_path / "a.nii"))
    with pytest.raises(ValueError, match=r"link\.nii\) is a link to nothing; `datalad get` it"):
        check_subject(subject_of(image=link))


def test_a_dicom_series_is_a_volume(tmp_path):
    """A folder with one series is read as one volume, whatever else lies there."""
    folder = series(tmp_path / "case.1")
    (folder / "notes.txt").write_text("a patient")
    subject = subject_of(image=folder)
    check_subject(subject)

    assert subject.spatial_shape == (8, 7, 6)
    assert np.allclose(subject["image"].spacing, (0.5, 0.6, 0.8))
    assert (
        int(subject["image"].data[0, 3, 2, 1])
        == np.random.default_rng(1).integers(0, 1000, (7, 8), dtype=np.int16)[2, 3]
    )


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda f: f.mkdir(), r"without a DICOM series"),
        (lambda f: series(series(f), uid="1.2.3.2"), r"holds 2: 1\.2\.3\.1 \(6 .*1\.2\.3\.2 \(6"),
        (lambda f: series(f, slices=[0, 1, 3, 4]), r"between 0\.8 and 1\.6 mm apart"),
        (lambda f: series(series(f), start_mm=0.4, slices=[2]), r"between 0\.4 and 0\.8 mm"),
        (lambda f: cut_off(series(f) / "1.2.3.1-0.0-5.dcm", 20), r"no slices .*-5\.dcm"),
        (lambda f: cut_off(series(f, ending="") / "1.2.3.1-0.0-5", -60), r"no slices .*-5\."),
    ],
)
def test_dicom_folders_that_would_give_a_false_volume(tmp_path, capfd, fill, message):
    """No series, several, missing slices and slices that cannot be read are refused."""
    folder = tmp_path / "case"
    fill(folder)
    with pytest.raises(ValueError, match=rf"image of subject \"a\" .*case\) .*{message}"):
        check_subject(subject_of(image=folder))
    assert "WARNING" not in capfd.readouterr().err


def cut_off(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_file_stems():
    """A known ending goes; a DICOM folder's name stays whole."""
    stems = [file_stem(f"x/case.1{e}") for e in (".nii", ".nii.gz", ".nhdr", ".mha", "", "/")]
    assert stems == ["case.1"] * 6


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
