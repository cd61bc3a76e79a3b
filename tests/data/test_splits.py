from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_segxai.data.sources import PhantomSubject, SubjectFiles
from lightning_segxai.data.splits import assign_splits, check_shares, split_rows
from lightning_segxai.data.subjects import PhantomCohort


def volumes(*counts):
    """As many volumes of each subject."""
    return [
        SubjectFiles(f"s{n}_{m}.nii", subject=f"s{n}")
        for n, count in enumerate(counts)
        for m in range(count)
    ]


def said(**splits):
    return [SubjectFiles(f"{name}.nii", split=split) for name, split in splits.items()]


def by_name(sources, **settings):
    settings = {"validation_share": 0.3, "seed": 0, **settings}
    return dict(zip([s.name for s in sources], assign_splits(sources, **settings), strict=True))


COUNTS = st.lists(st.integers(1, 3), min_size=3, max_size=12).map(lambda c: volumes(*c))
SHARES = st.floats(0.01, 0.49)
SEEDS = st.integers(0, 10_000)


@given(COUNTS, SHARES, st.just(0.0) | SHARES, SEEDS, st.randoms())
def test_subjects_are_never_parted(sources, share, test_share, seed, random):
    """Each subject is in one split, no split that is asked for is empty, the order is nothing."""
    settings = {"validation_share": share, "test_share": test_share, "seed": seed}
    splits = by_name(sources, **settings)

    subjects = Counter(s for s, _ in {(s.subject, splits[s.name]) for s in sources})
    assert set(subjects.values()) == {1}
    assert set(splits.values()) == {"train", "val"} | ({"test"} if test_share else set())
    shuffled = random.sample(sources, len(sources))
    assert by_name(shuffled, **settings) == splits


@given(COUNTS, st.integers(2, 5), st.sampled_from([0.0, 0.2]), SEEDS)
def test_folds_share_the_subjects_out(sources, folds, test_share, seed):
    """Every subject that is not tested on is validated on in exactly one fold, in equal parts."""
    if len({s.subject for s in sources}) < folds + bool(test_share):
        sources = volumes(*[1] * (folds + 1))
    splits = [
        by_name(sources, test_share=test_share, fold=fold, folds=folds, seed=seed)
        for fold in range(folds)
    ]
    validated = [{s.subject for s in sources if split[s.name] == "val"} for split in splits]
    tested = [{s.subject for s in sources if split[s.name] == "test"} for split in splits]

    assert all(part == tested[0] for part in tested)
    assert bool(tested[0]) is bool(test_share)
    assert sum(map(len, validated)) == len(set.union(*validated))
    assert set.union(*validated) == {s.subject for s in sources} - tested[0]
    assert max(map(len, validated)) - min(map(len, validated)) <= 1
    assert all("train" in split.values() for split in splits)


def test_the_seed_decides():
    """Another seed gives another split."""
    sources = volumes(*[1] * 10)
    assert len({str(by_name(sources, seed=seed)) for seed in range(5)}) > 3


