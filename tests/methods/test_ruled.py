"""Methods by rules: excitation backprop by hand, frozen norms as constants, shared passes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from nets_for_tests import a_probe, close, seeded
from torch import nn

from lightning_segxai.explain import explain
from lightning_segxai.methods.deeplift import DeepLift, DeepLiftShap, LayerDeepLift
from lightning_segxai.methods.guided import Deconvolution, GuidedBackprop, GuidedGradCAM
from lightning_segxai.methods.paths import ExpectedGradients, IntegratedGradients
from lightning_segxai.methods.relevance import (
    LRP,
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
)
from lightning_segxai.scored import Predictor, ScoredModel
from lightning_segxai.targets import ClassEvidence, ClassMargin, Target, VoxelEvidence
from lightning_segxai.values import Probe


@dataclass(frozen=True, eq=False)
class Given(Target):
    """Any weights."""

    given: torch.Tensor

    def weights(self, probe, logits):
        return self.given


PROBE = a_probe()
TARGET = ClassEvidence(1)
RULED = {
    "guided": GuidedBackprop(),
    "deconvnet": Deconvolution(),
    "deeplift": DeepLift("noise"),
    "shap": DeepLiftShap(3),
    "layer": LayerDeepLift("2", "noise"),
    "lrp": LRP(),
    "zb": LRP("epsilon", "zb"),
    "excitation": ExcitationBackprop(),
    "deep": ExcitationBackprop("2"),
    "contrast": ContrastiveExcitationBackprop("2"),
    "cam": GuidedGradCAM("2"),
}


def explained(net, method, probe=PROBE, target=TARGET, **settings):
    """What one method found, which must be there."""
    [found] = explain(Predictor(net, **settings), probe, {"t": target}, {"m": method})
    assert found.status == "ok", found.reason
    return found


def conv(given, made, size=3, **settings):
    return nn.Conv3d(given, made, size, padding=size // 2, **settings)


# --- excitation backprop


def in_a_row(*kernels, bias=0.0):
    """A convolution along the first axis, with a kernel of three numbers for each output."""
    made = nn.Conv3d(1, len(kernels), (3, 1, 1), padding=(1, 0, 0)).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(kernels, dtype=torch.float64).reshape(-1, 1, 3, 1, 1))
        made.bias.fill_(bias)
    return made


def head(*weights):
    """Class 0 of zeros, class 1 of these weights."""
    made = nn.Conv3d(len(weights), 2, 1).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[0.0] * len(weights), weights]).reshape(2, -1, 1, 1, 1))
        made.bias.fill_(7.0)
    return made


ROW = Probe("row", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 3, 1, 1))
MIDDLE = VoxelEvidence((1, 0, 0), label=1)


@pytest.mark.parametrize(
    ("kernels", "weights", "chances"),
    [
        ([(1, 2, 3)], [1.0], [1 / 14, 4 / 14, 9 / 14]),
        ([(-1, 2, 3)], [5.0], [0.0, 4 / 13, 9 / 13]),
        # units of 14 and 4: the first gets 28 / 40 of the chance, the second 12 / 40
        ([(1, 2, 3), (1, 0, 1)], [2.0, 3.0], [0.05 + 0.3 / 4, 0.2, 0.45 + 0.9 / 4]),
        ([(1, 2, 3), (1, 0, 1)], [2.0, -3.0], [1 / 14, 4 / 14, 9 / 14]),
        ([(1, 2, 3), (-1, 0, 0)], [2.0, 3.0], [1 / 14, 4 / 14, 9 / 14]),  # a unit that is off
    ],
)
def test_excitation_by_hand(kernels, weights, chances):
    """A walk down from the middle of (1, 2, 3); biases take no part."""
    net = nn.Sequential(in_a_row(*kernels, bias=0.0), nn.ReLU(), head(*weights)).eval()
    found = explained(net, ExcitationBackprop(), ROW, MIDDLE)
    assert found.values.flatten().tolist() == pytest.approx(chances, abs=1e-9)
    assert found.unit == "probability"
    assert found.completeness_error is None
    biased = nn.Sequential(in_a_row(*kernels[:1], bias=2.0), nn.ReLU(), head(weights[0])).eval()
    plain = nn.Sequential(in_a_row(*kernels[:1], bias=0.0), nn.ReLU(), head(weights[0])).eval()
    one, two = (explained(n, ExcitationBackprop(), ROW, MIDDLE).values for n in (biased, plain))
    close(one, two, 1e-9)


def test_excitation_negative_inputs():
    """An input counts where it excites: (-1, 2, 3) by (-4, 1, -5)."""
    probe = Probe("row", torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 3, 1, 1))
    net = nn.Sequential(in_a_row((-4, 1, -5)), nn.LeakyReLU(0.1), head(1.0)).eval()
    found = explained(net, ExcitationBackprop(), probe, MIDDLE)
    # the unit is -9, leaks -0.9, and excites nothing; so one that is on, by (-4, 1, 0): 4 and 2
    assert not found.values.any()
    net = nn.Sequential(in_a_row((-4, 1, 0)), nn.LeakyReLU(0.1), head(1.0)).eval()
    found = explained(net, ExcitationBackprop(), probe, MIDDLE)
    assert found.values.flatten().tolist() == pytest.approx([4 / 6, 2 / 6, 0.0])


def test_excitation_of_sums():
    """Of two branches that are added, the positive parts share: 14 and 2, by 14 / 16 and 2 / 16."""

    class Skip(nn.Module):
        def __init__(self, spelling):
            super().__init__()
            self.body, self.head, self.spelling = in_a_row((1, 2, 3)), head(1.0), spelling

        def forward(self, x):
            made = self.body(x).relu()
            if self.spelling == "+=":
                made += x
                return self.head(made)
            return self.head(torch.add(made, x) if self.spelling == "add" else x + made)

    for spelling in ("+=", "add", "+"):
        found = explained(Skip(spelling).eval(), ExcitationBackprop(), ROW, MIDDLE)
        chances = [1 / 16, 4 / 16 + 2 / 16, 9 / 16]
        assert found.values.flatten().tolist() == pytest.approx(chances)


def test_contrast_by_hand():
    """For: by the unit that is weighed positively; against: by the other."""
    net = nn.Sequential(in_a_row((1, 2, 3), (1, 0, 1)), nn.ReLU(), head(2.0, -3.0)).eval()
    found = explained(net, ContrastiveExcitationBackprop(), ROW, MIDDLE)
    chances = [1 / 14 - 1 / 4, 4 / 14, 9 / 14 - 3 / 4]
    assert found.values.flatten().tolist() == pytest.approx(chances)
    assert float(found.values.sum()) == pytest.approx(0.0, abs=1e-9)
    # in a layer of two channels that are summed, both walks are at the same voxel
    at_layer = explained(net, ContrastiveExcitationBackprop("1"), ROW, MIDDLE)
    assert at_layer.values.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


def test_the_opposite_of_a_merged_head():
    """A norm behind the last convolution does not undo the negation."""
    net = nn.Sequential(in_a_row((1, 2, 3), (1, 0, 1)), nn.ReLU(), head(2.0, -3.0))
    plain = explained(net.eval(), ContrastiveExcitationBackprop(), ROW, MIDDLE)
    normed = seeded(nn.BatchNorm3d(2))
    with torch.no_grad():
        normed.weight.copy_(torch.tensor([1.0, 0.5]))
    merged = nn.Sequential(*net, normed).eval()
    found = explained(merged, ContrastiveExcitationBackprop(), ROW, MIDDLE)
    close(found.values, plain.values, 1e-9)


def excited():
    """Every unit is excited: weights are positive, but of the head, which has some of both."""
    net = nn.Sequential(
        conv(1, 4), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), conv(4, 4), nn.ELU(),
        nn.Upsample(scale_factor=2), conv(4, 4), nn.LeakyReLU(), conv(4, 2, 1),
    )  # fmt: skip
    net = seeded(net)
    with torch.no_grad():
        for part in list(net)[:-1]:
            for parameter in part.parameters():
                parameter.abs_()
        net[9].weight[1, :, 0, 0, 0] = torch.tensor([1.0, -2.0, 3.0, -0.5])
    return net


EXCITED = excited()
BRIGHT = Probe("bright", PROBE.image.abs(), PROBE.label)


def test_excitation_is_a_probability():
    """Where every unit is excited, it is never negative and adds up to 1, at every layer."""
    layers = ["", *"12345678"]
    methods = {f"m{layer}": ExcitationBackprop(layer) for layer in layers}
    for one in explain(Predictor(EXCITED), BRIGHT, {"t": TARGET}, methods):
        assert one.status == "ok", one.reason
        assert one.values.min() >= 0
        assert float(one.values.sum()) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("window", [(6, 8, 8), (4, 4, 4)])
def test_excitation_by_windows(window):
    """By windows too: the shares of all windows add up to the target's weights."""
    found = explained(EXCITED, ExcitationBackprop(), BRIGHT, window=window)
    assert found.values.min() >= 0
    assert float(found.values.sum()) == pytest.approx(1.0, rel=1e-9)


