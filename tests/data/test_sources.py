from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import torchio as tio
from jsonargparse import ArgumentParser

from lightning_segxai.data.finding import find_subjects
from lightning_segxai.data.sources import PhantomSubject, SubjectFiles
from lightning_segxai.data.subjects import PhantomCohort, check_subject

SHAPE = (5, 4, 3)
AGED = {"age": "50", "bmi": "22.5", "site": "Ulm", "sex": ""}


def write(path, label=False):
    """A tiny volume in whatever format the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 2 if label else 900, SHAPE).astype(np.uint16)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, np.diag([-1, -1, 1, 1])), path)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.T), path)
    return path


def pair(root, image="a.nii.gz", label=None):
    write(root / "images" / image)
    write(root / "labels" / (label or image), label=True)


def table(root, text, encoding="utf-8"):
    path = root / "subjects.csv"
    path.write_text(text, encoding=encoding)
    return path


def refused(root):
    with pytest.raises(ValueError, match=r".") as caught:
        find_subjects(root)
    return str(caught.value)


# Sources


def test_names_come_from_the_image():
    """Without a name a source is called like its image, and without a subject it is its own."""
    source = SubjectFiles("x/case.1.nii.gz")
    assert (source.name, source.subject, source.split) == ("case.1", "case.1", "")
    assert SubjectFiles("x/case.1/").name == "case.1"
    assert SubjectFiles("x/case.1/", name="b").subject == "b"
    assert SubjectFiles("x/s0.NII.GZ").name == "s0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a b"}, r"subject name 'a b'"),
        ({"maps": {"a b": "x.nii"}}, r"map name 'a b'"),
        ({"maps": {"label": "x.nii"}}, r'Subject "a" cannot have a map named \'label\''),
    ],
)
def test_bad_names_are_refused_at_once(settings, message):
    """Names that cannot be files, or that mean something else, end a run before it starts."""
    with pytest.raises(ValueError, match=message):
        SubjectFiles("a.nii", **settings)


def test_a_source_reads_its_files(tmp_path):
    """All but the image are label maps, so that only it is scaled; voxels stay on disk."""
    paths = {
        name: str(write(tmp_path / f"{name}.nii", name != "image"))
        for name in ("image", "label", "weights", "brain")
    }
    brain = paths.pop("brain")
    subject = SubjectFiles(**paths, name="a", maps={"brain": brain}).read()

    kinds = {key: type(image) for key, image in subject.get_images_dict(False).items()}
    assert kinds == {
        "image": tio.ScalarImage,
        "label": tio.LabelMap,
        "brain": tio.LabelMap,
        "weights": tio.LabelMap,
    }
    assert subject["name"] == "a"
    assert not any(image._loaded for image in subject.get_images(intensity_only=False))
    check_subject(subject, labeled=True)


def test_files_are_all_that_decides(tmp_path):
    """A header brings its data file and a folder its files; none of them is hidden or absolute."""
    write(tmp_path / "case" / "b.dcm")
    write(tmp_path / "case" / "a.dcm")
    (tmp_path / "case" / ".DS_Store").write_text("a Mac's")
    write(tmp_path / "label.mhd")
    write(tmp_path / "brain.nhdr")
    write(tmp_path / "skull.mha")
    source = SubjectFiles(
        str(tmp_path / "case"),
        str(tmp_path / "label.mhd"),
        maps={k: str(tmp_path / f) for k, f in (("s", "skull.mha"), ("b", "brain.nhdr"))},
    )
    found = [path.relative_to(tmp_path).as_posix() for path in source.files]

    headers = ["label.mhd", "label.raw", "brain.nhdr", "brain.raw", "skull.mha"]
    assert found == ["case/a.dcm", "case/b.dcm", *headers]
    assert source.described == "case, image=case, label=label.mhd, b=brain.nhdr, s=skull.mha"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("data file: LIST\nz_1.raw\nz_2.raw\n", ["z_1.raw", "z_2.raw"]),
        ("data file: z_%d.raw 1 2 1\n", ["z_1.raw", "z_2.raw"]),
        ("datafile: of a.raw\n", ["of a.raw"]),
        ("encoding: raw\n\nvoxels", []),
        ("ElementDataFile = of a.raw\n", ["of a.raw"]),
        ("ElementDataFile = Local\nvoxels", []),
        ("ElementDataFile = \n", []),
        ("ElementDataFile =", []),
    ],
)
def test_headers_name_their_data_in_several_ways(tmp_path, named, expected):
    """One file, a list, a pattern, or none where the data follow or where nothing is named."""
    path = tmp_path / "a.nhdr"
    path.write_text(f"NRRD0004\ntype: short\n{named}")
    for name in ("z_1.raw", "z_2.raw", "of a.raw"):
        (tmp_path / name).touch()
    assert [p.name for p in SubjectFiles(str(path)).files] == ["a.nhdr", *expected]


def test_files_that_are_missing_are_told(tmp_path):
    """A path to nothing, and a header whose data file is gone, are named with their subject."""
    path = write(tmp_path / "a.mhd")
    (tmp_path / "a.raw").unlink()
    with pytest.raises(ValueError, match=r'image of subject "a" \(.*a\.raw\) does not exist'):
        _ = SubjectFiles(str(path)).files
    source = SubjectFiles(str(tmp_path / "b.nii"))
    with pytest.raises(ValueError, match=r'image of subject "b" \(.*b\.nii\) does not exist'):
        _ = source.files
    with pytest.raises(ValueError, match=r'image of subject "b" \(.*b\.nii\) does not exist'):
        check_subject(source.read())


def test_a_header_that_names_nothing_is_told(tmp_path):
    """It is a file of the subject, which cannot be read."""
    path = tmp_path / "a.mhd"
    path.write_text("ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementDataFile = \n")
    source = SubjectFiles(str(path))
    assert source.files == (path,)
    with pytest.raises(ValueError, match=r'image of subject "a" .*cannot be read'):
        check_subject(source.read())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Paths from a configuration, which no shell has expanded, are found there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x" / "a.nhdr")
    write(tmp_path / "x" / "b.nii", label=True)
    source = SubjectFiles("~/x/a.nhdr", "~/x/b.nii", maps={"c": "~/x/b.nii"})

    names = ["a.nhdr", "a.raw", "b.nii", "b.nii"]
    assert source.files == tuple(tmp_path / "x" / name for name in names)
    check_subject(source.read(), labeled=True)
    (row,) = find_subjects(table(tmp_path, "image\n~/x/a.nhdr\n"))
    assert row.files == (tmp_path / "x" / "a.nhdr", tmp_path / "x" / "a.raw")


@pytest.mark.parametrize("ending", [".NII", ".NII.GZ", ".NRRD", ".Nhdr"])
def test_endings_in_capitals_are_read(tmp_path, ending):
    """What a scanner's or a Windows program wrote is found, read, and named without its ending."""
    pair(tmp_path, f"a{ending}")
    (source,) = find_subjects(tmp_path)
    assert source.name == "a"
    check_subject(source.read(), labeled=True)


