"""What the timeline must remember: first, previous and best map of each cell, and no more files."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_segxai.folder import RunFolder
from lightning_segxai.timeline import Timeline
from lightning_segxai.values import Attribution, Probe

PROBE = Probe("head", torch.zeros(1, 2, 2, 2))


def a_map(step: int, method: str = "ig", **changes) -> Attribution:
    """A map whose every voxel is its step."""
    attribution = Attribution(
        probe=PROBE,
        target="vessel",
        method=method,
        layer="",
        values=torch.full((2, 2, 2), float(step), dtype=torch.float64),
        unit="logit",
        region=torch.ones(2, 2, 2) > 0,
        prediction=torch.zeros(2, 2, 2, dtype=torch.int64),
        score=1.0,
        epoch=step // 10,
        step=step,
    )
    return dataclasses.replace(attribution, **changes)


def live(timeline: Timeline, scores: dict[int, float | None]) -> None:
    """Validations at these steps with these scores."""
    for step, score in scores.items():
        timeline.folder.write_map(a_map(step))
        timeline.advance([a_map(step)], score)


def steps(timeline: Timeline, now: int = 99) -> dict[str, int]:
    return {name: a.step for name, a in timeline.references(a_map(now)).items()}


def files(timeline: Timeline) -> list[int]:
    return sorted(int(p.name[7:13]) for p in timeline.folder.root.rglob("e*.nii.gz"))


def test_references_are_first_previous_and_best(tmp_path):
    """The best is the earlier map with the highest score; all come with their own moment."""
    timeline = Timeline(RunFolder(tmp_path))
    assert timeline.references(a_map(0)) == {}

    live(timeline, {0: 0.1, 10: 0.7, 20: 0.7, 30: 0.5})

    assert steps(timeline) == {"first": 0, "previous": 30, "best": 10}
    best = timeline.references(a_map(99))["best"]
    assert (best.epoch, best.step, best.method) == (1, 10, "ig")
    assert best.values.dtype == torch.float64
    assert torch.equal(best.values, a_map(10).values)


def test_without_scores_there_is_no_best(tmp_path):
    """Probes without labels have no Dice, and NaN is no score."""
    timeline = Timeline(RunFolder(tmp_path))

    live(timeline, {0: None, 10: math.nan})

    assert steps(timeline) == {"first": 0, "previous": 10}


@pytest.mark.parametrize("status", ["failed", "empty", "nonfinite"])
def test_a_cell_without_a_map_is_skipped(tmp_path, status):
    """A failure in between leaves the references as they were; another cell goes on."""
    timeline = Timeline(RunFolder(tmp_path))
    live(timeline, {0: 0.1})

    timeline.folder.write_map(a_map(10, "saliency"))
    timeline.advance([a_map(10, status=status), a_map(10, "saliency")], 0.2)

    assert steps(timeline) == {"first": 0, "previous": 0, "best": 0}
    assert timeline.references(a_map(99, "saliency"))["first"].step == 10


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", [0, 10, 20, 30, 40, 50, 60]),
        ("last", [0, 20, 60]),
        (1, [0, 10, 20, 30, 40, 50, 60]),
        (3, [0, 20, 30, 60]),
        (100, [0, 20, 60]),
    ],
)
def test_keep_says_which_files_stay(tmp_path, keep, kept):
    """First, previous and best stay always; of the others, what `keep` asks for."""
    timeline = Timeline(RunFolder(tmp_path), keep)

    live(timeline, {0: 0.1, 10: 0.2, 20: 0.9, 30: 0.3, 40: 0.4, 50: 0.4, 60: 0.4})

    assert files(timeline) == kept


@pytest.mark.parametrize("keep", [0, -1])
def test_bad_keep_is_refused(keep):
    """A keep that means nothing is said when the timeline is made."""
    with pytest.raises(ValueError, match=r'"all", "last" or a positive number'):
        Timeline(RunFolder(Path("run")), keep)


@settings(max_examples=20, deadline=None)
@given(
    scores=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=6),
    cut=st.integers(0, 5),
    keep=st.sampled_from(["all", "last", 2]),
)
def test_going_on_from_a_checkpoint_is_not_noticed(tmp_path_factory, scores, cut, keep):
    """With the state through a checkpoint in between, references and files are the same."""
    validations = {10 * n: score for n, score in enumerate(scores)}
    early = {step: score for step, score in validations.items() if step < 10 * cut}
    late = {step: score for step, score in validations.items() if step >= 10 * cut}
    straight = Timeline(RunFolder(tmp_path_factory.mktemp("a")), keep)
    live(straight, validations)

    first = Timeline(RunFolder(tmp_path_factory.mktemp("b")), keep)
    live(first, early)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    second = Timeline(first.folder, keep)
    second.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    live(second, late)

    assert second.state_dict() == straight.state_dict()
    assert steps(second) == steps(straight)
    assert files(second) == files(straight)


def test_state_names_maps_relative_to_the_folder(tmp_path):
    """The run's folder may be moved between two parts of a training."""
    timeline = Timeline(RunFolder(tmp_path))
    live(timeline, {0: 0.1})

    assert timeline.state_dict()["cells"] == {
        "head/vessel/ig": dict.fromkeys(
            ("first", "previous", "best"), "maps/head/vessel/ig/e0000-s000000.nii.gz"
        )
    }


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../maps/head/vessel/ig/e0000-s000000.nii.gz",
        "maps/head/../ig/e0000-s000000.nii.gz",
        "maps/head/vessel/ig/notes.txt",
        "probes/head/vessel/ig/e0000-s000000.nii.gz",
        "maps",
        "",
    ],
)
@pytest.mark.parametrize("where", ["cells", "passing"])
def test_a_checkpoint_cannot_name_other_files(tmp_path, name, where):
    """What a checkpoint names is read and may be deleted, so it must be a map of the run."""
    state = {"cells": {}, "passing": {}, "validations": 1, "best_score": 0.5}
    state[where] = {"head/vessel/ig": {"first": name} if where == "cells" else [name]}

    with pytest.raises(ValueError, match=r"as a map|cannot become a file name"):
        Timeline(RunFolder(tmp_path)).load_state_dict(state)


