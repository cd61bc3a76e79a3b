"""DeepLift's rules: worked out by hand, complete on every network, Captum's where it is right."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum import attr
from nets_for_tests import a_probe, blended, close, linear_net, pieces, seeded
from torch import nn

from lightning_segxai.baselines import Baseline, draws
from lightning_segxai.explain import explain
from lightning_segxai.methods.deeplift import DeepLift, DeepLiftShap, LayerDeepLift
from lightning_segxai.methods.gradients import InputXGradient
from lightning_segxai.methods.paths import IntegratedGradients
from lightning_segxai.rules.compared import Rescaled
from lightning_segxai.scored import Predictor
from lightning_segxai.targets import ClassMargin, VoxelEvidence
from lightning_segxai.windows import Windows

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))
from networks import NETWORKS, network

PROBE = a_probe()
X = PROBE.image[None]
TARGET = ClassMargin(1, 0)
VOXELS = int((PROBE.label == 1).sum())


def explained(net, method, probe=PROBE, **settings):
    """What one method found, which must be there."""
    [found] = explain(Predictor(net, **settings), probe, {"t": TARGET}, {"m": method})
    assert found.status == "ok", found.reason
    return found


def conv(given, made, size=3):
    return nn.Conv3d(given, made, size, padding=size // 2)


def multipliers(f, x, b, norm="frozen"):
    """What the rule gives for the sum of ``f`` at ``x`` and a baseline, both without a batch."""
    both = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in (x, b)]).requires_grad_()
    mode = Rescaled(norm).interception([], 0)
    with mode.watching(both):
        y = f(both)
    [gradient] = torch.autograd.grad(y[0].sum(), both)
    assert mode.met > 0
    with torch.no_grad():
        plain = f(both.detach())
    torch.testing.assert_close(y.detach()[0], plain[0], rtol=1e-12, atol=1e-12)
    return gradient[0], float(plain[0].sum() - plain[1].sum())


def complete(f, x, b, norm="frozen", tolerance=1e-12):
    """The multipliers times the difference add up to that of the answers."""
    found, difference = multipliers(f, x, b, norm)
    way = torch.as_tensor(x, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    assert float((found * way).sum()) == pytest.approx(difference, abs=tolerance, rel=tolerance)
    return found.tolist()


# --- known answers


def test_rescale_relu():
    """A ReLU between -1 and 3 passes 3 / 4; on one side of zero, its derivative."""
    found = complete(F.relu, [3.0, -1.0, 4.0, -1.0], [-1.0, 3.0, 2.0, -2.0])
    assert found == [0.75, 0.75, 1.0, 0.0]


def test_equal_inputs():
    """Where input and baseline are equal, or as good as, it is the derivative."""
    near = 1.5 * (1 + 4e-16)
    found, _ = multipliers(lambda x: x**2, [3.0, 1.5, -2.0, 0.0], [3.0, near, -2.0, 0.0])
    close(found, torch.tensor([6.0, 3.0, -4.0, 0.0], dtype=torch.float64), 1e-12)
    found, _ = multipliers(F.relu, [3.0, -1.0], [3.0, -1.0])
    assert found.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("f", "x", "b", "slope"),
    [
        (torch.square, 3.0, -1.0, 2.0),  # (9 - 1) / 4
        (lambda x: x**2, 3.0, -1.0, 2.0),
        (lambda x: x**3, 2.0, 0.0, 4.0),  # 8 / 2
        (lambda x: x.pow(-1), 4.0, 2.0, -1 / 8),
        (lambda x: 1 / x, 4.0, 2.0, -1 / 8),
        (lambda x: 8 / x, 4.0, 2.0, -1.0),
        (torch.sqrt, 9.0, 1.0, 1 / 4),
        (torch.abs, 3.0, -1.0, 1 / 2),
        (lambda x: F.leaky_relu(x, 0.5), 2.0, -2.0, 0.75),
        (lambda x: F.threshold(x, 0.0, 0.0), 3.0, -1.0, 0.75),
        (lambda x: F.hardtanh(x), 3.0, -1.0, 1 / 2),
        (lambda x: x.clamp(min=1.0), 3.0, -1.0, 1 / 2),
        (lambda x: torch.log(torch.exp(x)), 2.0, 1.0, 1.0),
    ],
)
def test_slopes(f, x, b, slope):
    """Rise over run, for functions of one number."""
    assert complete(f, [x], [b]) == pytest.approx([slope], rel=1e-12)


def test_product():
    """Each factor gets the mean of the other: 2 x 3 against 4 x 7."""
    assert complete(lambda v: v[:, :1] * v[:, 1:], [2.0, 3.0], [4.0, 7.0]) == [5.0, 3.0]
    assert complete(lambda v: v * v, [3.0], [-1.0]) == [2.0]

    def overwriting(v):
        u = v[:, :1].clone()
        u *= v[:, 1:]
        return u

    assert complete(overwriting, [2.0, 3.0], [4.0, 7.0]) == [5.0, 3.0]


def test_quotient():
    """A product with the reciprocal: 6 / 2 against 4 / 4."""
    # the numerator gets the mean of 1/2 and 1/4; the denominator 5 times (1/2 - 1/4) / (2 - 4)
    assert complete(lambda v: v[:, :1] / v[:, 1:], [6.0, 2.0], [4.0, 4.0]) == [3 / 8, -5 / 8]
    assert complete(lambda v: v / 4 + F.relu(v), [6.0, 2.0], [4.0, 4.0]) == [1.25, 1.25]


def test_sigmoid_gate():
    """A gate's slope times the mean of what it gates, and the mean gate."""
    x, b = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([4.0, -1.0]).double()
    found = complete(lambda v: v[:, :1] * v[:, 1:].sigmoid(), x, b)
    on, off = float(torch.sigmoid(x[1])), float(torch.sigmoid(b[1]))
    assert found == pytest.approx([(on + off) / 2, 3 * (on - off) / 2], rel=1e-12)