@pytest.mark.parametrize("ending", [".MHA", ".Mhd", ".nii.GZ", ".Nii"])
def test_endings_in_capitals_are_not_left_out(tmp_path, ending):
    """What ITK does not know by capitals is found and told to be renamed."""
    small = write(tmp_path / "images" / f"a{ending.lower()}")
    small.rename(small.with_name(f"a{ending}"))
    write(tmp_path / "labels" / "a.nii", label=True)
    (source,) = find_subjects(tmp_path)
    with pytest.raises(
        ValueError, match=rf'subject "a" .*its ending\. Rename it to {small.name}\.'
    ):
        source.read()


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("name: 7", {"name": "7"}),
        ("name: 0", {"name": "0"}),
        ("name: null", {}),
        ("subject: 1.5", {"subject": "1.5"}),
        ("subject: 01", {"subject": "1"}),
        ('subject: "01"', {"subject": "01"}),
        ("metadata: {age: 50, bmi: 22.5, site: Ulm, sex: null}", {"metadata": AGED}),
    ],
)
def test_numbers_in_a_configuration_need_no_quotes(tmp_path, yaml, expected):
    """They become texts, of what YAML has left of them; what is saved of it reads the same."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--subjects", type=list[SubjectFiles])
    path = tmp_path / "run.yaml"
    path.write_text(f"subjects:\n  - {{image: a.nii, {yaml}}}\n")
    parsed = parser.parse_args([f"--config={path}"])
    assert parser.instantiate(parsed).subjects == [SubjectFiles("a.nii", **expected)]
    path.write_text(parser.dump(parsed))
    again = parser.parse_args([f"--config={path}"])
    assert parser.instantiate(again).subjects == [SubjectFiles("a.nii", **expected)]


def test_sources_are_built_from_a_configuration_file(tmp_path):
    """A list of dictionaries is a list of sources, and what is saved of it reads the same."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--subjects", type=list[SubjectFiles])
    path = tmp_path / "run.yaml"
    path.write_text(
        "subjects:\n"
        '  - {image: a.nii, label: b.nii, subject: "01", split: train, maps: {brain: c.nii}}\n'
        '  - {image: d.nii, weights: e.nii, metadata: {age: "63"}}\n'
    )
    parsed = parser.parse_args([f"--config={path}"])
    expected = [
        SubjectFiles("a.nii", "b.nii", subject="01", split="train", maps={"brain": "c.nii"}),
        SubjectFiles("d.nii", weights="e.nii", metadata={"age": "63"}),
    ]
    assert parser.instantiate(parsed).subjects == expected
    path.write_text(parser.dump(parsed))
    assert parser.instantiate(parser.parse_args([f"--config={path}"])).subjects == expected


