"""What every metric says of probes and maps that leave something to be desired: never an error."""

from __future__ import annotations

import math

import pytest
import torch
from nets_for_tests import layered

from lightning_segxai import InputXGradient, Saliency, assess, examine, measure
from lightning_segxai.defaults import default_metrics, default_shifts
from lightning_segxai.examine import measure_shifts
from lightning_segxai.faithfulness import Deletion, Infidelity, Insertion, Randomization
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.values import Attribution, Probe, Record

SHAPE = (8, 9, 10)
METHODS = {"saliency": Saliency(), "ixg": InputXGradient()}
OF_LABELS = {
    "mass_inside", "rank_inside", "pointing_hit", "average_precision", "mass_0_1_mm",
    "mass_1_3_mm", "mass_3_10_mm", "mass_beyond_10_mm", "thin_share", "medium_share",
    "thick_share", "middle_share",
}  # fmt: skip


def a_label(*voxels: tuple[int, int, int]) -> torch.Tensor:
    label = torch.zeros(SHAPE, dtype=torch.long)
    for voxel in voxels:
        label[voxel] = 1
    return label


LABELS = {
    "none": None,
    "empty": a_label(),
    "one voxel": a_label((3, 4, 5)),
    "a corner": a_label((0, 0, 0)),
    "disconnected": a_label((1, 1, 1), (1, 1, 2), (6, 7, 8), (4, 0, 9)),
    "everything": torch.ones(SHAPE, dtype=torch.long),
}


def seen(
    label: torch.Tensor | None, region: str = "everywhere"
) -> tuple[list[Attribution], list[Record]]:
    """Maps of an anisotropic probe with this label, and all numbers of them."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, *SHAPE), generator=generator, dtype=torch.float64)
    probe = Probe("p", image, label, spacing_mm=(0.5, 0.7, 2.0))
    targets = {"t": ClassEvidence(1, region)}
    maps = examine(layered(), [probe], targets, METHODS)
    rows = measure(maps, default_metrics())
    for attribution in maps:
        rows += measure_shifts(attribution, {"first": maps[0]}, default_shifts())
    held = {"deletion": Deletion(2), "insertion": Insertion(2, by="dice"),
            "infidelity": Infidelity(4), "randomization": Randomization(2)}  # fmt: skip
    return maps, rows + assess(layered(), maps, targets, held, methods=METHODS)


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_say_little(name):
    """What cannot be had is unsupported, all else is a number in its range."""
    _, rows = seen(LABELS[name])
    ranges = {n: m.range for n, m in default_metrics().items()}
    for r in rows:
        assert r.status in ("ok", "unsupported"), (r.metric, r.status)
        assert math.isnan(r.value) == (r.status != "ok")
        if r.status == "ok" and r.metric in ranges:
            assert ranges[r.metric][0] <= r.value <= ranges[r.metric][1]
    missing = {r.metric for r in rows if r.status == "unsupported"} - {"insertion"}
    if name in ("none", "empty"):
        assert missing == OF_LABELS
    elif name == "everything":
        assert missing <= OF_LABELS
    else:
        assert missing == set()


def test_a_target_that_needs_a_label():
    """The map itself is unsupported without one, and so is each number of it."""
    maps, rows = seen(None, "true_positive")
    assert {a.status for a in maps} == {"unsupported"}
    assert {r.status for r in rows} == {"unsupported"}


def test_a_target_without_a_voxel():
    """It is empty; nothing is invented."""
    maps, rows = seen(a_label(), "truth")
    assert {a.status for a in maps} == {"empty"}
    of_maps = [r for r in rows if r.method]
    assert {r.status for r in of_maps} == {"empty"}


def test_a_map_of_zeros():
    """Nothing lies anywhere: every number of it is empty."""
    with torch.no_grad():
        blind = layered()
        for p in blind.parameters():
            p.zero_()
    probe = Probe("p", torch.ones(1, *SHAPE, dtype=torch.float64), LABELS["disconnected"])
    maps = examine(blind, [probe], {"t": ClassEvidence(1)}, METHODS)
    rows = measure(maps, default_metrics())
    rows += measure_shifts(maps[0], {"first": maps[1]}, default_shifts())
    rows += assess(blind, maps, {"t": ClassEvidence(1)}, {"deletion": Deletion(2)})
    of_maps = [r for r in rows if r.method]
    assert {r.status for r in of_maps} == {"empty"}
    assert {r.metric for r in of_maps} >= {*default_metrics(), "deletion", "earth_movers/first"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "positive"),
        ({"spacing_mm": (1.0, -0.5, 1.0)}, "positive"),
        ({"spacing_mm": (1.0, math.nan, 1.0)}, "positive"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    """Spacing that is none; regions of another shape are in `test_values`."""
    with pytest.raises(ValueError, match=message):
        Probe("p", torch.ones(1, *SHAPE), **changes)
