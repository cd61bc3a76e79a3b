"""Metrics against what Quantus gave; how, and by which formulas, says `oracles/make_quantus.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets_for_tests import close

from lightning_segxai.explain import explain
from lightning_segxai.faithfulness import (
    Deletion,
    EfficientRandomization,
    FaithfulnessCorrelation,
    Insertion,
    Randomization,
    SensitivityMax,
    randomization,
)
from lightning_segxai.faithfulness.randomization import complexity
from lightning_segxai.focus import (
    Entropy,
    Gini,
    MassInside,
    PointingHit,
    RankCorrelation,
    RankInside,
    StructuralSimilarity,
)
from lightning_segxai.focus.location import topmost
from lightning_segxai.focus.ranks import similarity
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence
from lightning_segxai.values import Probe

ORACLES = Path(__file__).parent / "oracles"
for place in (ORACLES, Path(__file__).parent / "faithfulness", Path(__file__).parent / "focus"):
    sys.path.insert(0, str(place))
from held import map_of, model_of  # noqa: E402 - their folders are no packages
from make_quantus import network, volumes  # noqa: E402
from maps import attribution_of  # noqa: E402

THEIRS = json.loads((ORACLES / "quantus.json").read_text(encoding="utf-8"))


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


VOLUMES = {name: numbers(values) for name, values in THEIRS["volumes"].items()}
LABEL = VOLUMES["label"].long()
INSIDE = LABEL.flatten() > 0
PROBE = Probe("p", VOLUMES["input"][None], LABEL)
TARGET = ClassEvidence(THEIRS["class"], "truth")
BLANKS = {"black": "minimum", 0.0: "zero", 0.75: 0.75}

of_maps = pytest.mark.parametrize("name", THEIRS["of_maps"])
quiet = pytest.mark.filterwarnings("ignore:All outputs of:UserWarning")  # small random weights
flipping = pytest.mark.parametrize(
    "case",
    THEIRS["pixel_flipping"],
    ids=lambda c: f"{c['map']}-{c['blank']}-{c['features_in_step']}",
)


def exactly(value):
    return pytest.approx(value, rel=0, abs=1e-9)


def on_the_label(name):
    return attribution_of(VOLUMES[name], LABEL)


def of_file(randomized=""):
    """The file's network, some of its layers with the weights that Quantus drew for them."""
    net = network()
    net.load_state_dict({k: numbers(v) for k, v in THEIRS["state"].items()})
    for layer in filter(None, randomized.split(",")):
        drawn = THEIRS["mprt"]["weights"][layer]
        net[int(layer)].load_state_dict({k: numbers(v) for k, v in drawn.items()})
    return net


def explained(method, randomized="", image=PROBE.image):
    """Our map of the file's score, the sum over the label."""
    probe = Probe("p", image, LABEL)
    [found] = explain(Predictor(of_file(randomized)), probe, {"t": TARGET}, {"m": method})
    assert found.status == "ok", found.reason
    return found


def faithful(case):
    """The network and the map of a case."""
    values = VOLUMES.get(case["map"])
    values = numbers(THEIRS["input_x_gradient"]) if values is None else values
    model = model_of(of_file(), PROBE, TARGET)
    return model, map_of(model, values)


def test_network_and_volumes_are_the_files():
    """The recipe gives the numbers that the file has."""
    made = volumes()
    assert made.keys() == VOLUMES.keys()
    for name, values in VOLUMES.items():
        close(torch.from_numpy(made[name]).double(), values, 1e-12)
    mine = network().state_dict()
    for key, values in of_file().state_dict().items():
        close(mine[key], values, 1e-12)
    with torch.no_grad():
        score = float(model_of(of_file(), PROBE, TARGET)(PROBE.image[None]))
    assert score == exactly(THEIRS["untouched"])


@of_maps
def test_mass_inside(name):
    """RelevanceMassAccuracy and AttributionLocalisation, with ties and all, of magnitudes.

    By design ours has no signed form. Theirs is signed by default, which is the same where no voxel
    speaks against, and elsewhere no share: it may leave [0, 1].
    """
    theirs = THEIRS["of_maps"][name]
    found = MassInside().measure(on_the_label(name))
    assert found == exactly(theirs["absolute"]["mass"])
    assert found == exactly(theirs["absolute"]["attribution"])
    if bool((VOLUMES[name] >= 0).all()):
        assert found == exactly(theirs["signed"]["mass"])