def test_phantoms_repeat_and_differ():
    """A cohort is the same each time; its heads and those of the next seed are not."""
    cohorts = [PhantomCohort(subjects=2, shape=(32, 32, 32), seed=seed) for seed in (0, 1)]
    sources = [PhantomSubject(cohort, n) for cohort in cohorts for n in range(2)]
    heads = [source.read() for source in sources]

    again = sources[1].read()["image"].data
    assert torch.equal(heads[1]["image"].data, again)
    images = [head["image"].data for head in heads]
    assert not any(torch.equal(a, b) for n, a in enumerate(images) for b in images[:n])
    assert [source.name for source in sources] == ["phantom-00", "phantom-01"] * 2
    assert len({source.described for source in sources}) == 4
    assert sources[0].files == ()
    assert "brain" in heads[0]
    check_subject(heads[0], classes=2, labeled=True)


def test_a_phantom_is_of_its_cohort():
    """A number beyond the cohort is refused."""
    with pytest.raises(ValueError, match=r"number=2\)` must be one of the cohort's 2"):
        PhantomSubject(PhantomCohort(subjects=2), 2)


# Folders of pairs


def test_folder_gives_pairs_sorted_by_name(tmp_path):
    """A folder's subjects are its image and label pairs, in the order of their names."""
    pair(tmp_path, "b.nii")
    pair(tmp_path, "a.nii.gz")
    (tmp_path / "images" / "notes.txt").write_text("not a volume")
    (tmp_path / "images" / "._a.nii.gz").write_text("a Mac's shadow")
    sources = find_subjects(str(tmp_path))

    assert [s.name for s in sources] == ["a", "b"]
    assert sources[0].read()["label"].data.max() == 1


