"""The data before a training: the table's numbers, each problem by its name, and the pictures."""

import csv
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from PIL import Image
from rich.console import Console

from lightning_segxai import colors
from lightning_segxai.contact_sheet import EDGE, Frame, contact_sheet
from lightning_segxai.data.intensity import PercentileScaling
from lightning_segxai.data.module import MRADataModule
from lightning_segxai.data.subjects import PhantomCohort
from lightning_segxai.data.survey import survey
from lightning_segxai.inspection import inspect_data, subject_table
from lightning_segxai.values import Probe

SHAPE = (24, 20, 16)
AFFINE = np.diag([0.5, 0.5, 0.8, 1.0])


def scan(seed: int) -> np.ndarray:
    """Positive noise, and at the patient's right, anterior a block of 64 bright voxels."""
    image = np.random.default_rng(seed).uniform(10, 30, SHAPE).astype(np.float32)
    image[18:22, 14:18, 6:10] = 400 + np.arange(64).reshape(4, 4, 4)
    return image


def truth() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[18:22, 14:18, 6:10] = 1
    return label


class Table:
    """Files and a CSV of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[list[str]] = []

    def add(self, name, image, label, split="train", *, subject="", affine=AFFINE, moved=AFFINE):
        nib.Nifti1Image(image, affine).to_filename(self.root / f"{name}.nii.gz")
        if label is not None:
            nib.Nifti1Image(label, moved).to_filename(self.root / f"{name}-label.nii.gz")
        files = [f"{name}.nii.gz", "" if label is None else f"{name}-label.nii.gz"]
        self.rows.append([name, *files, split, subject or name])

    def module(self, **settings) -> MRADataModule:
        text = io.StringIO()
        csv.writer(text).writerows([["name", "image", "label", "split", "subject"], *self.rows])
        (self.root / "table.csv").write_text(text.getvalue())
        small = {"patch_size": 16, "batch_size": 3, "samples_per_volume": 4, "cache": "memory"}
        return MRADataModule(root=self.root / "table.csv", **(small | settings))


@pytest.fixture
def table(tmp_path) -> Table:
    """Three good volumes of two people."""
    found = Table(tmp_path)
    found.add("one", scan(1), truth(), subject="ann")
    found.add("two", scan(2), truth(), subject="ann")
    found.add("three", scan(3), truth(), "val", subject="bob")
    return found


def looked(data, out, capsys) -> str:
    inspect_data(data, str(out))
    return capsys.readouterr().out


def line(text: str, start: str) -> str:
    return next(row for row in text.splitlines() if row.strip().startswith(start))


def test_the_table_has_the_numbers_of_the_files(table, tmp_path, capsys):
    """In the axes of RAS and before any preprocessing, whatever the files' own axes."""
    image, label = scan(4).transpose(2, 0, 1), truth().transpose(2, 0, 1)
    swapped = AFFINE[:, [2, 0, 1, 3]]  # axes of the file: superior, right, anterior
    table.add("four", image, label, "val", affine=swapped, moved=swapped)
    text = looked(table.module(spacing_mm=0.4), tmp_path / "out", capsys)

    finite = np.sort(scan(4).ravel())
    numbers = [finite[0], finite[3839], finite[int(0.9995 * 7679)], finite[-1]]
    shown = [f"{n:.3g}" if n < 100 else f"{n:,.0f}" for n in numbers]
    share = f"{100 * 64 / 7680:.3g}"
    assert line(text, "four").split() == [
        *["four", "four", "val", "24", "x", "20", "x", "16", "0.5", "x", "0.5", "x", "0.8"],
        *[*shown, share, "64"],
    ]
    assert line(text, "train").split() == ["train", "2", "volumes", "of", "1", "subject"]
    assert line(text, "val").split() == ["val", "2", "volumes", "of", "2", "subjects"]
    assert "none" in line(text, "test")
    assert "8 patches, 4 of each volume, in 3 batches of at most 3" in line(text, "epoch")
    assert "0.5 x 0.5 x 0.8 mm (4); resampled to 0.4 x 0.4 x 0.4 mm (4)" in line(text, "spacing")
    assert "in memory (cache=memory)" in line(text, "kept")
    assert "BalancedSampling(foreground=0.5)" in line(text, "sampling")