def test_a_missing_file_is_no_reference(tmp_path):
    """Lost maps cost their shift metrics and one warning, not the training."""
    timeline = Timeline(RunFolder(tmp_path))
    live(timeline, {0: None, 10: None})
    path = timeline.folder.map_path("head", "vessel", "ig", 0, 0)
    path.unlink()

    with pytest.warns(UserWarning, match=r"e0000-s000000.nii.gz cannot be read"):
        assert steps(timeline) == {"previous": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(timeline) == {"previous": 10}
    assert not timeline.same_region(a_map(20), "first")


def test_a_cut_file_is_no_reference(tmp_path):
    """A map that some copying program cut short counts as lost."""
    timeline = Timeline(RunFolder(tmp_path))
    live(timeline, {0: None})
    path = timeline.folder.map_path("head", "vessel", "ig", 0, 0)
    path.write_bytes(path.read_bytes()[:20])

    with pytest.warns(UserWarning, match="cannot be read"):
        assert steps(timeline) == {}
    assert not timeline.same_region(a_map(20), "first")


def test_a_moved_region_shows(tmp_path):
    """Maps of the predicted region are compared knowingly: a single voxel makes another region."""
    timeline = Timeline(RunFolder(tmp_path))
    live(timeline, {0: None})
    moved = a_map(10).region.clone()
    moved[0, 0, 0] = False

    assert timeline.same_region(a_map(10), "first")
    assert not timeline.same_region(a_map(10, region=moved), "first")
    assert not timeline.same_region(a_map(10), "best")
