"""Targets on pieces, borders and the centerline of vessels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets_for_tests import Weigh, a_probe

from lightning_segxai.examine import examine
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.structures import BorderEvidence, ComponentEvidence, GraphEvidence
from lightning_segxai.targets import voxels
from lightning_segxai.values import Probe, UnsupportedError

SHAPE = (9, 10, 12)
PIECES = ("largest_missed", "largest_false", "largest_predicted", "largest_true")
PLACES = ("endpoints", "bifurcations", "thin", "thick")


def blocks(*boxes, shape=SHAPE):
    """A mask with these boxes, each a start and a stop along i, j, k."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for (i, j, k), (to_i, to_j, to_k) in boxes:
        mask[i:to_i, j:to_j, k:to_k] = True
    return mask


def labeled(truth, spacing_mm=(1.0, 1.0, 1.0)):
    """A probe with this label."""
    label = truth.long()
    return Probe("known", torch.zeros(1, *label.shape).double(), label, spacing_mm)


def says(predicted, classes=2):
    """Logits of a network that predicts class 1 there and class 0 elsewhere."""
    logits = torch.full((classes, *predicted.shape), -9.0, dtype=torch.float64)
    logits[0] = 0
    logits[1] = predicted.double() * 2 - 1
    return logits


def region(target, truth, predicted, **probe):
    """The voxels that a target weights, after a look at the weights themselves."""
    weights = target.weights(labeled(truth, **probe), says(predicted))
    assert weights.dtype == torch.float64
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert not weights[0].any()
    return voxels(weights)


# two pieces that the network misses, one that both have, two that it invents
BOTH = ((4, 4, 4), (5, 6, 7))
MISSED = ((0, 0, 0), (1, 2, 4)), ((7, 8, 0), (9, 10, 1))
INVENTED = ((0, 0, 9), (3, 1, 12)), ((8, 0, 0), (9, 1, 2))
TRUTH = blocks(BOTH, *MISSED)
PREDICTED = blocks(BOTH, *INVENTED)


@pytest.mark.parametrize(
    ("which", "by_hand"),
    [
        ("largest_missed", MISSED[0]),
        ("largest_false", INVENTED[0]),
        ("largest_predicted", INVENTED[0]),
        ("largest_true", MISSED[0]),
    ],
)
def test_the_four_pieces_by_hand(which, by_hand):
    """Ones on the class's logits over the largest box of its kind; zeros elsewhere."""
    assert torch.equal(region(ComponentEvidence(which), TRUTH, PREDICTED), blocks(by_hand))


def test_a_component_of_both_is_no_missed_one():
    """The largest of all counts for the label and the prediction, not for their difference."""
    large = ((3, 2, 2), (6, 9, 11))
    truth, predicted = blocks(large, *MISSED), blocks(large, *INVENTED)

    for which, by_hand in zip(PIECES, (MISSED[0], INVENTED[0], large, large), strict=True):
        found = region(ComponentEvidence(which), truth, predicted)
        assert torch.equal(found, blocks(by_hand)), which