@of_maps
def test_rank_inside(name):
    """RelevanceRankAccuracy where the last places are not tied.

    By design tied voxels share the last places in ours. Theirs takes those that numpy happens to
    sort first: then ours must lie between the least and the most lucky order.
    """
    size = VOLUMES[name].flatten().abs()
    k = int(INSIDE.sum())
    last = size.sort(descending=True).values[k - 1]
    sure = int(INSIDE[size > last].sum())
    places, tied = k - int((size > last).sum()), size == last
    best = min(places, int(INSIDE[tied].sum()))
    worst = max(0, places - int((~INSIDE)[tied].sum()))
    found = RankInside().measure(on_the_label(name))
    theirs = THEIRS["of_maps"][name]["absolute"]["rank"]
    for number in (found, theirs):
        assert (sure + worst) / k - 1e-9 <= number <= (sure + best) / k + 1e-9
    if name in ("random", "on_label"):
        assert best == worst
        assert found == exactly(theirs)


@pytest.mark.parametrize(("name", "k"), [("random", 5), ("random", 18), ("random", 40)])
def test_the_strongest_voxels(name, k):
    """TopKIntersection: what `RankInside` and `TopOverlap` choose, for any number of voxels."""
    found = topmost(on_the_label(name), k, LABEL > 0).sum() / k
    assert float(found) == exactly(THEIRS["of_maps"][name]["absolute"]["top_k"][str(k)])


@of_maps
def test_pointing_hit(name):
    """PointingGame where one voxel is the strongest.

    By design ours is the share of the strongest voxels inside where there are several; theirs is 1
    when any of them is.
    """
    found = PointingHit().measure(on_the_label(name))
    assert float(found > 0) == THEIRS["of_maps"][name]["absolute"]["pointing"]
    size = VOLUMES[name].abs()
    several = int((size == size.max()).sum()) > 1
    assert several == (name == "ties")
    assert (found in (0.0, 1.0)) == (not several)


@of_maps
def test_gini(name):
    """Sparseness. It adds 1e-7 to each voxel, which lessens it by a factor that is known."""
    total, n = float(VOLUMES[name].abs().sum()), VOLUMES[name].numel()
    theirs = THEIRS["of_maps"][name]["absolute"]["sparseness"]
    assert Gini().measure(on_the_label(name)) == exactly(theirs * (total + n * 1e-7) / total)


@of_maps
def test_entropy(name):
    """Complexity. Its 1e-12 in the logarithm does not show."""
    theirs = THEIRS["of_maps"][name]["absolute"]["complexity"]
    assert Entropy().measure(on_the_label(name)) == exactly(theirs)


@pytest.mark.parametrize("pair", THEIRS["of_pairs"], ids=lambda p: f"{p['one']}-{p['other']}")
def test_likeness(pair):
    """Spearman of magnitudes and of signed maps, with ties; SSIM of all cubes.

    By design our default SSIM takes every fourth cube. The file's is Quantus' function called with
    volumes: its MPRT flattens maps before it compares them, and fails with this function.
    """
    one, other = (attribution_of(VOLUMES[pair[key]]) for key in ("one", "other"))
    assert similarity(one, other) == exactly(pair["spearman_absolute"])
    assert RankCorrelation().measure(one, other) == exactly(pair["spearman_signed"])
    for window, value in pair["ssim"].items():
        metric = StructuralSimilarity(int(window), stride=1)
        assert metric.measure(one, other) == exactly(value)