def test_the_memory_is_that_of_the_kept_volumes(table):
    """Of float32 images, labels in bytes and the index of the sampling in int32."""
    found = survey(table.module())

    assert [row.nbytes for row in found.rows] == [7680 * 5 + 64 * 4] * 3


def test_the_median_vessel_share_is_that_of_the_drawn_patches(table):
    """The same places that a training draws, without the augmentation."""
    data = table.module(patch_size=8, augmentation=[])
    found = survey(data)
    data.setup()
    shares = [
        float(label.float().mean())
        for batch in data.train_dataloader()
        for label in batch["label"]["data"]
    ]

    assert sorted(found.vessel_shares) == pytest.approx(sorted(shares))


def broken(table: Table) -> MRADataModule:
    """A volume for each thing that can be wrong."""
    nan = scan(5)
    nan[0, 0, 0] = np.nan
    apart = AFFINE.copy()
    apart[:3, 3] = 3
    table.add("nan", nan, truth())
    table.add("unlabeled", scan(6), None)
    table.add("short", scan(7), truth()[:, :, :-1])
    table.add("shifted", scan(8), truth(), moved=apart)
    table.add("empty", scan(9), np.zeros(SHAPE, np.uint8))
    table.add("corrupt", scan(10), truth())
    table.add("again", scan(1), truth(), "val")
    table.add("small", scan(11)[:, :, 4:14], truth()[:, :, 4:14])
    table.add("coarse", scan(12), truth(), affine=AFFINE * 2, moved=AFFINE * 2)
    (table.root / "corrupt.nii.gz").write_bytes(b"no volume")
    return table.module()


def test_each_problem_is_told_by_its_name(table, tmp_path, capsys):
    """In the table and in full, with one line at the end; pictures are made all the same."""
    data = broken(table)
    with pytest.raises(ValueError, match=r"^8 of 12 subjects cannot be used, see above"):
        inspect_data(data, str(tmp_path / "out"))
    text = capsys.readouterr().out

    console = Console(width=400, file=io.StringIO(), markup=False)
    console.print(subject_table(survey(data).rows, 400))
    wide = console.file.getvalue()
    for name, problem in {
        "nan": "image has NaN or infinity",
        "unlabeled": "image has no label",
        "short": "label has (24, 20, 15) voxels, but its image has (24, 20, 16)",
        "shifted": "label lies 3 mm away from its image",
        "empty": "label has no vessel voxel",
        "corrupt": "image cannot be read",
        "one": '"again" (val) have the very same image',
        "again": '"one" (train), "again" (val) have the very same image',
    }.items():
        assert problem in line(wide, name)
        assert sum(row.startswith("error: ") and f'"{name}"' in row for row in text.splitlines())
    assert "- " in line(wide, "corrupt")
    for name in ("two", "three", "small"):
        assert line(wide, name).split()[-1] == "64"
    warned = [row for row in text.splitlines() if row.startswith("warning: ")]
    assert any("smaller than the patch" in row and "small" in row for row in warned)
    assert any("different spacings" in row and "spacing_mm" in row for row in warned)
    assert "10 volumes of 9 subjects, 7 of which cannot be used" in line(text, "train")
    assert Image.open(tmp_path / "out" / "subjects.png").width > 4 * EDGE
    assert (tmp_path / "out" / "patches.png").exists()