def test_softmax_gate():
    """Two logits (ln 3, ln 2) against (0, 0): the exponential of a logarithm."""
    x = torch.tensor([3.0, 2.0], dtype=torch.float64).log()
    found = complete(lambda v: v.softmax(1)[:, :1], x, [0.0, 0.0])
    # exponentials 3 and 2 against 1 and 1, their sum 5 against 2, their slopes 2 / ln 3, 1 / ln 2
    of_sum = math.log(5 / 2) / 3
    of_log = (3 / 5 - 1 / 2) / math.log(3 / 5 * 2)
    assert found[0] == pytest.approx(of_log * (1 - of_sum * 2 / float(x[0])), rel=1e-12)
    assert found[1] == pytest.approx(-of_log * of_sum / float(x[1]), rel=1e-12)


def test_softmax_of_one():
    """Of a logit and zeros it is the sigmoid's rule, also in single precision and far apart."""
    for far in (1.0, 30.0):
        x, b = torch.zeros(2, 1, 3).double()
        x[..., 0], b[..., 0] = far, -far
        both = torch.stack([x, b]).float().requires_grad_()
        with Rescaled().interception([], 0).watching(both):
            shares = both.softmax(-1)
        [slope] = torch.autograd.grad(shares[0, 0, 0], both)
        rise = x.softmax(-1)[0, 0] - b.softmax(-1)[0, 0]
        assert float(slope[0, 0, 0] * 2 * far) == pytest.approx(float(rise), rel=1e-5)