def test_contrast_adds_up_to_nothing():
    """Where both walks arrive."""
    methods = {f"m{layer}": ContrastiveExcitationBackprop(layer) for layer in ("", "4", "8")}
    for one in explain(Predictor(EXCITED), BRIGHT, {"t": TARGET}, methods):
        assert one.status == "ok", one.reason
        assert float(one.values.sum()) == pytest.approx(0.0, abs=1e-9)
        assert float(one.values.abs().sum()) > 1e-3 or one.method == "m8"


def test_excitation_starts_like_relevance():
    """With weighted logits in the place of weights it is LRP, where no bias takes anything."""
    net = nn.Sequential(
        conv(1, 3, bias=False), nn.ReLU(), conv(3, 3, bias=False), nn.ReLU(),
        conv(3, 2, 1, bias=False),
    )  # fmt: skip
    net = seeded(net, 1)
    with torch.no_grad():
        net[4].weight[1].abs_()
    logits = Predictor(net).predict(PROBE.image)
    weighted = Given(TARGET.weights(PROBE, logits) * logits)
    walk = explained(net, ExcitationBackprop(), target=weighted).values
    relevance = explained(net, LRP("z+", "same", 1e-12)).values
    close(walk * int((weighted.given != 0).sum()), relevance * int((PROBE.label == 1).sum()), 1e-7)