def test_a_scaling_that_saturates_vessels_is_told(table, tmp_path, capsys):
    """By its name; not where the file itself is cut off, which is told as that."""
    table.add("cut", np.clip(scan(4), 0, 400), truth())
    scaling = PercentileScaling(upper=99.5, clip=True)
    text = looked(table.module(intensity=scaling), tmp_path / "out", capsys)
    warned = [row for row in text.splitlines() if row.startswith("warning: ")]
    saturated = next(row for row in warned if "`PercentileScaling` saturates" in row)
    cut = next(row for row in warned if "largest value of the file" in row)

    # The 99.5th percentile of 7,680 voxels leaves 40 of them at or above, all of them vessel
    assert f'3 volumes: "one" ({100 * 40 / 64:.2g} %)' in saturated
    assert '1 volume: "cut" (1e+02 %)' in cut or '"cut" (100 %)' in cut
    assert "62 % of vessel" in line(text, "one")


def test_nothing_is_warned_of_where_all_is_well(table, tmp_path, capsys):
    """Not even that one voxel is the brightest."""
    text = looked(table.module(), tmp_path / "out", capsys)

    assert "warning" not in text
    assert "error" not in text
    assert f"pictures: {tmp_path / 'out' / 'subjects.png'}" in text


def test_lines_are_not_cut_in_a_pipe(table, tmp_path, capsys):
    """A name of 60 letters goes on in the next line, and a bracket is no markup."""
    name = "a" * 30 + "b" * 30
    table.add(name, scan(4), truth())
    text = looked(table.module(), tmp_path / "out", capsys)

    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "a" * 30 + "b" * 10 in text
    assert max(map(len, text.splitlines())) > 100


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_narrow_terminal_has_fewer_columns(table, width):
    """Those that stay are whole, and the others are named."""
    data = broken(table)
    rows = survey(data).rows
    console = Console(width=width, file=io.StringIO(), markup=False)
    console.print(subject_table(rows, width))
    text = console.file.getvalue()

    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "24 x 20 x 16" in line(text, "unlabeled")
    assert "0.833" in line(text, "two")
    assert ("without: problems" in text) == (width < 140)


def test_wrong_splits_are_told_beside_the_table(table, tmp_path, capsys):
    """The volumes are looked at all the same."""
    table.rows[0][3] = "nowhere"
    with pytest.raises(ValueError, match="These 3 subjects cannot be used, see above"):
        inspect_data(table.module(), str(tmp_path / "out"))
    text = capsys.readouterr().out

    assert line(text, "three").split()[2] == "?"
    assert "'nowhere' of one" in line(text, "error")
    assert "nothing to train on" in line(text, "epoch")
    assert (tmp_path / "out" / "patches.png").exists()


def test_files_that_are_not_there_are_told_with_their_subjects(table, tmp_path, capsys):
    """The others are shown all the same."""
    (table.root / "one.nii.gz").unlink()
    (table.root / "three-label.nii.gz").unlink()
    with pytest.raises(ValueError, match="2 of 3 subjects cannot be used, see above"):
        inspect_data(table.module(), str(tmp_path / "out"))
    told = capsys.readouterr().out

    assert told.count("does not exist") >= 2
    assert (tmp_path / "out" / "subjects.png").is_file()


def test_subjects_that_cannot_be_listed_are_told_line_by_line(table, tmp_path, capsys):
    """There is no table then; the lines come before the last one."""
    data = table.module()
    (table.root / "table.csv").write_text("image,label\n,x.nii.gz\n,y.nii.gz\n")
    with pytest.raises(ValueError, match="cannot be listed, see above"):
        inspect_data(data, str(tmp_path / "out"))
    told = capsys.readouterr().err.splitlines()

    assert sum("there is no image" in row for row in told) == 2


def test_another_data_module_is_refused(tmp_path):
    """It does not know its subjects."""
    with pytest.raises(ValueError, match=r"needs an `MRADataModule`.* has `dict`"):
        inspect_data({}, str(tmp_path))