@pytest.mark.parametrize(
    "f",
    [
        lambda v: v.softmax(-1) * v,
        lambda v: F.softmax(v, dim=1) ** 2,
        lambda v: torch.log_softmax(v, 1) * v,
        lambda v: F.log_softmax(v, dim=1).exp(),
        F.logsigmoid,
        lambda v: F.softplus(v) * torch.tanh(v),
    ],
)
def test_gates_are_complete(f):
    """Softmaxes, their logarithms, and what they weigh; far from zero too."""
    for scale in (1.0, 30.0):
        x, b = scale * torch.randn(2, 5).double()
        complete(f, x, b, tolerance=1e-10)


def test_max_pool():
    """The voxel that won the higher answer gets the difference: (1, 5, 2) against (4, 0, 3)."""
    pool = nn.MaxPool1d(3)
    # 5 against 4: voxel 1 won the higher, and went from 0 to 5: slope 1 / 5
    found = complete(lambda v: pool(v[:, None]), [1.0, 5.0, 2.0], [4.0, 0.0, 3.0])
    assert found == pytest.approx([0.0, 0.2, 0.0])
    # the other way round: 4 against 5, voxel 1 still, from 5 to 0
    found = complete(lambda v: pool(v[:, None]), [4.0, 0.0, 3.0], [1.0, 5.0, 2.0])
    assert found == pytest.approx([0.0, 0.2, 0.0])


def test_max_pool_overlapping():
    """Windows of three with a stride of one and padding; a voxel adds up what it wins."""
    pool = nn.MaxPool1d(3, 1, 1)
    # answers (5, 5, 7, 7) against (2, 2, 2, 2): voxels 1, 1, 3, 3 win, from 1 and 0
    found = complete(lambda v: pool(v[:, None]), [1.0, 5.0, 2.0, 7.0], [2.0, 1.0, 2.0, 0.0])
    assert found == pytest.approx([0.0, 3 / 4 + 3 / 4, 0.0, 5 / 7 + 5 / 7])


POOLS = {
    "module": nn.MaxPool3d(2),
    "overlapping": nn.MaxPool3d(3, 1, 1),
    "ceil": nn.MaxPool3d(3, 2, 1, ceil_mode=True),
    "dilated": lambda x: F.max_pool3d(x, 2, 2, 0, 2),
    "indices": lambda x: F.max_pool3d(x, 3, 2, 1, return_indices=True)[0],
    "module with indices": lambda x: nn.MaxPool3d(2, return_indices=True)(x)[0],
    "torch": lambda x: torch.max_pool3d(x, 2),
    "adaptive": nn.AdaptiveMaxPool3d(3),
    "adaptive with indices": lambda x: F.adaptive_max_pool3d(x, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_are_complete(name):
    """Whatever the windows, and however it is called."""
    x, b = torch.randn(2, 2, 6, 7, 5).double()
    complete(lambda v: POOLS[name](v), x, b)


def test_pool_gives_its_own_indices():
    """Of each half, as the network would see them."""
    both = torch.randn(2, 1, 4, 4, 4).double().requires_grad_()
    with Rescaled().interception([], 0).watching(both):
        y, won = F.max_pool3d(both, 2, return_indices=True)
    z, plain = F.max_pool3d(both, 2, return_indices=True)
    assert torch.equal(won, plain)
    assert torch.equal(y, z)


def attention(v, scale=None, mask=None):
    q, k, w = v.reshape(len(v), 3, 1, 4, 2).unbind(1)
    return F.scaled_dot_product_attention(q, k, w, mask, scale=scale)


def written(v):
    q, k, w = v.reshape(len(v), 3, 4, 2).unbind(1)
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2**0.5).softmax(-1), w)


def einsums(v):
    q, k, w = v.reshape(len(v), 3, 4, 2).unbind(1)
    shares = (torch.einsum("bic,bjc->bij", q, k) * 2**-0.5).softmax(-1)
    return torch.einsum("bij,bjc->bic", shares, w)


def test_attention():
    """Two products with a softmax between them, in any spelling."""
    x, b = torch.randn(2, 24).double()
    first = complete(attention, x, b)
    for other in (written, einsums):
        assert complete(other, x, b) == pytest.approx(first, rel=1e-9)
    assert complete(lambda v: attention(v, scale=2**-0.5), x, b) == pytest.approx(first, rel=1e-9)
    mask = torch.randn(4, 4).double()
    complete(lambda v: attention(v, mask=mask), x, b)


