"""Alerts: when they are raised, when they are told, and what can never be raised is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_segxai.alerts import Alert, Raised, check_alerts, watch
from lightning_segxai.values import Record

KNOWN = {
    "targets": ("vessel", "vein"),
    "methods": ("saliency", "grad_cam"),
    "metrics": {
        "dice": "probe",
        "region_voxels": "target",
        "mass_inside": "map",
        "rank_correlation/first": "map",
    },
}


def a_row(
    step: int, value: float | None, probe="p", metric="mass", target="vessel", method="ig", unit="1"
) -> Record:
    """A record at an observation; of None, one without a value."""
    missing = value is None
    return Record(
        "run",
        step // 10,
        step,
        probe,
        "f" * 16,
        target,
        method,
        "",
        metric,
        unit,
        math.nan if missing else value,
        "unsupported" if missing else "ok",
    )


def follow(
    alerts: dict[str, Alert], observations: list[list[Record]], history: list[Record] | None = None
) -> tuple[list[Record], list[list[Raised]]]:
    """All records of the alerts, and what was told at each observation, as a run leads to them."""
    history = [] if history is None else history
    said, told = [], []
    for rows in observations:
        records, raised = watch(alerts, history, rows)
        history += [*rows, *records]
        said += records
        told.append(raised)
    return said, told


def single(values: list[float | None]) -> list[list[Record]]:
    """Observations of one probe and cell, from step 10 on."""
    return [[a_row(10 * n, value)] for n, value in enumerate(values, start=1)]


def states(records: list[Record]) -> list[float | None]:
    return [r.value if r.status == "ok" else None for r in records]


def test_it_is_raised_after_so_many_observations_and_told_once():
    """Three in a row: told at the third, raised as long as it lasts, told again after a return."""
    values = [0.6, 0.7, 0.8, 0.9, 0.4, 0.6, 0.6, 0.6]
    said, told = follow({"a": Alert("mass", above=0.5, for_epochs=3)}, single(values))

    assert states(said) == [0, 0, 1, 1, 0, 0, 0, 1]
    assert [len(t) for t in told] == [0, 0, 1, 0, 0, 0, 0, 1]
    assert {(r.metric, r.unit, r.probe, r.target, r.method) for r in said} == {
        ("alert/a", "1", "p", "vessel", "ig")
    }


def test_what_it_says():
    """Name, cell, value, epoch, threshold and for how long."""
    _, told = follow({"out": Alert("mass", above=0.5, for_epochs=2)}, single([0.6, 0.625]))

    assert [str(t) for t in told[1]] == [
        'alert "out": mass of vessel/ig is 0.625 at epoch 2, above 0.5 for 2 observations.'
    ]
    rows = [a_row(10, 42.0, metric="reach", unit="mm")]
    assert str(watch({"far": Alert("reach", above=20)}, [], rows)[1][0]) == (
        'alert "far": reach of vessel/ig is 42 mm at epoch 1, above 20.'
    )
    rows = [a_row(10, 0.125, metric="dice", target="", method="")]
    assert str(watch({"low": Alert("dice", below=0.25)}, [], rows)[1][0]) == (
        'alert "low": dice is 0.125 at epoch 1, below 0.25.'
    )


@pytest.mark.parametrize(
    ("alert", "states_"),
    [(Alert("mass", above=0.5), [0, 0, 1]), (Alert("mass", below=0.5), [1, 0, 0])],
)
def test_the_threshold_itself_is_within(alert, states_):
    """On either side."""
    assert states(follow({"a": alert}, single([0.4, 0.5, 0.6]))[0]) == states_


def test_a_missing_value_ends_the_row():
    """The alert's own record has no value then either, with the same status."""
    values = [0.6, None, 0.6, 0.6, None, 0.6, 0.6]
    said, told = follow({"a": Alert("mass", above=0.5, for_epochs=2)}, single(values))

    assert states(said) == [0, None, 0, 1, None, 0, 1]
    assert [r.status for r in said if math.isnan(r.value)] == ["unsupported"] * 2
    assert [len(t) for t in told] == [0, 0, 0, 1, 0, 0, 1]


def test_the_value_is_the_mean_of_the_probes_that_have_one():
    """0.4 and 0.8 are above 0.5 on average, also beside a probe without a value."""
    rows = [a_row(10, 0.4, "p"), a_row(10, 0.8, "q"), a_row(10, None, "r")]
    said, told = watch({"a": Alert("mass", above=0.5)}, [], rows)

    assert [(r.probe, r.value, r.status) for r in said] == [
        ("p", 1.0, "ok"),
        ("q", 1.0, "ok"),
        ("r", 1.0, "ok"),
    ]
    assert told == [Raised("a", "mass of vessel/ig", "0.6 at epoch 1, above 0.5")]


def test_an_observation_that_does_not_measure_the_metric_does_not_count():
    """It neither ends the row nor lengthens it, and has no record of the alert."""
    other = [a_row(20, 0.1, metric="gini")]
    first, last = [a_row(10, 0.6)], [a_row(30, 0.6)]
    said, told = follow({"a": Alert("mass", above=0.5, for_epochs=2)}, [first, other, last])

    assert [(r.step, r.value) for r in said] == [(10, 0.0), (30, 1.0)]
    assert [len(t) for t in told] == [0, 0, 1]