@pytest.mark.parametrize(
    ("share", "count"), [(0.01, 1), (0.2, 2), (0.25, 2), (0.35, 4), (0.6, 6), (0.99, 9)]
)
def test_the_share_is_of_subjects_first_in_a_drawn_order(share, count):
    """Splits of earlier versions stay: the first of torch's permutation are validated on."""
    splits = by_name(volumes(*[1] * 10), validation_share=share, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()

    assert {n for n in range(10) if splits[f"s{n}_0"] == "val"} == set(order[:count])


def test_splits_that_are_said_are_kept():
    """Words for the splits may differ in case and form; the seed moves nobody."""
    words = {"a": "Training", "b": "TRAIN", "c": "dev", "d": "valid", "e": "testing", "f": "val"}
    expected = dict(zip("abcdef", ["train"] * 2 + ["val"] * 2 + ["test", "val"], strict=True))
    assert by_name(said(**words)) == by_name(said(**words), seed=9) == expected


def test_validation_is_drawn_from_the_training_that_is_said():
    """A table that only says who is tested on leaves the validation to the share and the seed."""
    sources = said(**dict.fromkeys("abcdefgh", "train"), x="test", y="test")
    splits = by_name(sources, validation_share=0.25)

    assert Counter(splits.values()) == {"train": 6, "val": 2, "test": 2}
    assert splits["x"] == splits["y"] == "test"
    assert len({str(by_name(sources, seed=seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": 1.0}, r"validation_share=1\.0\)` must lie between 0 and 1"),
        ({"validation_share": float("nan")}, r"validation_share=nan"),
        ({"test_share": 1.0}, r"test_share=1\.0\)` must be 0, or between 0 and 1"),
        ({"test_share": -0.1}, r"test_share=-0\.1"),
        ({"validation_share": 0.5, "test_share": 0.5}, r"together be less than 1"),
        ({"fold": 0}, r"fold=0, folds=None\)` needs both"),
        ({"folds": 3}, r"fold=None, folds=3\)` needs both"),
        ({"fold": 0, "folds": 1}, r"folds=1\)` must be at least 2"),
        ({"fold": 3, "folds": 3}, r"fold=3\)` must be from 0 to 2"),
        ({"fold": -1, "folds": 3}, r"fold=-1\)` must be from 0 to 2"),
        ({"fold": 0, "folds": 4}, r"at least 4 subjects .*found 3 in all: s0, s1, s2"),
        ({"fold": 0, "folds": 3, "test_share": 0.1}, r"at least 3 .*beside 1 to test on"),
    ],
)
def test_numbers_out_of_range(settings, message):
    """Every number that cannot be had is refused with what could be."""
    with pytest.raises(ValueError, match=message):
        by_name(volumes(2, 2, 1), **settings)


def test_numbers_are_refused_before_any_subject_is_known():
    """A constructor can ask, and good numbers pass."""
    check_shares(0.2, 0.1, None, None)
    check_shares(0.99, 0.5, 1, 2)  # folds decide, not the share
    with pytest.raises(ValueError, match=r"fold=2\)` must be from 0 to 1"):
        check_shares(0.2, 0.0, 2, 2)
    with pytest.raises(ValueError, match=r"validation_share=0\)` must lie between 0 and 1"):
        check_shares(0, 0.0, None, None)


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        (volumes(3), {}, r"at least 2 subjects .*found 1 in all: s0"),
        (volumes(1, 1), {"test_share": 0.3}, r"at least 2 .*beside 1 to test on.*found 2"),
        ([], {}, r"found 0"),
        (said(a="train") * 2 + said(b="val"), {}, r"name of its own, but several are a\."),
        (said(a="train", b="", c="val", d=""), {}, r"say none: b, d"),
        (said(a="train", b="eval"), {}, r"one of train, .*but got 'eval' of b"),
        (said(a="val", b="test"), {}, r"at least one to train on, but leave None"),
        (said(a="train", b="test"), {}, r"at least two to train and to validate on, but leave a\."),
        (said(a="train", b="val"), {"fold": 0, "folds": 2}, r"fold=0, folds=2.*own splits"),
        (said(a="train", b="val"), {"test_share": 0.1}, r"test_share=0\.1.*own splits"),
        (
            [
                SubjectFiles(f"{name}.nii", subject=subject, split=split)
                for name, subject, split in [
                    ("a1", "a", "train"),
                    ("a2", "a", "val"),
                    ("b1", "b", "test"),
                    ("b2", "b", "train"),
                    ("c1", "c", "train"),
                ]
            ],
            {},
            r"not so those of a \(train, val\), b \(test, train\)\.",
        ),
    ],
)
def test_sources_that_cannot_be_split(sources, settings, message):
    """Too few subjects, and splits that are incomplete or divide a subject, are named."""
    with pytest.raises(ValueError, match=message):
        by_name(sources, **settings)


def test_rows_of_the_split_table():
    """Rows share their columns: what is fixed, then all metadata; paths are as they were given."""
    sources = [
        SubjectFiles("x/a.nii", "y/a.nii", subject="p", metadata={"age": "63", "name": "Z"}),
        SubjectFiles("/b.nii", metadata={"site": "Ulm"}),
        PhantomSubject(PhantomCohort(), 3),
    ]
    rows = split_rows(sources, ["train", "val", "test"])

    assert list(rows[0]) == ["name", "subject", "split", "image", "label", "age", "site"]
    assert [list(row.values()) for row in rows] == [
        ["a", "p", "train", "x/a.nii", "y/a.nii", "63", ""],
        ["b", "b", "val", "/b.nii", "", "", "Ulm"],
        ["phantom-03", "phantom-03", "test", "", "", "", ""],
    ]
