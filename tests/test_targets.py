"""Targets: which logits count."""

from __future__ import annotations

import pytest
import torch
from nets_for_tests import Weigh, a_probe

from lightning_segxai.examine import examine
from lightning_segxai.methods.gradients import Saliency
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin, VoxelEvidence, voxels
from lightning_segxai.values import Probe, UnsupportedError

# four voxels: truth and prediction are (0, 0), (0, 1), (1, 0), (1, 1)
TRUTH = torch.tensor([0, 0, 1, 1]).reshape(1, 2, 2)
LOGITS = torch.tensor([[2.0, 1.0, 5.0, 0.0], [1.0, 3.0, 4.0, 7.0]]).reshape(2, 1, 2, 2)
PROBE = Probe("four", torch.zeros(1, 1, 2, 2), TRUTH)
BARE = Probe("bare", torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("region", "by_hand"),
    [
        ("truth", [0, 0, 1, 1]),
        ("predicted", [0, 1, 0, 1]),
        ("true_positive", [0, 0, 0, 1]),
        ("false_positive", [0, 1, 0, 0]),
        ("false_negative", [0, 0, 1, 0]),
        ("everywhere", [1, 1, 1, 1]),
    ],
)
def test_the_six_regions_of_class_evidence_by_hand(region, by_hand):
    """Ones on the class's own logits over the region; zeros elsewhere."""
    weights = ClassEvidence(1, region).weights(PROBE, LOGITS)
    expected = torch.tensor(by_hand, dtype=torch.float32).reshape(1, 2, 2)

    assert torch.equal(weights, torch.stack([torch.zeros(1, 2, 2), expected]))
    assert torch.equal(voxels(weights), expected.bool())
    margin = ClassMargin(1, 0, region).weights(PROBE, LOGITS)
    assert torch.equal(margin, torch.stack([-expected, expected]))


def test_the_background_has_regions_too():
    """The regions are those of the class that is named."""
    weights = ClassEvidence(0, "false_positive").weights(PROBE, LOGITS)
    assert weights[0].flatten().tolist() == [0, 0, 1, 0]
    assert not weights[1].any()


def test_a_third_class():
    """Regions of many classes come from the argmax."""
    logits = torch.cat([LOGITS, torch.tensor([[9.0, 0, 0, 0]]).reshape(1, 1, 2, 2)])
    assert ClassEvidence(2, "predicted").weights(PROBE, logits)[2].flatten().tolist() == [
        1,
        0,
        0,
        0,
    ]
    margin = ClassMargin(2, 1, "everywhere").weights(PROBE, logits)
    assert margin.sum(dim=(1, 2, 3)).tolist() == [0, -4, 4]


def test_one_voxel():
    """A single one."""
    weights = VoxelEvidence((0, 1, 0), label=1).weights(PROBE, LOGITS)
    assert weights.nonzero().tolist() == [[1, 0, 1, 0]]
    assert float(weights.sum()) == 1


def test_truth_without_a_label_is_the_prediction():
    """The default target works on every probe."""
    for kind in (ClassEvidence(1), ClassMargin(1, 0)):
        predicted = type(kind)(region="predicted").weights(BARE, LOGITS)
        assert torch.equal(kind.weights(BARE, LOGITS), predicted)


@pytest.mark.parametrize("region", ["true_positive", "false_positive", "false_negative"])
def test_a_comparison_needs_a_label(region):
    """A region that compares with a truth cannot be had without one, and says which probe."""
    with pytest.raises(UnsupportedError, match=r'needs a label, but probe "bare" has none\. Give'):
        ClassEvidence(1, region).weights(BARE, LOGITS)


def test_regions_need_no_label_where_none_is_compared():
    """``everywhere`` and ``predicted`` are the network's."""
    assert ClassEvidence(1, "everywhere").weights(BARE, LOGITS).sum() == 4
    assert ClassEvidence(1, "predicted").weights(BARE, LOGITS).sum() == 2


@pytest.mark.parametrize(
    "target", [ClassEvidence(2), ClassEvidence(-1), ClassMargin(1, 2), VoxelEvidence((0, 0, 0), 5)]
)
def test_a_class_the_network_lacks(target):
    """The error names the target and the classes that there are."""
    with pytest.raises(ValueError, match="its classes are 0 to 1"):
        target.weights(PROBE, LOGITS)


