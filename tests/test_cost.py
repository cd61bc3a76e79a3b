"""What is announced as the cost is what goes through the network."""

from __future__ import annotations

import pytest
from nets_for_tests import Counting, a_probe, layered

from lightning_segxai.examine import Cost, cost
from lightning_segxai.explain import explain
from lightning_segxai.methods.cams import GradCAM, HiResCAM
from lightning_segxai.methods.gradients import InputXGradient, Saliency
from lightning_segxai.methods.layers import LayerActivation
from lightning_segxai.methods.noise import SmoothGrad
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.methods.perturbation import Occlusion
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
}


def counted(targets, methods, window=None, shapes=((8, 8, 10),), **settings):
    """Batch items that a counting network sees, after a rehearsal."""
    net = Counting(layered())
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
    """The layers of the network inside the counting one."""
    return {
        name: GradCAM("net.body.0") if method == GradCAM("body.0") else method
        for name, method in methods.items()
    }


@pytest.mark.parametrize("name", [name for name in SETS if name != "nothing"])
@pytest.mark.parametrize("targets", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("window", [None, (8, 8, 8)], ids=["whole", "windows"])
def test_the_cost_is_what_is_counted(name, targets, window):
    """For every set of methods, one and two targets, whole and by windows."""
    announced, seen = counted(targets, inner(SETS[name]), window)
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
    assert of(ig=IntegratedGradients(5)) == Cost(2 + 2 * 5 + 2, 2 * 5 * 2)
    cubes = 1 * 1 * 2  # of 8 voxels by steps of 4 along 12
    assert of(occlusion=Occlusion()) == Cost(2 + 2 * (cubes + 1) * 2, 0)
    assert of(saliency=Saliency()).passes == 8


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
    assert with_path.passes == alone + 2 * 9 + 1