def test_a_shell_is_neither_missed_nor_false():
    """A prediction a voxel too thin or thick misses and invents no vessel; a branch it does."""
    thin, thick = blocks(((3, 4, 2), (6, 7, 10))), blocks(((2, 3, 1), (7, 8, 11)))
    branch = blocks(((4, 8, 5), (5, 10, 6)))  # one voxel wide, upon the thick one
    foot = blocks(((3, 7, 4), (6, 8, 7)))  # the shell below it

    assert not region(ComponentEvidence("largest_missed"), thick, thin).any()
    assert not region(ComponentEvidence("largest_false"), thin, thick).any()
    missed = region(ComponentEvidence("largest_missed"), thick | branch, thin)
    assert torch.equal(missed, branch | foot)
    invented = region(ComponentEvidence("largest_false"), thin, thick | branch)
    assert torch.equal(invented, branch | foot)


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.4))
def test_missed_and_false_are_each_other_s_mirror(seed, share):
    """What the label has and the prediction lacks is false if the two change places."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.rand(5, 6, 7, generator=generator) < share for _ in range(2))

    missed = region(ComponentEvidence("largest_missed"), one, other)

    assert torch.equal(missed, region(ComponentEvidence("largest_false"), other, one))
    assert not (missed & (other | ~one)).any()
    nothing = torch.zeros_like(one)
    assert torch.equal(
        region(ComponentEvidence("largest_missed"), one, nothing),
        region(ComponentEvidence("largest_true"), one, other),
    )


def test_the_border_of_a_cube():
    """A cube of edge 4: 64 - 8 voxels along its border inside, 6 * 16 outside."""
    cube = blocks(((2, 3, 4), (6, 7, 8)))

    inner = region(BorderEvidence("inner"), cube, ~cube)
    outer = region(BorderEvidence("outer"), cube, ~cube)

    assert (int(inner.sum()), int(outer.sum())) == (56, 96)
    assert not (inner & ~cube).any()
    assert not (outer & cube).any()


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_borders_keep_to_their_sides(seed, share):
    """Inner lies in the region, outer outside; each exists where the other does."""
    mask = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(seed)) < share
    for name, truth, predicted in (("truth", mask, ~mask), ("predicted", ~mask, mask)):
        inner = region(BorderEvidence("inner", region=name), truth, predicted)
        outer = region(BorderEvidence("outer", region=name), truth, predicted)
        assert not (inner & ~mask).any()
        assert not (outer & mask).any()
        assert bool(inner.any()) == bool(outer.any()) == bool(mask.any() and not mask.all())


def test_the_border_of_a_prediction_where_there_is_no_label():
    """``truth`` means ``predicted`` on a probe without a label, as for class evidence."""
    bare = Probe("bare", torch.zeros(1, *SHAPE).double())
    for side in ("inner", "outer"):
        by_truth = BorderEvidence(side).weights(bare, says(PREDICTED))
        by_prediction = BorderEvidence(side, region="predicted").weights(bare, says(PREDICTED))
        assert torch.equal(by_truth, by_prediction)
        assert by_truth.any()


def at_places(truth, radius_mm=None, **probe):
    """The voxels at each place of the centerline."""
    nothing = torch.zeros_like(truth)
    found = {}
    for place in PLACES:
        radius = radius_mm if place in ("thin", "thick") else None
        found[place] = region(GraphEvidence(place, radius_mm=radius), truth, nothing, **probe)
    return {place: sorted(map(tuple, mask.nonzero().tolist())) for place, mask in found.items()}


def test_a_straight_tube():
    """Two ends, a radius inside the tips, no bifurcation, and all of it thick."""
    found = at_places(blocks(((3, 3, 2), (6, 6, 10))))

    axis = [(4, 4, k) for k in range(3, 9)]
    assert found == {
        "endpoints": [axis[0], axis[-1]],
        "bifurcations": [],
        "thin": [],
        "thick": axis,
    }


def test_a_t_of_lines():
    """Three ends; where thinning has cut the corner is one bifurcation, neither thin nor thick."""
    bar, stem = ((4, 1, 2), (5, 8, 3)), ((4, 4, 3), (5, 5, 9))

    found = at_places(blocks(bar, stem))

    assert found["endpoints"] == [(4, 1, 2), (4, 4, 8), (4, 7, 2)]
    assert found["bifurcations"] == [(4, 4, 3)]
    assert found["thin"] == []
    assert found["thick"] == [
        *[(4, j, 2) for j in (1, 2, 3)],
        *[(4, 4, k) for k in range(4, 9)],
        *[(4, j, 2) for j in (5, 6, 7)],
    ]


# Through the whole volume: radii without ends. 1 voxel wide, 3 wide, 5 wide.
TUBES = blocks(((2, 2, 0), (3, 3, 14)), ((6, 6, 0), (9, 9, 14)), ((12, 2, 0), (17, 7, 14)),
               shape=(19, 11, 14))  # fmt: skip
AXES = [
    [(i, j, k) for k in range(half, 14 - half)]  # thinning stops half a width before the end
    for half, (i, j) in enumerate([(2, 2), (7, 7), (14, 4)])
]


@pytest.mark.parametrize(
    ("radius_mm", "thin", "thick"),
    [
        (None, AXES[0], AXES[1] + AXES[2]),
        (1.0, [], AXES[0] + AXES[1] + AXES[2]),
        (1.01, AXES[0], AXES[1] + AXES[2]),
        (2.0, AXES[0], AXES[1] + AXES[2]),
        (2.01, AXES[0] + AXES[1], AXES[2]),
        (3.01, AXES[0] + AXES[1] + AXES[2], []),
    ],
)
def test_thin_and_thick_tubes(radius_mm, thin, thick):
    """Radii 1, 2 and 3 mm: below the bound is thin, at least the bound is thick."""
    found = at_places(TUBES, radius_mm)
    assert (found["thin"], found["thick"]) == (sorted(thin), sorted(thick))


def test_the_bound_is_in_millimeters():
    """Voxels of half the edge halve the radii."""
    halved = at_places(TUBES, 1.01, spacing_mm=(0.5, 0.5, 3.0))
    assert (halved["thin"], halved["thick"]) == (sorted(AXES[0] + AXES[1]), sorted(AXES[2]))


@pytest.mark.parametrize("stop", [5, 13, 14])
def test_even_halves_of_two_tubes(stop):
    """Of two tubes the thinner one is thin, whichever is longer."""
    found = at_places(
        blocks(((2, 2, 1), (3, 3, stop)), ((6, 6, 0), (9, 9, 14)), shape=(10, 11, 14))
    )
    assert (found["thin"], found["thick"]) == ([(2, 2, k) for k in range(1, stop)], AXES[1])


def test_a_thin_tube_on_a_thick_one():
    """Where they are joined, the segments of the thick tube and of the branch differ."""
    trunk, branch = ((3, 3, 0), (8, 8, 21)), ((5, 8, 10), (6, 19, 11))
    found = at_places(blocks(trunk, branch, shape=(11, 20, 21)), radius_mm=2.0)

    assert (5, 18, 10) in found["endpoints"]
    assert found["bifurcations"]
    assert {(5, j, 10) for j in range(10, 19)} <= set(found["thin"])
    assert {(5, 5, k) for k in (*range(3, 8), *range(13, 18))} <= set(found["thick"])
    assert not set(found["thin"]) & set(found["thick"])
    assert not set(found["bifurcations"]) & (set(found["thin"]) | set(found["thick"]))


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.6), radius=st.floats(0.1, 3.0))
def test_thin_and_thick_share_the_segments(seed, share, radius):
    """No voxel is both, and together with the bifurcations they are the centerline."""
    mask = torch.rand(6, 7, 8, generator=torch.Generator().manual_seed(seed)) < share
    for bound in (None, radius):
        found = {place: set(voxels) for place, voxels in at_places(mask, bound).items()}
        assert not found["thin"] & found["thick"]
        assert not found["bifurcations"] & (found["thin"] | found["thick"])
        assert found["endpoints"] <= found["thin"] | found["thick"]
        everything = at_places(mask, 1e-9)
        assert found["thin"] | found["thick"] == set(everything["thick"])


@pytest.mark.parametrize("which", ["largest_missed", "largest_false", "largest_true"])
def test_pieces_that_need_a_label(which):
    """They cannot be had without one, and say which probe."""
    with pytest.raises(UnsupportedError, match=r'needs a label, but probe "bare" has none\. Give'):
        ComponentEvidence(which).weights(Probe("bare", torch.zeros(1, *SHAPE)), says(PREDICTED))


def test_the_largest_of_a_prediction_needs_no_label():
    """It is the network's."""
    bare = Probe("bare", torch.zeros(1, *SHAPE))
    weights = ComponentEvidence("largest_predicted").weights(bare, says(PREDICTED))
    assert torch.equal(voxels(weights), blocks(INVENTED[0]))


