"""What is announced as the cost is what goes through the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
from nets_for_tests import Metered, a_probe, layered

from lightning_segxai.assess import assess
from lightning_segxai.cost import Cost, cost, cost_of_assessing
from lightning_segxai.examine import examine
from lightning_segxai.explain import explain
from lightning_segxai.faithfulness import Deletion, RandomBaseline, Randomization, SensitivityMax
from lightning_segxai.methods.cams import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from lightning_segxai.methods.deeplift import DeepLift, DeepLiftShap, LayerDeepLift
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.guided import GuidedBackprop, GuidedGradCAM
from lightning_segxai.methods.layer_integral import LayerIntegratedGradients
from lightning_segxai.methods.layer_paths import (
    InternalInfluence,
    LayerConductance,
    LayerGradientShap,
)
from lightning_segxai.methods.layers import LayerActivation, LayerGradientXActivation
from lightning_segxai.methods.noise import SmoothGrad, SquareGrad, VarGrad
from lightning_segxai.methods.paths import ExpectedGradients, IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
from lightning_segxai.methods.relevance import (
    LRP,
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassEvidence, ClassMargin

ONE = {"vessel": ClassEvidence(1)}
TWO = {"vessel": ClassEvidence(1), "margin": ClassMargin(1, 0)}

GRADIENTS = {"saliency": Saliency(), "ixg": InputXGradient()}
CAMS = {"cam": GradCAM(), "other": GradCAM("body.0"), "hires": HiResCAM(), "act": LayerActivation()}
PATHS = {
    "ig": IntegratedGradients(5, "zero"),
    "same": IntegratedGradients(5, "zero", 5.0),
    "finer": IntegratedGradients(7, "zero"),
    "noise": IntegratedGradients(5, "noise"),
}
LAYERS = {
    "cam-pp": GradCAMPlusPlus(),
    "layercam": LayerCAM("body.0"),
    "gxa": LayerGradientXActivation(),
}
LAYER_PATHS = {
    "conductance": LayerConductance("body.3", 5, "zero"),
    "influence": InternalInfluence("auto", 5, "zero"),
    "layer-ig": LayerIntegratedGradients("auto", 4),
    "coarse-layer-ig": LayerIntegratedGradients("body.0", 1, "noise"),
}
SCATTERED = {
    "expected": ExpectedGradients(6, 3),
    "layer-shap": LayerGradientShap("auto", 6, 3),
    "noisy": ExpectedGradients(6, 3, 0.1),
    "one": LayerGradientShap("body.0", 1, 1),
}
MOMENTS = {
    "smooth": SmoothGrad(Saliency(absolute=False), 3),
    "square": SquareGrad(samples=3),
    "variance": VarGrad(samples=3),
    "cam-pp": VarGrad(GradCAMPlusPlus(), 2),
    "shap": SquareGrad(ExpectedGradients(3, 2), 2),
    "conductance": SmoothGrad(LayerConductance(steps=2), 2),
    "twice": VarGrad(SmoothGrad(HiResCAM(), 2), 3),
}
JOINT = {
    "guided": GuidedBackprop(),
    "guided-cam": GuidedGradCAM(),
    "other-guided-cam": GuidedGradCAM("body.0"),
    "contrast": ContrastiveExcitationBackprop(),
    "excited": ExcitationBackprop("auto"),
    "lrp": LRP(),
}
COMPARED = {
    "lift": DeepLift(),
    "layer-lift": LayerDeepLift(),
    "shap": DeepLiftShap(3),
    "zero": DeepLift("zero", norm="exact"),
}
NESTED = {
    "noisy-guided-cam": SmoothGrad(GuidedGradCAM(), 2),
    "noisy-contrast": VarGrad(ContrastiveExcitationBackprop(), 2),
    "noisy-lift": SquareGrad(DeepLift(), 2),
    "noisy-layer-ig": SmoothGrad(LayerIntegratedGradients(steps=3), 2),
    "nested-joint": SmoothGrad(SquareGrad(GuidedGradCAM("body.0"), 3), 2),
}
CLOUDS = {
    "smooth": SmoothGrad(Saliency(), 3),
    "also": SmoothGrad(InputXGradient(), 3),
    "path": SmoothGrad(IntegratedGradients(2, "zero"), 3),
    "cams": SmoothGrad(GradCAM(), 2),
}
ALONE = {
    "occlusion": Occlusion(4, 3, "zero"),
    "large": Occlusion(99, 50),
    "noisy": SmoothGrad(Occlusion(6, 6), 2),
}
SETS = {
    "nothing": {},
    "gradients": GRADIENTS,
    "cams": CAMS,
    "both": GRADIENTS | CAMS,
    "paths": PATHS,
    "clouds": CLOUDS,
    "alone": ALONE,
    "everything": GRADIENTS | CAMS | PATHS | CLOUDS | ALONE,
    "layers": LAYERS,
    "layer paths": LAYER_PATHS,
    "paths of layers and inputs": PATHS | LAYER_PATHS,
    "scattered": SCATTERED,
    "moments": MOMENTS,
    "joint": JOINT,
    "joint beside their parts": JOINT | {"cam": GradCAM(), "saliency": Saliency()},
    "compared": COMPARED,
    "nested": NESTED,
    "frozen": {"ig": IntegratedGradients(3, norm="exact"), "lift": DeepLift()},
    "all": {
        f"{group}-{name}": method
        for group, methods in enumerate(
            (GRADIENTS, CAMS, PATHS, LAYERS, LAYER_PATHS, SCATTERED, MOMENTS, JOINT, COMPARED)
        )
        for name, method in methods.items()
    },
}
EACH = {
    f"{group}/{name}": method
    for group in ("layers", "layer paths", "scattered", "moments", "joint", "compared", "nested")
    for name, method in SETS[group].items()
}


def counted(targets, methods, window=None, shapes=((8, 8, 10),), **settings):
    """Batch items that a counting network sees, after a rehearsal."""
    net = Metered(layered())
    # ``auto`` would find the counting network's parts; the names are those of the network inside
    predictor = Predictor(net, window, **settings)
    probes = [a_probe(shape, name=f"p{n}") for n, shape in enumerate(shapes)]
    for probe in probes:
        place = predictor.windows(probe.shape).places[0]
        predictor.rehearse(probe.image[(slice(None), *place)])
    net.counts.update(forward=0, backward=0)
    passes = predictor.passes
    passes.forward = passes.backward = 0
    for probe in probes:
        for found in explain(predictor, probe, targets, methods):
            assert found.status == "ok"
    assert (passes.forward, passes.backward) == (net.counts["forward"], net.counts["backward"])
    announced = cost(predictor, probes, targets, methods)
    return announced, Cost(net.counts["forward"], net.counts["backward"])


def inner(methods):
    """The same methods on the layers of the network inside the counting one."""
    return {name: _renamed(method) for name, method in methods.items()}


def _renamed(method):
    if hasattr(method, "inner"):
        return replace(method, inner=_renamed(method.inner))
    if method.layer in ("", "auto"):
        return method
    return replace(method, layer=f"net.{method.layer}")


@pytest.mark.parametrize("name", [name for name in SETS if name != "nothing"])
@pytest.mark.parametrize("targets", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_the_cost_is_what_is_counted(name, targets, window):
    """For every set of methods, one and two targets, whole and by windows."""
    announced, seen = counted(targets, inner(SETS[name]), window)
    assert announced == seen


@pytest.mark.parametrize("name", list(EACH))
@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_the_cost_of_each_method_alone_is_what_is_counted(name, window):
    """Nobody else pays for its prediction."""
    announced, seen = counted(TWO, inner({"m": EACH[name]}), window)
    assert announced == seen


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_the_cost_of_several_probes_adds_up(window):
    """Of different shapes, one of them thinner than the window."""
    methods = inner(GRADIENTS | CAMS | PATHS)
    announced, seen = counted(TWO, methods, window, ((8, 8, 10), (12, 6, 8), (16, 16, 8)))
    assert announced == seen


@pytest.mark.parametrize("batch", [1, 3, "auto"])
def test_the_batch_costs_nothing(batch):
    """Items are counted, however many go together."""
    methods = inner(SETS["everything"])
    announced, seen = counted(TWO, methods, (8, 8, 8), looks_per_pass=batch)
    assert announced == seen


def test_four_methods_for_one_pass():
    """Saliency, input times gradient, GradCAM and HiResCAM share one forward and one backward."""
    methods = GRADIENTS | {"cam": GradCAM(), "hires": HiResCAM()}
    assert counted(ONE, methods) == (Cost(1, 1), Cost(1, 1))


def test_targets_share_forwards():
    """A second target is a second backward."""
    methods = GRADIENTS | {"cam": GradCAM(), "hires": HiResCAM()}
    assert counted(TWO, methods) == (Cost(1, 2), Cost(1, 2))


def test_paths_of_equal_steps_and_baseline_are_walked_once():
    """Five points, the prediction and the baseline."""
    methods = {"a": PATHS["ig"], "b": PATHS["same"]}
    assert counted(ONE, methods) == (Cost(7, 5), Cost(7, 5))


def test_the_costs_by_hand():
    """One probe of 8 x 8 x 12 by two windows."""
    predictor = Predictor(layered(), (8, 8, 8))
    probes = [a_probe((8, 8, 12))]
    assert len(predictor.windows(probes[0].shape).places) == 2

    def of(**methods):
        return cost(predictor, probes, TWO, methods)

    assert of(saliency=Saliency()) == Cost(2 + 2, 2 * 2)  # the prediction, the look
    assert of(cam=GradCAM()) == Cost(2 + 2 + 2 * 2, 2 * 2)  # and activations, for each target
    assert of(ig=IntegratedGradients(5)) == Cost(2 + 2 * (5 + 2), 2 * 5 * 2)  # and both ends
    cubes = 1 * 1 * 2  # of 8 voxels by steps of 4 along 12
    assert of(occlusion=Occlusion()) == Cost(2 + 2 * (cubes + 1) * 2, 0)
    assert of(saliency=Saliency()).passes == 8
    assert of(pp=GradCAMPlusPlus()) == Cost(2 + 2 + 2 * 2 * 2, 2 * 2)  # sums and activations
    assert of(shap=ExpectedGradients(5, 3)) == Cost(2 + 2 * (5 + 1 + 3), 2 * 5 * 2)
    assert of(lig=LayerIntegratedGradients(steps=5)) == Cost(2 + 2 * (5 + 3) * 2, 2 * 5 * 2)
    assert of(lift=DeepLift()) == Cost(2 + 2 * 2, 2 * 2 * 2)  # two rows for each look
    assert of(both=GuidedGradCAM()) == Cost(2 + 2 + 2 + 2 * 2, 2 * (2 + 2))


def test_a_path_starts_with_the_prediction():
    """Whole, integrated gradients cost their steps and both ends, and nothing beside them."""
    assert counted(ONE, {"ig": PATHS["ig"]}) == (Cost(7, 5), Cost(7, 5))
    assert counted(ONE, {"shap": ExpectedGradients(5, 3)}) == (Cost(9, 5), Cost(9, 5))
    here = {"ig": PATHS["ig"], "saliency": Saliency()}
    assert counted(ONE, here) == (Cost(8, 6), Cost(8, 6))
    assert counted(ONE, {"lift": DeepLift()}) == (Cost(3, 2), Cost(3, 2))  # a rule predicts nothing


def test_the_layers_on_a_path_cost_nothing():
    """Integrated gradients, conductance and influence walk it together, at any layers."""
    methods = {
        "ig": PATHS["ig"],
        "a": LayerConductance("auto", 5, "zero"),
        "b": LayerConductance("net.body.0", 5, "zero"),
        "c": InternalInfluence("net.body.3", 5, "zero"),
    }
    assert counted(TWO, methods) == (Cost(7, 10), Cost(7, 10))
    shaps = {"a": ExpectedGradients(6, 2), "b": LayerGradientShap("auto", 6, 2)}
    assert counted(TWO, shaps) == (Cost(9, 12), Cost(9, 12))


def test_a_joint_method_costs_nothing_beside_its_parts():
    """Guided Grad-CAM is the product of two maps that are there."""
    parts = {"guided": GuidedBackprop(), "cam": GradCAM()}
    for window in (None, (8, 8, 8)):
        announced, seen = counted(ONE, parts | {"both": GuidedGradCAM()}, window)
        extra = 0 if window is None else 2  # by windows, each brings its own activations
        plain = counted(ONE, parts, window)[1]
        assert announced == seen == Cost(plain.forward + extra, plain.backward)


def test_no_methods_cost_no_more_than_is_announced():
    """Nothing to explain is nothing to predict."""
    announced, seen = counted(TWO, {})
    assert seen.forward <= announced.forward
    assert seen.backward == announced.backward == 0


def test_the_number_of_points_does_not_change_the_bill_of_others():
    """What is walked for one method is not paid by another."""
    alone = cost(Predictor(layered()), [a_probe()], ONE, GRADIENTS).passes
    with_path = cost(
        Predictor(layered()), [a_probe()], ONE, GRADIENTS | {"ig": IntegratedGradients(9)}
    )
    assert with_path.passes == alone + 2 * 9 + 2  # both ends are looked at forward


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@pytest.mark.parametrize("targets", [ONE, TWO], ids=["one", "two"])
def test_what_is_announced_for_assessing_is_counted(targets, window):
    """The predictions, and all that each metric asks of each method; nothing for no metric."""
    net = Metered(layered())
    probes = [a_probe((8, 8, 10)), a_probe((8, 8, 16), name="q")]
    methods = {"saliency": Saliency(), "ig": IntegratedGradients(3)}
    held = {"deletion": Deletion(3), "random": RandomBaseline(Deletion(3), 2),
            "steady": SensitivityMax(2), "trained": Randomization(2)}  # fmt: skip
    maps = examine(net, probes, targets, methods, window=window)
    before = dict(vars(net.counts))
    announced = cost_of_assessing(Predictor(net, window), probes, targets, methods, held)
    assess(net, maps, targets, held, methods=methods, window=window)
    shapes = 1 if window else 2  # each is rehearsed once
    assert net.counts["forward"] - before["forward"] == announced.forward + shapes
    assert net.counts["backward"] - before["backward"] == announced.backward > 0
    assert cost_of_assessing(Predictor(net, window), probes, targets, methods, {}) == Cost(0, 0)