@flipping
def test_deletion(case):
    """PixelFlipping: the same points.

    By design ours begins with the untouched volume, and is scaled so that the scores of volume and
    blank are 1 and 0. Tied voxels, which these maps do not have, fade together in ours.
    """
    model, attribution = faithful(case)
    steps = len(case["curve"])
    assert steps * case["features_in_step"] == LABEL.numel()
    scores = numbers([THEIRS["untouched"], *case["curve"]])
    theirs = (scores - scores[-1]) / (scores[0] - scores[-1])
    metric = Deletion(steps, BLANKS[case["blank"]])
    close(metric.curve(model, attribution), theirs, 1e-9)
    area = float(torch.trapezoid(theirs, dx=1 / steps))
    assert metric.assess(model, attribution) == exactly(area)
    reverse = map_of(model, -attribution.values)
    assert Insertion(steps, metric.baseline).assess(model, reverse) == exactly(area)


@pytest.mark.parametrize(
    "case", THEIRS["faithfulness_correlation"], ids=lambda c: f"{c['map']}-{c['blank']}"
)
def test_faithfulness_correlation(case, monkeypatch):
    """The same, of the parts that Quantus drew; single voxels are our ``block=1``."""
    model, attribution = faithful(case)
    parts = []
    for subset in case["subsets"]:
        part = torch.zeros(LABEL.numel(), dtype=torch.bool)
        part[subset] = True
        parts.append(part.reshape(LABEL.shape))
    monkeypatch.setattr(FaithfulnessCorrelation, "parts", lambda self, model: iter(parts))
    metric = FaithfulnessCorrelation(len(parts), baseline=BLANKS[case["blank"]], block=1)
    assert metric.assess(model, attribution) == exactly(case["value"])


@quiet
def test_maps_of_the_network():
    """Gradient and input times gradient, which its metrics were given."""
    count = int(INSIDE.sum())  # our maps are of the mean over the label
    product = explained(InputXGradient()).values * count
    close(product, numbers(THEIRS["input_x_gradient"]), 1e-12)
    for randomized, values in THEIRS["mprt"]["maps"].items():
        found = explained(Saliency(absolute=False), randomized).values * count
        close(found, numbers(values), 1e-12)


@pytest.fixture
def theirs_drawn(monkeypatch):
    """Random weights are those that Quantus drew."""
    drawn = {
        f"{layer}.{kind}": numbers(values)
        for layer, weights in THEIRS["mprt"]["weights"].items()
        for kind, values in weights.items()
    }
    monkeypatch.setattr(
        randomization, "randomized", lambda names, *_: {name: drawn[name] for name in names}
    )


@quiet
@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_randomization(order, theirs_drawn):
    """MPRT, layer by layer; ours compares magnitudes, and its number is the mean."""
    method, model = Saliency(absolute=False), model_of(of_file(), PROBE, TARGET)
    metric, own = Randomization(stages=3, order=order), explained(method)
    theirs = [stage["score"] for stage in THEIRS["mprt"]["scores"][order]]
    assert metric.curve(model, own, method).tolist() == exactly(theirs)
    assert metric.assess(model, own, method) == exactly(np.mean(theirs))


@quiet
@pytest.mark.parametrize(
    "case", THEIRS["efficient_mprt"], ids=lambda c: f"{c['abs']}-{c['n_bins']}"
)
def test_efficient_randomization(case, theirs_drawn):
    """EfficientMPRT."""
    method, model = Saliency(absolute=case["abs"]), model_of(of_file(), PROBE, TARGET)
    metric, own = EfficientRandomization(case["n_bins"]), explained(method)
    assert complexity(own.values, case["n_bins"]) == exactly(case["complexity"])
    assert metric.assess(model, own, method) == exactly(case["value"])


@quiet
@pytest.mark.parametrize("absolute", [False, True])
def test_sensitivity(absolute, monkeypatch):
    """MaxSensitivity, of the volumes that it drew; its radius is in intensities."""
    near = [numbers(image)[None] for image in THEIRS["max_sensitivity"]["perturbed"]]
    monkeypatch.setattr(SensitivityMax, "neighbors", lambda self, model: iter(near))
    method, model = Saliency(absolute=absolute), model_of(of_file(), PROBE, TARGET)
    found = SensitivityMax(len(near)).assess(model, explained(method), method)
    way = "absolute" if absolute else "signed"
    assert found == exactly(THEIRS["max_sensitivity"]["values"][f"MaxSensitivity_{way}"])