@pytest.mark.parametrize("place", PLACES)
def test_a_centerline_needs_a_label(place):
    """Also for a prediction there is none."""
    with pytest.raises(UnsupportedError, match=r'needs a label, but probe "bare" has none\. Give'):
        GraphEvidence(place).weights(Probe("bare", torch.zeros(1, *SHAPE)), says(PREDICTED))


@pytest.mark.parametrize("radius_mm", [0.0, -1.0, float("inf"), float("nan")])
def test_a_radius_must_be_one(radius_mm):
    """A bound that parts nothing is refused when the target is made."""
    with pytest.raises(ValueError, match="needs a positive, finite radius_mm, but got"):
        GraphEvidence("thin", radius_mm=radius_mm)


@pytest.mark.parametrize("place", ["endpoints", "bifurcations"])
def test_a_radius_where_none_is_asked_for(place):
    """It would be ignored without a word."""
    with pytest.raises(ValueError, match=f'but got 1.0 at "{place}"'):
        GraphEvidence(place, radius_mm=1.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ComponentEvidence, {"which": "missed"}, "which one of .*largest_missed.*got 'missed'"),
        (BorderEvidence, {"side": "both"}, "side one of .*inner.*outer.*got 'both'"),
        (BorderEvidence, {"region": "everywhere"}, "region one of .*predicted.*got 'everywhere'"),
        (GraphEvidence, {"at": "ends"}, "at one of .*endpoints.*got 'ends'"),
    ],
)
def test_a_choice_that_there_is_not(kind, settings, message):
    """A typing error in a file of settings ends where the file is read."""
    made = object.__new__(kind)  # past the type checker that only the tests have
    for name, value in settings.items():
        object.__setattr__(made, name, value)
    with pytest.raises(ValueError, match=message):
        made.__post_init__()