@pytest.mark.parametrize("ijk", [(1, 0, 0), (0, 2, 0), (0, 0, -1)])
def test_a_voxel_outside(ijk):
    """Negative indices do not wrap around."""
    with pytest.raises(ValueError, match=r'lies outside probe "four" of \(1, 2, 2\) voxels'):
        VoxelEvidence(ijk).weights(PROBE, LOGITS)


def test_a_margin_of_a_class_with_itself():
    """It would be zero everywhere."""
    with pytest.raises(ValueError, match="two different classes, but both are 1"):
        ClassMargin(1, 1)


def test_an_unknown_region():
    """The error lists the regions."""
    with pytest.raises(Exception, match="nowhere"):
        ClassEvidence(1, "nowhere").weights(PROBE, LOGITS)


def test_an_empty_region_gives_no_map():
    """Status ``empty``, NaN everywhere, and the reason."""
    probe = Probe("none", torch.randn(1, 4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.long))
    [attribution] = examine(Weigh(0, 1), [probe], {"t": ClassEvidence(1)}, {"m": Saliency()})

    assert attribution.status == "empty"
    assert "no voxel" in attribution.reason
    assert bool(attribution.values.isnan().all())
    assert attribution.values.shape == (4, 4, 4)
    assert attribution.score != attribution.score


def test_a_target_that_cannot_be_had_is_unsupported_and_alone():
    """Other targets of the same probe go on."""
    targets = {"missed": ClassEvidence(1, "false_negative"), "vessel": ClassEvidence(1)}
    missed, vessel = examine(Weigh(0, 1), [a_probe(labeled=False)], targets, {"m": Saliency()})
    assert (missed.status, vessel.status) == ("unsupported", "ok")
    assert "needs a label" in missed.reason


@pytest.mark.parametrize(
    ("net", "outputs", "odds"),
    [
        (Weigh(1), None, 1.0),
        (Weigh(0, 1), None, 1.0),
        (Weigh(1), "sigmoid", 1.0),
        (Weigh(1, 1), "sigmoid", 1.0),
    ],
)
def test_the_threshold_moves_the_prediction(net, outputs, odds):
    """A class counts as predicted where its probability is above the threshold."""
    threshold = 1 / (1 + torch.tensor(-odds).exp()).item()  # a logit of one
    image = torch.tensor([-1.0, 0.5, 0.9, 1.1]).reshape(1, 1, 2, 2).double()
    predictor = Predictor(net, outputs=outputs, threshold=threshold)
    probe = Probe("t", image)
    logits = predictor.predict(image)
    model = ScoredModel.aim(predictor, probe, ClassEvidence(1), logits)

    assert voxels(model.weights).flatten().tolist() == [False, False, False, True]
    by_half = Predictor(net, outputs=outputs)
    half = ScoredModel.aim(by_half, probe, ClassEvidence(1), logits)
    assert voxels(half.weights).flatten().tolist() == [False, True, True, True]
    # the score is of the logits as they are
    assert model.score(logits) == pytest.approx(1.1)


def test_the_threshold_is_not_for_many_exclusive_classes():
    """With softmax over three classes the largest wins."""
    logits = torch.tensor([1.0, 0.9, 0.0]).reshape(3, 1, 1, 1)
    predictor = Predictor(Weigh(1, 1, 1), threshold=0.1)
    assert torch.equal(predictor.decisive(logits), logits)


@pytest.mark.parametrize(
    "target", [ClassEvidence(0), ClassEvidence(0, "everywhere"), VoxelEvidence((0, 0, 0), 0)]
)
def test_a_sigmoid_background_has_no_logit_to_explain(target):
    """It would be a map of zeros; the error says what to ask instead."""
    with pytest.raises(
        ValueError, match=r"background of a sigmoid network.*ClassMargin\(label=0, versus=1\)"
    ):
        examine(Weigh(1), [a_probe()], {"t": target}, {"m": Saliency()})


def test_a_sigmoid_background_against_its_class():
    """That can be explained: it is the class's logit, negative."""
    probe = a_probe()
    [back] = examine(Weigh(2), [probe], {"t": ClassMargin(0, 1)}, {"m": Saliency(absolute=False)})
    region = (probe.label == 0).double()
    assert torch.allclose(back.values, -2 * region / region.sum())