# --- frozen norms


def frozen_and_written(norm):
    """A network with a norm, and one with the norm's statistics of the probe in a BatchNorm."""
    net = seeded(nn.Sequential(conv(1, 4), norm, nn.ELU(), conv(4, 4), nn.ReLU(), conv(4, 2)), 1)
    batch = nn.BatchNorm3d(4, eps=norm.eps).double().eval()
    with torch.no_grad():
        made = net[0](PROBE.image[None])[0]
        group = (
            made.reshape(-1, 2, *made.shape[1:])
            if isinstance(norm, nn.GroupNorm)
            else made[:, None]
        )
        axes = (1, 2, 3, 4)
        each = 4 // len(group)
        batch.running_mean.copy_(group.mean(axes).repeat_interleave(each))
        batch.running_var.copy_(group.var(axes, correction=0).repeat_interleave(each))
        batch.weight.copy_(norm.weight)
        batch.bias.copy_(norm.bias)
    return net, nn.Sequential(net[0], batch, *net[2:])


FREEZING = {
    "integrated": (IntegratedGradients(5, "noise", norm="frozen"), IntegratedGradients(5, "noise")),
    "from zero": (IntegratedGradients(3, "zero", norm="frozen"), IntegratedGradients(3, "zero")),
    "deeplift": (DeepLift("noise"), DeepLift("noise")),
    "shap": (DeepLiftShap(2), DeepLiftShap(2)),
    "lrp": (LRP(), LRP()),
    "zb": (LRP("epsilon", "zb"), LRP("epsilon", "zb")),
    "excitation": (ExcitationBackprop(), ExcitationBackprop()),
}


@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("norm", [nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(2, 4)], ids=str)
def test_frozen(name, norm):
    """With frozen statistics, it is the map of the network that has them as constants."""
    net, written = frozen_and_written(norm)
    frozen, exact = FREEZING[name]
    one, two = explained(net, frozen), explained(written, exact)
    close(one.values, two.values, 1e-9)
    assert one.completeness_error == pytest.approx(two.completeness_error, abs=1e-9)