@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.eye(4) > 0}], ids=str)
def test_masked_attention_is_refused(mask):
    """It has no rule."""

    def masked(x):
        q = x.flatten(2).transpose(1, 2)[:, :4]
        return F.scaled_dot_product_attention(q, q, q, **mask).sum((1, 2))[:, None] * x

    net = seeded(Through(conv(1, 2), masked))
    [found] = explain(Predictor(net), PROBE, {"t": TARGET}, {"m": DeepLift(0.0)})
    assert found.status == "unsupported"
    assert "no rule for masked or grouped attention" in found.reason


class Through(nn.Module):
    """A convolution, and a function behind it."""

    def __init__(self, first, then):
        super().__init__()
        self.first, self.then = first, then

    def forward(self, x):
        return self.then(self.first(x))


def test_a_power_of_two_that_vary_is_refused():
    """Nor has that."""
    net = seeded(Through(conv(1, 2), lambda x: x.abs() ** x))
    [found] = explain(Predictor(net), PROBE, {"t": TARGET}, {"m": DeepLift(0.0)})
    assert found.status == "unsupported"
    assert "of two that vary" in found.reason


def test_batch_statistics_are_refused():
    """A BatchNorm without running statistics would mix volume and baseline."""
    net = nn.Sequential(conv(1, 2), nn.BatchNorm3d(2, track_running_stats=False), nn.ReLU())
    for method in (DeepLift(0.0), IntegratedGradients(2, norm="frozen")):
        [found] = explain(Predictor(seeded(net)), PROBE, {"t": TARGET}, {"m": method})
        assert found.status == "unsupported"
        assert "mixes the rows of a batch" in found.reason
        assert "track_running_stats=True" in found.reason


