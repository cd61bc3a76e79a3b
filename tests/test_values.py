"""The values: what may be one, and what identifies it."""

from __future__ import annotations

import math
import re

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets_for_tests import a_probe

from lightning_segxai.values import RECORD_COLUMNS, Attribution, Probe, Record, checked_name

IMAGE = torch.arange(24.0).reshape(1, 2, 3, 4)


def probe(**changes):
    return Probe(**{"name": "p", "image": IMAGE} | changes)


@given(st.text(max_size=120))
def test_a_checked_name_is_a_safe_file_name(name):
    """Whatever passes has only harmless characters, no leading dot, and fits."""
    harmless = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    good = 0 < len(name) <= 100 and set(name) <= harmless and name[0] != "."
    if good:
        assert checked_name(name, "probe") == name
    else:
        with pytest.raises(ValueError, match="probe name"):
            checked_name(name, "probe")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "a\n", "<b>", "x" * 101])
def test_a_bad_name_is_refused(name):
    """Path steps, markup and line ends never become a name."""
    with pytest.raises(ValueError, match="cannot become a file name"):
        probe(name=name)


@pytest.fixture
def unchecked():
    """As users run it: the tests' hook would refuse most mistakes before our own errors do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE[0]}, "four axes"),
        ({"image": IMAGE.long()}, "floating-point"),
        ({"image": IMAGE.index_fill(3, torch.tensor([1]), math.nan)}, "NaN or infinity"),
        ({"image": IMAGE / 0}, "NaN or infinity"),
        ({"label": torch.zeros(2, 3, 5, dtype=torch.long)}, "Resample the label"),
        ({"label": torch.full((2, 3, 4), -1)}, "non-negative"),
        ({"label": torch.zeros(2, 3, 4)}, "whole numbers"),
        ({"regions": {"a b": torch.ones(2, 3, 4, dtype=torch.bool)}}, "region name"),
        ({"regions": {"brain": torch.ones(2, 3, 3, dtype=torch.bool)}}, 'region "brain"'),
        ({"regions": {"brain": torch.ones(2, 3, 4)}}, 'region "brain"'),
        ({"spacing_mm": (1.0, 1.0)}, "three positive"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "three positive"),
        ({"spacing_mm": (1.0, math.inf, 1.0)}, "three positive"),
        ({"affine": np.diag([2.0, 1, 1, 1])}, "its affine says"),
        ({"affine": np.eye(3)}, "4x4"),
        ({"affine": np.full((4, 4), np.nan)}, "finite 4x4"),
    ],
)
def test_a_wrong_probe_says_what_is_wrong(changes, message):
    """Each mistake is told with the probe's name, before anything is computed."""
    with pytest.raises(ValueError, match=re.escape(message)):
        probe(**changes)


def test_the_affine_follows_the_spacing():
    """Without an affine, voxel indices times the spacing are millimeters."""
    assert np.array_equal(probe(spacing_mm=(0.5, 1.0, 2.0)).affine, np.diag([0.5, 1.0, 2.0, 1.0]))


def test_a_rotated_affine_keeps_its_spacing():
    """The spacing is the length of the affine's columns, whatever the directions."""
    affine = np.array([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    kept = probe(spacing_mm=(1.0, 2.0, 3.0), affine=affine)

    assert np.array_equal(kept.affine, affine)
    with pytest.raises(ValueError, match="spacing of the affine"):
        probe(spacing_mm=(2.0, 1.0, 3.0), affine=affine)


def test_the_fingerprint_is_of_the_contents():
    """Everything an explanation depends on changes it; the name and the dtype do not."""
    label = torch.zeros(2, 3, 4, dtype=torch.long)
    brain = torch.ones(2, 3, 4, dtype=torch.bool)
    base = probe(label=label, regions={"brain": brain})
    moved = label.clone()
    moved[0, 0, 0] = 1
    affine = np.eye(4)
    affine[0, 3] = 1
    variants = [
        probe(),
        probe(label=label),
        probe(label=moved, regions={"brain": brain}),
        probe(label=label, regions={"head": brain}),
        probe(label=label, regions={"brain": ~brain}),
        probe(label=label, regions={"brain": brain}, image=IMAGE + 1),
        probe(label=label, regions={"brain": brain}, spacing_mm=(1.0, 1.0, 2.0)),
        probe(label=label, regions={"brain": brain}, affine=affine),
        probe(label=label, regions={"brain": brain}, preprocessing="Clamp()"),
    ]

    assert len({p.fingerprint for p in [base, *variants]}) == len(variants) + 1
    assert re.fullmatch("[0-9a-f]{16}", base.fingerprint)
    same = probe(
        name="q", image=IMAGE.double(), label=label.to(torch.uint8), regions={"brain": brain}
    )
    assert same.fingerprint == base.fingerprint


def test_the_fingerprint_never_changes():
    """Runs of different versions of the package stay comparable."""
    assert probe().fingerprint == "4877e367909a71cf"


def test_fingerprints_ignore_memory_layout_and_the_order_of_regions():
    """Strides, negative zeros in the affine and the order of a mapping are not contents."""
    one, two = torch.ones(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)
    strided = IMAGE.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    affine = np.eye(4)
    affine[0, 1] = -0.0

    a = probe(regions={"a": one, "b": two})
    b = probe(image=strided, regions={"b": two, "a": one}, affine=affine)
    assert a.fingerprint == b.fingerprint


def attribution(**changes):
    p = a_probe((2, 2, 2))
    empty = torch.zeros(2, 2, 2)
    return Attribution(
        **{
            "probe": p,
            "target": "t",
            "method": "m",
            "layer": "",
            "values": empty,
            "unit": "logit",
            "region": empty.bool(),
            "prediction": empty.long(),
            "score": 0.0,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("error", "cancellation", "doubtful"),
    [
        (None, None, False),
        (0.1, 1000.0, False),
        (0.11, None, True),
        (0.0, 1001.0, True),
        (None, 1e6, True),
    ],
)
def test_a_map_that_breaks_its_axiom_is_doubtful(error, cancellation, doubtful):
    """Above 10 % error, or a thousandfold cancellation."""
    assert attribution(completeness_error=error, cancellation=cancellation).doubtful is doubtful


def test_records_have_the_columns_of_the_design():
    """The header of records.csv is a contract."""
    assert ",".join(RECORD_COLUMNS) == (
        "run,epoch,step,probe,fingerprint,target,method,layer,metric,unit,value,status"
    )


def test_a_record_has_one_of_five_statuses():
    """Another status is refused with the list."""
    values = ("r", 0, 0, "p", "f", "t", "m", "", "dice", "1", math.nan)
    for status in ("ok", "empty", "unsupported", "failed", "nonfinite"):
        assert Record(*values, status=status).status == status
    with pytest.raises(Exception, match="bad"):
        Record(*values, status="bad")