def test_right_anterior_is_left_above(table, tmp_path, capsys):
    """As radiologists look at axial images, in millimeters; the label is outlined in its color."""
    looked(table.module(), tmp_path / "out", capsys)
    page = np.asarray(Image.open(tmp_path / "out" / "subjects.png").convert("RGB"))
    # The first tile: 12 x 10 mm, so 240 x 200 pixels
    left, top = 24, first_row(page)
    tile = page[top : top + EDGE, left : left + EDGE]
    shown = tile[20:220]
    bright = (shown.min(axis=2) > 230)[30:170, 20:220]  # without letters
    rows, columns = np.nonzero(bright)

    assert page.shape[1] == 2 * 24 + 3 * EDGE + 2 * 16
    assert (tile[:19] == tile[0, 0]).all()
    assert (tile[221:] == tile[0, 0]).all()
    # i from 18 to 22 of 24, mirrored, at 10 pixels; j from 14 to 18 of 20, from below
    assert columns.min() + 20 == pytest.approx(20, abs=4)
    assert columns.max() + 20 == pytest.approx(59, abs=4)
    assert rows.min() + 30 == pytest.approx(30, abs=10)
    assert rows.max() + 30 == pytest.approx(59, abs=4)
    blue = np.abs(shown.astype(int) - colors.OUTCOMES["true positive"]).max(axis=2) < 60
    rows, columns = np.nonzero(blue)
    assert 60 <= blue.sum() <= 400
    assert columns.max() == pytest.approx(60, abs=4)
    assert rows.max() == pytest.approx(60, abs=4)


def first_row(page: np.ndarray) -> int:
    """Where the first tile begins: its margin beside the volume is dark gray."""
    return int(np.nonzero((page[:, 30] == (58, 61, 67)).all(axis=1))[0][0])


def test_the_same_data_give_the_same_pictures(tmp_path, capsys):
    """And no random number of anybody is used up."""
    cohort = PhantomCohort(subjects=3, shape=(32, 28, 20))
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        data = MRADataModule(phantom=cohort, patch_size=16, samples_per_volume=4)
        looked(data, tmp_path, capsys)
        assert torch.equal(before, torch.get_rng_state())
        made.append([(tmp_path / f"{n}.png").read_bytes() for n in ("subjects", "patches")])

    assert made[0] == made[1]


def test_patches_are_those_of_the_training(table):
    """Of its first batch, augmented, before any volume can have been left out."""
    from lightning_segxai.data.survey import first_patches

    data = table.module(augmentation=[tio.RandomFlip(axes=(0,))])
    shown = first_patches(data, survey(data), batches=1, most=24)
    data.setup()
    batch = next(iter(data.train_dataloader()))

    assert [flat.name for flat, _ in shown] == batch["name"]
    for (flat, share), image, label in zip(
        shown, batch["image"]["data"], batch["label"]["data"], strict=True
    ):
        assert torch.equal(flat.image[0, :, :, 0], image[0].amax(dim=2).flip(0))
        assert share == pytest.approx(float(label.float().mean()))


def test_a_page_keeps_its_measures():
    """Tiles of one size in rows, whatever the volumes and however long the words."""
    probe = Probe("a", torch.rand(1, 4, 30, 1), spacing_mm=(2.0, 0.5, 1.0))
    frames = [Frame("name" * 40, "train", probe, "wrong " * 80), Frame("b", "", None, "why " * 90)]
    page = contact_sheet(frames * 4, title="t" * 300, notes=["n " * 400], sides=True)
    alone = contact_sheet([], title="Nothing to train on", notes=[], sides=False)

    assert page.width == 2 * 24 + 4 * EDGE + 3 * 16
    assert page.height > 2 * EDGE
    assert alone.size[0] == 2 * 24 + 3 * EDGE + 2 * 16
    assert np.asarray(page)[:, :22].min() == 255
    assert np.asarray(page)[:, -22:].min() == 255


def test_more_than_48_subjects_are_told(table, tmp_path, capsys, monkeypatch):
    """Here with a page of two."""
    monkeypatch.setattr("lightning_segxai.inspection._TILES", 2)
    seen = {}
    monkeypatch.setattr(
        "lightning_segxai.inspection.contact_sheet",
        lambda frames, **words: (
            seen.setdefault(len(frames), words) and contact_sheet(frames, **words)
        ),
    )
    looked(table.module(), tmp_path / "out", capsys)

    assert "The first 2 of 3 are shown." in seen[2]["notes"]