NORMS = {
    "instance": nn.InstanceNorm3d(4, affine=True),
    "group": nn.GroupNorm(2, 4),
    "layer": nn.LayerNorm((4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    """Exact, written out, complete; frozen, an affine function of the volume's statistics."""
    norm = seeded(NORMS[name], 2).requires_grad_(False)
    x, b = torch.randn(2, 4, 3, 3, 3).double()
    complete(lambda v: norm(v) ** 2, x, b, "exact")
    found, _ = multipliers(lambda v: norm(v).relu().square(), x, b)

    axes = {"instance": (2, 3, 4), "group": (2, 3, 4, 5), "layer": (1, 2, 3, 4)}[name]
    grouped = x.reshape(1, 2, 2, 3, 3, 3) if name == "group" else x[None]
    mean = grouped.mean(axes, keepdim=True).expand(grouped.shape).reshape(x.shape)
    variance = grouped.var(axes, correction=0, keepdim=True).expand(grouped.shape).reshape(x.shape)
    shape = (4, 3, 3, 3) if name == "layer" else (4, 1, 1, 1)
    slope = norm.weight.reshape(shape) / (variance + norm.eps).sqrt()

    def frozen(v):
        return slope * (v - mean) + norm.bias.reshape(shape)

    close(frozen(x), norm(x[None])[0], 1e-12)
    rise = frozen(x).relu() ** 2 - frozen(b).relu() ** 2
    close(found, rise / (x - b), 1e-9)


# --- identities


BASELINES = ("minimum", "blurred", "noise", "zero")


@pytest.mark.parametrize("name", NETWORKS)
def test_complete(name):
    """The map adds up to the difference of the scores, up to the rounding of what cancels in it."""
    methods = {
        f"{baseline}-{norm}": DeepLift(baseline, 1.5, norm)
        for baseline in BASELINES
        for norm in ("exact", "frozen")
        if (baseline, norm) != ("zero", "frozen") or name != "MONAI BasicUNet"  # it is slow
    }
    # of this seed no difference of scores vanishes
    net = network(name, seed=0)
    found = explain(Predictor(net), PROBE, {"t": TARGET}, methods)
    for one in found:
        assert one.status == "ok", one.reason
        assert one.completeness_error <= 1e-9 + 1e-15 * one.cancellation
        # a constant baseline has no variance: only where norms divide by it may so much cancel
        assert one.cancellation < 1e5 or one.method == "zero-exact"


@pytest.mark.parametrize("norm", [None, nn.BatchNorm3d, nn.InstanceNorm3d])
def test_linear(norm):
    """On a linear network, or one that is with frozen norms, it is integrated gradients."""
    linear = linear_net(bias=True)
    if norm is None:  # a rule wants something to change, so there is a product of which one is 0
        net = Through(linear, lambda y: y + (y * 0) * y)
    else:
        net = seeded(nn.Sequential(conv(1, 3), norm(3, affine=True), conv(3, 2)), 1)
        net = net if norm is nn.InstanceNorm3d else Through(net, lambda y: y + (y * 0) * y)
    start = {"baseline": "blurred", "sigma_mm": 1.0}
    frozen = "frozen" if norm is nn.InstanceNorm3d else "exact"
    integrated = explained(net, IntegratedGradients(1, **start, norm=frozen))
    close(explained(net, DeepLift(**start)).values, integrated.values)


def test_without_anything_to_rescale():
    """A linear network is refused, with the method that does it."""
    [found] = explain(Predictor(linear_net()), PROBE, {"t": TARGET}, {"m": DeepLift()})
    assert found.status == "unsupported"
    assert "found no activation, pooling, product or norm" in found.reason
    assert "Use `IntegratedGradients(steps=1)`" in found.reason


def test_rectifiers_without_biases():
    """From a baseline of zero, a ReLU network without biases gives the input times gradient."""
    net = seeded(
        nn.Sequential(
            nn.Conv3d(1, 3, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv3d(3, 3, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv3d(3, 2, 1, bias=False),
        )
    )
    close(explained(net, DeepLift("zero")).values, explained(net, InputXGradient()).values)


def batch_normed(seed=0):
    """Distinct ReLUs and BatchNorm, without max pooling."""
    net = nn.Sequential(
        conv(1, 3), nn.BatchNorm3d(3), nn.ReLU(), nn.AvgPool3d(2), conv(3, 4), nn.BatchNorm3d(4),
        nn.ReLU(), nn.Upsample(scale_factor=2), conv(4, 3), nn.ELU(), conv(3, 2, 1),
    )  # fmt: skip
    net = seeded(net, seed)
    for part in (net[1], net[5]):
        part.running_mean.normal_()
        part.running_var.uniform_(0.5, 2)
    return net


class Scored(nn.Module):
    """The score that Captum explains, written down plainly."""

    def __init__(self, net, weights):
        super().__init__()
        self.net, self.weights = net, weights

    def forward(self, x):
        return (self.weights * self.net(x)).sum((1, 2, 3, 4))


def captums(net, weights, x, start):
    """Captum's DeepLift, channels kept."""
    captum = attr.DeepLift(Scored(net, weights))
    with pytest.warns(UserWarning, match="Setting forward, backward hooks"):
        return captum.attribute(x.clone().requires_grad_(), start)[0].detach()


@pytest.mark.parametrize("kind", [*BASELINES, 0.4])
def test_captum(kind):
    """On distinct ReLUs behind BatchNorm it is Captum's."""
    net = batch_normed()
    weights = TARGET.weights(PROBE, net(X)[0].detach())
    start = Baseline(kind, 1.0).make(PROBE.image, (1, 1, 1), torch.Generator().manual_seed(0))
    theirs = captums(net, weights, X, start[None]).sum(0)
    close(explained(net, DeepLift(kind, 1.0)).values, theirs / VOXELS)


def test_captum_by_windows():
    """By windows it is the sum of theirs; baselines belong to the whole volume."""
    net, window = batch_normed(), (8, 8, 8)
    probe = a_probe((13, 9, 8))
    with torch.no_grad():
        weights = TARGET.weights(probe, blended(net, probe.image, window))
    start = Baseline("blurred", 1.0).make(probe.image, (1, 1, 1), torch.Generator())
    total = torch.zeros(probe.shape, dtype=torch.float64)
    places = Windows(probe.shape, window, 0.5).places
    for place, (share, *_) in zip(places, pieces(net, probe.image, window), strict=True):
        at = (slice(None), *place)
        seen = (weights * share)[at]
        total[place] += captums(net, seen, probe.image[at][None], start[at][None]).sum(0)
    found = explained(net, DeepLift("blurred", 1.0), probe, window=window)
    close(found.values, total / int((probe.label == 1).sum()))
    assert found.completeness_error < 1e-12


def test_shap_is_the_mean():
    """Of DeepLift from each of its baselines; from one it is DeepLift."""
    net = batch_normed()
    weights = TARGET.weights(PROBE, net(X)[0].detach())
    generator = torch.Generator().manual_seed(0)
    starts = [b.make(PROBE.image, (1, 1, 1), generator) for b in draws(3, 1.0)]
    theirs = sum(captums(net, weights, X, start[None]).sum(0) for start in starts) / 3
    found = explained(net, DeepLiftShap(3, 1.0))
    close(found.values, theirs / VOXELS)
    assert found.completeness_error < 1e-12
    assert torch.equal(
        explained(net, DeepLiftShap(1, 1.0)).values, explained(net, DeepLift("blurred", 1.0)).values
    )


@pytest.mark.parametrize("window", [None, (6, 8, 8)])
def test_layers_that_cut(window):
    """Each layer that all ways lead through adds up to what the input does."""
    net = batch_normed()
    methods = {f"l{n}": LayerDeepLift(str(n), "noise") for n in range(len(net))}
    methods["input"] = DeepLift("noise")
    found = explain(Predictor(net, window), PROBE, {"t": TARGET}, methods)
    sums = [float(one.values.sum()) for one in found]
    assert sums == pytest.approx([sums[-1]] * len(sums), rel=1e-9)
    assert found[-1].completeness_error < 1e-9


def test_layer_at_the_input_grid():
    """At a layer of full resolution it is the multiplier times the difference, by Captum."""
    net = batch_normed()
    weights = TARGET.weights(PROBE, net(X)[0].detach())
    theirs = attr.LayerDeepLift(Scored(net, weights), net[8]).attribute(X, X * 0 + 0.4)
    close(
        explained(net, LayerDeepLift("8", 0.4)).values,
        theirs[0].sum(0).detach() / VOXELS,
    )


def test_one_relu_in_a_network():
    """A voxel of 3 against -1 through a ReLU and a weight of 2: 6 in all."""

    class Net(nn.Module):
        def forward(self, x):
            return torch.cat([x * 0, 2 * x.relu()], 1)

    probe = a_probe((1, 1, 1), labeled=False)
    probe.image.fill_(3.0)
    target = {"t": VoxelEvidence((0, 0, 0), label=1)}
    [found] = explain(Predictor(Net()), probe, target, {"m": DeepLift(-1.0)})
    assert found.values.item() == pytest.approx(6.0)
    assert found.completeness_error == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DeepLift(sigma_mm=0.0), "must be positive"),
        (lambda: DeepLiftShap(0), r"baselines=0\)` must be at least 1"),
        (lambda: DeepLiftShap(2, -1.0), "must be positive"),
        (lambda: LayerDeepLift(sigma_mm=-2.0), "must be positive"),
    ],
)
def test_wrong_arguments(make, match):
    """Are refused where they are written down."""
    with pytest.raises(ValueError, match=match):
        make()