def test_the_untrained_network_does_not_count():
    """Step 0 has no record of the alert, and is no part of a row."""
    rows = [[a_row(0, 0.9)], [a_row(10, 0.9)], [a_row(20, 0.9)]]
    said, _ = follow({"a": Alert("mass", above=0.5, for_epochs=2)}, rows)

    assert [(r.step, r.value) for r in said] == [(10, 0.0), (20, 1.0)]


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ({}, ["vessel/ig", "vein/cam"]),
        ({"target": "vein"}, ["vein/cam"]),
        ({"method": "ig"}, ["vessel/ig"]),
        ({"target": "vein", "method": "ig"}, []),
    ],
)
def test_each_cell_counts_on_its_own(limits, raised):
    """Two cells that are beyond in turn do not make a row of two; those that stay do."""
    values = {
        ("vessel", "ig"): (0.6, 0.6),
        ("vessel", "cam"): (0.6, 0.1),
        ("vein", "ig"): (0.1, 0.6),
        ("vein", "cam"): (0.6, 0.6),
    }
    rows = [
        [a_row(step, v[n], target=t, method=m) for (t, m), v in values.items()]
        for n, step in enumerate((10, 20))
    ]
    _, told = follow({"a": Alert("mass", above=0.5, for_epochs=2, **limits)}, rows)

    assert told[0] == []
    assert [t.subject for t in told[1]] == [f"mass of {cell}" for cell in raised]


def test_an_alert_that_is_added_on_resume_is_told_of_a_row_that_began_before():
    """What was observed without it counts."""
    history = [row for rows in single([0.6, 0.6, 0.6]) for row in rows]
    alerts = {"a": Alert("mass", above=0.5, for_epochs=2)}
    said, told = follow(alerts, [[a_row(40, 0.7)], [a_row(50, 0.7)]], history)

    assert states(said) == [1, 1]
    assert [[t.finding for t in ts] for ts in told] == [
        ["0.7 at epoch 4, above 0.5 for 4 observations"],
        [],
    ]


VALUES = st.lists(st.sampled_from([0.4, 0.5, 0.6, None]), max_size=12)


@given(VALUES, st.integers(1, 4))
def test_it_is_told_exactly_when_a_plain_count_says_so(values, for_epochs):
    """A counter that goes up while beyond and back to zero otherwise."""
    alert = Alert("mass", above=0.5, for_epochs=for_epochs)
    said, told = follow({"a": alert}, single(values))

    counts = [0]
    for value in values:
        counts.append(counts[-1] + 1 if value == 0.6 else 0)
    expected = [count >= for_epochs for count in counts]
    assert [bool(t) for t in told] == [b and not a for a, b in pairwise(expected)]
    assert states(said) == [
        None if value is None else float(up) for value, up in zip(values, expected[1:], strict=True)
    ]


@given(VALUES, st.integers(0, 12), st.integers(1, 4))
def test_a_resumed_run_tells_what_an_uninterrupted_one_does(values, cut, for_epochs):
    """The records up to the checkpoint are all that it needs."""
    alerts = {"a": Alert("mass", below=0.5, for_epochs=for_epochs)}
    rows = single(values)
    whole, told = follow(alerts, rows)
    before: list[Record] = []
    first, told_first = follow(alerts, rows[:cut], before)
    rest, told_rest = follow(alerts, rows[cut:], before)

    assert list(map(repr, first + rest)) == list(map(repr, whole))
    assert told_first + told_rest == told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, r"either `above` or `below`.*above=None and below=None"),
        ({"above": 1.0, "below": 0.0}, r"above=1\.0 and below=0\.0"),
        ({"above": math.nan}, "finite threshold, but got nan"),
        ({"below": -math.inf}, "finite threshold, but got -inf"),
        ({"above": 0.0, "for_epochs": 0}, "at least 1, but got 0"),
    ],
)
def test_an_alert_that_cannot_be_is_refused(wrong, said):
    """Where it is made."""
    with pytest.raises(ValueError, match=rf'`Alert\("mass"\)` needs .*{said}'):
        Alert("mass", **wrong)


@pytest.mark.parametrize(
    ("name", "alert", "said"),
    [
        ("a/b", Alert("dice", below=0.1), "alert name 'a/b'"),
        ("a", Alert("mass_insde", above=1), r'metric.*"mass_insde"\. Close to it: mass_inside'),
        ("a", Alert("rank_correlation", above=1), r"Close to it: rank_correlation/first\."),
        ("a", Alert("dice", above=1, target="vesel"), r'target.*"vesel"\. Close to it: vessel'),
        ("a", Alert("dice", above=1, method="salency"), r"method.*Close to it: saliency"),
        ("a", Alert("qqq", above=1), r"Close to it: dice, region_voxels, mass_inside"),
        ("a", Alert("dice", above=1, target="vessel"), r"dice is a number of the probe.*`target`"),
        ("a", Alert("region_voxels", above=1, method="saliency"), r"of the target\. .*`method`"),
    ],
)
def test_an_alert_of_what_is_never_computed_is_refused(name, alert, said):
    """With the names close to it."""
    with pytest.raises(ValueError, match=said):
        check_alerts({name: alert}, **KNOWN)


def test_an_alert_of_what_is_computed_is_accepted():
    """Of a map, of a target, of a probe."""
    check_alerts(
        {
            "map": Alert("rank_correlation/first", below=0, target="vein", method="grad_cam"),
            "target": Alert("region_voxels", below=5, target="vessel"),
            "probe": Alert("dice", below=0.1),
        },
        **KNOWN,
    )