@pytest.mark.parametrize("kind", [ComponentEvidence, BorderEvidence, GraphEvidence])
def test_a_class_the_network_lacks(kind):
    """The error names the target and the classes that there are."""
    with pytest.raises(ValueError, match=r"label=2.*its classes are 0 to 1"):
        kind(label=2).weights(labeled(TRUTH), says(PREDICTED))


@pytest.mark.parametrize(
    "target",
    [ComponentEvidence("largest_true", 2), BorderEvidence(label=2), GraphEvidence(label=2)],
)
def test_another_class(target):
    """Region and logits are those of the class that is named."""
    truth = 2 * TRUTH.long()
    truth[8, 9, 11] = 1
    weights = target.weights(labeled(truth), says(PREDICTED, classes=3))

    same = type(target)(**{**vars(target), "label": 1})
    assert torch.equal(voxels(weights), region(same, TRUTH, PREDICTED))
    assert weights[2].any()
    assert not weights[:2].any()


@pytest.mark.parametrize(
    "target",
    [
        *[ComponentEvidence(which) for which in PIECES],
        *[BorderEvidence(side) for side in ("inner", "outer")],
        *[GraphEvidence(place) for place in PLACES],
    ],
)
def test_nothing_to_explain(target):
    """Where there is no such place the weights are zero, and the map's status is ``empty``."""
    nothing = torch.zeros(8, 8, 8, dtype=torch.bool)
    assert not region(target, nothing, nothing).any()

    image = -torch.rand(1, 8, 8, 8, dtype=torch.float64) - 1  # `Weigh` then predicts background
    probe = Probe("none", image, nothing.long())
    [attribution] = examine(Weigh(0, 1), [probe], {"t": target}, {"m": Saliency()})
    assert attribution.status == "empty"
    assert bool(attribution.values.isnan().all())


def test_they_are_explained_as_any_target():
    """A network without a neighborhood is explained on the region; without a label, two go on."""
    targets = {
        "missed": ComponentEvidence(),
        "border": BorderEvidence(),
        "ends": GraphEvidence(),
        "largest": ComponentEvidence("largest_predicted"),
    }
    net = Weigh(0, 1)
    truth = blocks(((1, 1, 1), (2, 2, 7)), shape=(8, 8, 8)).long()
    image = torch.full((1, 8, 8, 8), -1.0, dtype=torch.float64)
    image[0, 6, 6, 1:4] = 1.0
    maps = examine(net, [Probe("p", image, truth)], targets, {"m": Saliency()})
    assert [a.status for a in maps] == ["ok"] * 4
    for attribution in maps:
        assert torch.equal(attribution.values != 0, attribution.region)
    bare = examine(net, [a_probe(labeled=False)], targets, {"m": Saliency()})
    assert [a.status for a in bare] == ["unsupported", "ok", "unsupported", "ok"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "target", [*map(ComponentEvidence, PIECES), BorderEvidence(), *map(GraphEvidence, PLACES)]
)
def test_logits_on_another_device(target):
    """The weights lie where the logits do, and are the same."""
    here, there = says(PREDICTED), says(PREDICTED).cuda()
    weights = target.weights(labeled(TRUTH), there)

    assert weights.device == there.device
    assert torch.equal(weights.cpu(), target.weights(labeled(TRUTH), here))