def test_folder_takes_all_formats(tmp_path):
    """An image and its label may have different endings, and an image may be a DICOM folder."""
    pair(tmp_path, "a.nii", "a.nrrd")
    pair(tmp_path, "b.nrrd", "b.nhdr")
    pair(tmp_path, "c.nhdr", "c.mha")
    pair(tmp_path, "d.mha", "d.mhd")
    pair(tmp_path, "e.mhd", "e/slices.dcm")
    pair(tmp_path, "f.1/slices.dcm", "f.1.nii")
    pair(tmp_path, "g.nii.gz", "g.nii")
    sources = find_subjects(tmp_path)

    assert [s.name for s in sources] == ["a", "b", "c", "d", "e", "f.1", "g"]
    for source in sources:
        check_subject(source.read(), labeled=True)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: (r / "labels" / "a.nii.gz").unlink(), r"labels.* holds none"),
        (lambda r: (r / "labels").rename(r / "masks"), r"labels does not exist"),
        (lambda r: write(r / "labels" / "c.nii.gz"), r"stand alone: .*labels/c\.nii\.gz"),
        (lambda r: write(r / "images" / "a.nrrd"), r"both 'a'"),
        (lambda r: write(r / "images" / "a b.nii"), r"subject name 'a b'"),
    ],
)
def test_folder_refuses_what_it_cannot_pair(tmp_path, break_it, message):
    """Files that do not make pairs are named."""
    pair(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_subjects(tmp_path)


def test_what_is_not_there_is_told_with_all_else(tmp_path):
    """An image without a label, and contents not fetched, are told when subjects are checked."""
    pair(tmp_path)
    write(tmp_path / "images" / "c.nii")
    unfetched(tmp_path / "labels" / "a.nii.gz")
    fetched, alone = find_subjects(tmp_path)

    with pytest.raises(ValueError, match=r'label of subject "a".*is a link to nothing'):
        check_subject(fetched.read(), labeled=True)
    with pytest.raises(ValueError, match=r'label of subject "c" .*c\.nii\.gz\) does not exist'):
        check_subject(alone.read(), labeled=True)


def unfetched(path):
    path.unlink(missing_ok=True)
    path.symlink_to("../.git/annex/objects/x")


@pytest.mark.parametrize(
    ("root", "found"),
    [("nowhere", "does not exist"), ("a.txt", "is a file"), ("", "holds a.txt, old.")],
)
def test_other_roots_are_told_what_is_needed(tmp_path, root, found):
    """Where no subjects can be found, the three forms are listed and what is there."""
    (tmp_path / "a.txt").touch()
    (tmp_path / "old").mkdir()
    told = refused(tmp_path / root)
    assert "a table (.csv), a folder with images/ and labels/, or a BIDS folder" in told
    assert found in told


# Tables


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_tables_name_files(tmp_path, mark):
    """Columns with a meaning are taken, others are metadata; separators may be three."""
    for name in ("a", "b", "brain", "w"):
        write(tmp_path / "x" / f"{name}.nii")
    rows = [
        ["image", "label", "split", "subject", "name", "weights", "map_brain", "age", ""],
        ["x/a.nii", "x/b.nii", "train", "p1", "first", "x/w.nii", "x/brain.nii", "63", "0"],
        [str(tmp_path / "x" / "b.nii"), "", " ", "", "", "", "", ""],
        ["", ""],
    ]
    text = "\n".join(mark.join(row) for row in rows)
    first, second = find_subjects(table(tmp_path, text, "utf-8-sig"))

    here = tmp_path / "x"
    assert first == SubjectFiles(
        str(here / "a.nii"),
        str(here / "b.nii"),
        name="first",
        subject="p1",
        split="train",
        maps={"brain": str(here / "brain.nii")},
        weights=str(here / "w.nii"),
        metadata={"age": "63"},
    )
    assert second == SubjectFiles(str(here / "b.nii"))


def test_columns_with_a_meaning_may_be_in_capitals(tmp_path):
    """A spreadsheet's `Split` is no metadata; a map keeps its name, and metadata its own."""
    text = "IMAGE,Label,Split,Subject,Name,Weights,MAP_Brain,Age,age\na,b,train,p,n,w,m,63,64\n"
    (found,) = find_subjects(table(tmp_path, text))
    a, b, w, m = (str(tmp_path / name) for name in "abwm")
    assert found == SubjectFiles(
        a,
        b,
        name="n",
        subject="p",
        split="train",
        maps={"Brain": m},
        weights=w,
        metadata={"Age": "63", "age": "64"},
    )


def test_a_table_tells_all_its_problems_at_once(tmp_path):
    """Each problem of each row comes with its line, in one error."""
    write(tmp_path / "a.nii")
    write(tmp_path / "y" / "a.nii")
    told = refused(
        table(
            tmp_path,
            "image,label,map_label\na.nii,b.nii,\n,a.nii,\ny/a.nii,,\n\n"
            'not-there.nii,,\na.nii,,a.nii\n"a b.nii",,\na.nii,,,,x\n',
        )
    )
    assert told.splitlines() == [
        f"{tmp_path}/subjects.csv cannot be used as it is:",
        "  line 3: there is no image",
        "  line 4: the name 'a' is that of line 2 too; a column `name` tells volumes apart whose "
        "files have the same name",
        "  line 7: Subject \"a\" cannot have a map named 'label'. Rename it.",
        "  line 8: The subject name 'a b' cannot become a file name. Use letters, digits, '.', "
        "'_' and '-', no leading dot, at most 100 characters.",
        "  line 9: there are 5 cells for 3 columns",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"needs a column `image`, but has None"),
        ("path;label\n", r"needs a column `image`, but has path;label"),
        ("path,label\n", r"needs a column `image`, but has path, label"),
        ("image,age,age\n", r"more than once: age"),
        ("image,Split,split,Name,NAME\n", r"more than once: name, split\."),
        ("image,map_brain,Map_BRAIN\n", r"more than once: map_brain\."),
        ("image\n", r"line 2: there is no row"),
        ('image,label\n"a.nii,b.nii\n', r"line 2: the cells cannot be told apart"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    """A table without images, rows or closed quotes is refused with what it has."""
    with pytest.raises(ValueError, match=message):
        find_subjects(table(tmp_path, text))


def test_tables_are_text(tmp_path):
    """A table in a legacy encoding is refused, for names in it would be wrong."""
    with pytest.raises(ValueError, match=r"not text in UTF-8"):
        find_subjects(table(tmp_path, "image,site\na.nii,Köln\n", "latin-1"))


# BIDS


def bids(root):
    for image in (
        "sub-01/ses-1/anat/sub-01_ses-1_acq-tof_angio.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-tof_angio.nii.gz",
        "sub-02/anat/sub-02_angio.nii",
        "sub-02/anat/sub-02_run-2_angio.nii",
        "sub-02/anat/sub-02_T1w.nii",
    ):
        write(root / image)
    for mask in (
        "manual/sub-01/ses-1/anat/sub-01_ses-1_acq-tof_desc-vessel_mask.nii.gz",
        "manual/sub-01/ses-2/anat/sub-01_ses-2_acq-tof_space-orig_res-1_desc-vessel_mask.nii.gz",
        "manual/sub-01/ses-1/anat/sub-01_ses-1_acq-tof_desc-brain_mask.nii.gz",
        "fmriprep/sub-01/ses-2/anat/sub-01_ses-2_acq-tof_desc-brain_mask.nii.gz",
        "sub-02_desc-vessel_mask.nii",
        "deep/er/sub-02_run-2_desc-vessel_mask.nii",
        ".git/annex/sub-02_desc-vessel_mask.nii",
    ):
        write(root / "derivatives" / mask, label=True)
    (root / "sub-02" / "anat" / "._sub-02_angio.nii").write_text("a Mac's shadow")
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tsplit\nsub-01\t63\tn/a\ttrain\nsub-02\t40\tF\ttest\n"
    )
    return root


def test_bids_matches_masks_to_images(tmp_path):
    """A mask belongs to the image of equal entities; a brain's lies beside the vessels'."""
    sources = find_subjects(bids(tmp_path))

    masks = tmp_path / "derivatives"
    told = [(s.name, s.subject, s.split, s.label, s.metadata) for s in sources]
    one = {"age": "63"}
    two = {"age": "40", "sex": "F"}
    manual = masks / "manual" / "sub-01"
    longer = "sub-01_ses-2_acq-tof_space-orig_res-1_desc-vessel_mask.nii.gz"
    assert [(*row[:3], row[4]) for row in told] == [
        ("sub-01_ses-1_acq-tof", "sub-01", "train", one),
        ("sub-01_ses-2_acq-tof", "sub-01", "train", one),
        ("sub-02", "sub-02", "test", two),
        ("sub-02_run-2", "sub-02", "test", two),
    ]
    assert [row[3] for row in told] == [
        str(manual / "ses-1" / "anat" / "sub-01_ses-1_acq-tof_desc-vessel_mask.nii.gz"),
        str(manual / "ses-2" / "anat" / longer),
        str(masks / "sub-02_desc-vessel_mask.nii"),
        str(masks / "deep" / "er" / "sub-02_run-2_desc-vessel_mask.nii"),
    ]
    assert [list(s.maps) for s in sources] == [["brain"], [], [], []]
    for source in sources:
        check_subject(source.read(), labeled=True)


def test_bids_without_participants(tmp_path):
    """Without the table there is no metadata and no split."""
    (bids(tmp_path) / "participants.tsv").unlink()
    assert {(s.split, str(s.metadata)) for s in find_subjects(tmp_path)} == {("", "{}")}


@pytest.mark.parametrize("quote", ["", '"'])
def test_bids_participants_may_lack_their_prefix(tmp_path, quote):
    """Ids without `sub-`, heads in capitals, R's quotes and people without a scan are fine."""
    rows = [["Participant_ID", "Split"], ["01", "train"], ["sub-02", "val"], ["03", "test"]]
    text = "\n".join("\t".join(f"{quote}{cell}{quote}" for cell in row) for row in rows)
    (bids(tmp_path) / "participants.tsv").write_text(text)
    assert {(s.subject, s.split) for s in find_subjects(tmp_path)} == {
        ("sub-01", "train"),
        ("sub-02", "val"),
    }


def test_bids_participants_of_other_images_are_told(tmp_path):
    """A table of which no row is of any image would silently lose the splits that it gives."""
    table = bids(tmp_path) / "participants.tsv"
    table.write_text("participant_id\tsplit\n" + "".join(f"{n}\ttrain\n" for n in range(1, 9)))
    told = refused(tmp_path).splitlines()[1:]
    assert told == [
        f"  {table} needs the subjects of the images as `participant_id` (sub-01, sub-02), but has "
        "none of them, only sub-1, sub-2, sub-3, sub-4, sub-5, ..."
    ]
    table.write_text("participant_id\tsplit\nn/a\ttrain\nsub-02\tval\n\ttest\n")
    assert refused(tmp_path).splitlines()[1:] == [
        f"  {table}, line {line}: there is no participant_id" for line in (2, 4)
    ]
    table.write_text("participant_id\tsplit\n")
    assert len(find_subjects(tmp_path)) == 4


def test_quotes_are_letters_in_a_tsv(tmp_path):
    """BIDS' tables know no quoting, so that one in a cell takes no other cell with it."""
    (bids(tmp_path) / "participants.tsv").write_text(
        'participant_id\thand\tnote\nsub-01\t"left" handed\t"\nsub-02\tr\t5\' 6"\n'
    )
    found = {s.subject: s.metadata for s in find_subjects(tmp_path)}
    assert found == {
        "sub-01": {"hand": '"left" handed', "note": '"'},
        "sub-02": {"hand": "r", "note": "5' 6\""},
    }


def test_bids_endings_may_be_in_capitals(tmp_path):
    """An image and a mask are found by their names whatever the case of the ending."""
    write(tmp_path / "sub-01" / "anat" / "sub-01_angio.NII")
    mask = write(tmp_path / "derivatives" / "sub-01_desc-vessel_mask.NII.GZ", label=True)
    (source,) = find_subjects(tmp_path)
    assert (source.name, source.label) == ("sub-01", str(mask))


def test_bids_tells_all_its_problems_at_once(tmp_path):
    """Doubled masks and images, and a bad table, come in one error."""
    bids(tmp_path)
    masks, images = tmp_path / "derivatives", tmp_path / "sub-02" / "anat"
    brain = masks / "manual/sub-01/ses-1/anat/sub-01_ses-1_acq-tof_desc-brain_mask.nii"
    write(brain)
    for folder in ("a", "b"):
        write(masks / folder / "sub-02_run-2_desc-vessel_mask.nii")
    write(images / "sub-02_angio.nii.gz")
    (tmp_path / "participants.tsv").write_text("id\tage\n")
    vessels = [masks / n / "sub-02_run-2_desc-vessel_mask.nii" for n in ("a", "b", "deep/er")]
    first = tmp_path / "sub-01/ses-1/anat/sub-01_ses-1_acq-tof_angio.nii.gz"
    expected = [
        f"{tmp_path}/participants.tsv needs a column `participant_id`, but has id\tage",
        f"{first} has 2 brain masks: {brain}, {brain}.gz. Keep one of them",
        f"{images}/sub-02_angio.nii.gz and {images}/sub-02_angio.nii are both 'sub-02'",
        f"{images}/sub-02_run-2_angio.nii has 3 vessel masks: {', '.join(map(str, vessels))}. "
        "Keep one of them",
    ]
    told = [line.strip() for line in refused(tmp_path).splitlines()[1:]]
    assert told == expected


def test_bids_without_a_mask_or_its_contents(tmp_path):
    """They are told when subjects are checked, with all else that is wrong."""
    bids(tmp_path)
    unfetched(tmp_path / "derivatives" / "sub-02_desc-vessel_mask.nii")
    unfetched(tmp_path / "sub-02" / "anat" / "sub-02_run-2_angio.nii")
    write(tmp_path / "sub-02" / "anat" / "sub-02_run-3_angio.nii")
    by_name = {source.name: source for source in find_subjects(tmp_path)}
    for name, told in (
        ("sub-02", r"label .*is a link to nothing; `datalad get` it"),
        ("sub-02_run-2", "image .*is a link to nothing"),
        ("sub-02_run-3", "has no label"),
    ):
        with pytest.raises(ValueError, match=told):
            check_subject(by_name[name].read(), labeled=True)


def test_bids_needs_angiograms(tmp_path):
    """Subjects without an angiogram are told where it would lie, and an unfetched table too."""
    write(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii")
    unfetched(tmp_path / "participants.tsv")
    told = refused(tmp_path)
    assert "sub-*/anat or sub-*/ses-*/anat/sub-*_angio.nii.gz" in told
    assert "participants.tsv is a link to nothing" in told