def test_frozen_by_windows():
    """Each window has its own statistics, those of the window of the volume."""
    net = seeded(nn.Sequential(conv(1, 3), nn.InstanceNorm3d(3), nn.ELU(), conv(3, 2)), 1)
    probe = a_probe((12, 8, 8))
    method = IntegratedGradients(8, "noise", norm="frozen")
    found = explained(net, method, probe, window=(8, 8, 8))
    assert found.completeness_error < 1e-2
    one = explained(net, method, probe, window=(8, 8, 8), looks_per_pass=1)
    close(found.values, one.values, 1e-12)


def test_frozen_without_a_norm():
    """There is nothing to freeze, and the reason says what to use."""
    method = IntegratedGradients(2, norm="frozen")
    [found] = explain(Predictor(EXCITED), PROBE, {"t": TARGET}, {"m": method})
    assert found.status == "unsupported"
    assert "found no instance, group or layer norm" in found.reason
    assert 'Use `norm="exact"`' in found.reason


# --- what they share


NET = seeded(
    nn.Sequential(conv(1, 4), nn.InstanceNorm3d(4), nn.ELU(), nn.MaxPool3d(2), conv(4, 4),
                  nn.ReLU(), nn.Upsample(scale_factor=2), conv(4, 2)), 1,
)  # fmt: skip


@pytest.mark.parametrize("window", [None, (6, 8, 8)])
def test_together_and_alone(window):
    """In one explanation, alone, and asked outside of it, a method gives the same."""
    targets = {"a": TARGET, "b": ClassMargin(0, 1)}
    together = explain(Predictor(NET, window), PROBE, targets, RULED)
    assert [one.status for one in together] == ["ok"] * len(together)
    for one, method in zip(together, RULED.values(), strict=False):
        close(explained(NET, method, window=window).values, one.values, 1e-12)
        predictor = Predictor(NET, window)
        model = ScoredModel.aim(predictor, PROBE, TARGET, predictor.predict(PROBE.image))
        made = method.attribute(model, PROBE.image)
        made = made if isinstance(made, torch.Tensor) else made.values
        close(made / (model.voxels if method.shares_score else 1), one.values, 1e-12)


def test_passes_are_shared():
    """Methods of one rule on one trajectory cost what one costs."""
    pairs = [
        ({"a": GuidedBackprop(), "b": GuidedGradCAM("2")}, 2),  # and one for the Grad-CAM
        ({"a": DeepLift("noise"), "b": LayerDeepLift("2", "noise")}, 2),
        ({"a": ExcitationBackprop(), "b": ExcitationBackprop("2")}, 1),
        ({"a": ExcitationBackprop("2"), "b": ContrastiveExcitationBackprop("2")}, 2),
        ({"a": LRP(), "b": LRP("z+", "w2")}, 1),
    ]  # fmt: skip
    for methods, backward in pairs:
        predictor = Predictor(NET)
        found = explain(predictor, PROBE, {"t": TARGET}, methods)
        assert [one.status for one in found] == ["ok"] * len(found)
        assert predictor.passes.backward == backward
        before = predictor.passes.backward
        explain(predictor, PROBE, {"t": TARGET, "u": ClassMargin(0, 1)}, methods)
        assert predictor.passes.backward - before == 2 * backward


def test_units():
    """Sensitivities are per intensity, what shares out the score is in logits."""
    units = {name: method.unit for name, method in RULED.items()}
    assert units.pop("guided") == units.pop("deconvnet") == "logit per intensity"
    assert units.pop("cam") == "a.u."
    assert [units.pop(k) for k in ("excitation", "deep", "contrast")] == ["probability"] * 3
    assert set(units.values()) == {"logit"}


def test_a_wrong_layer_is_its_own_failure():
    """The other cells of the walk go on."""
    methods = {"a": ExcitationBackprop("nowhere"), "b": ExcitationBackprop("2")}
    told = []
    found = explain(
        Predictor(NET), PROBE, {"t": TARGET}, methods, failed=lambda *what: told.append(what)
    )
    assert [one.status for one in found] == ["failed", "ok"]
    assert "no such layer" in found[0].reason
    assert len(told) == 1


def test_expected_gradients_have_no_rule():
    """Paths without frozen norms are looked at by plain gradients."""
    assert ExpectedGradients().rule is None
    assert IntegratedGradients().rule is None
