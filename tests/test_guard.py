"""The guard: a network in the middle of its training is examined, and nothing shows."""

from __future__ import annotations

import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from nets_for_tests import normed
from torch import nn

from lightning_segxai.guard import undisturbed

X = torch.randn(2, 1, 6, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class MyError(Exception):
    """Raised in the middle of an examination."""


@pytest.fixture(params=["normal", "exception"])
def inside(request):
    """Examine a network and leave, normally or by an exception."""

    def run(net, what, seed=0):
        fails = request.param == "exception"
        with pytest.raises(MyError) if fails else nullcontext(), undisturbed(net, seed):
            what()
            if fails:
                raise MyError

    return run


# --- random number generators


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(3).tolist(), lambda: np.random.rand(3).tolist(), random.random],
    ids=["torch", "numpy", "python"],
)
def test_random_numbers_go_on_as_if_nothing_had_been(inside, draw):
    """Whatever is drawn inside, the next number is the one that would have come."""
    net = nn.Conv3d(1, 1, 1)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    draw()
    expected = (draw(), draw())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    draw()
    inside(net, lambda: [draw() for _ in range(7)])
    assert (draw(), draw()) == expected


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(3).tolist(), lambda: np.random.rand(3).tolist(), random.random],
    ids=["torch", "numpy", "python"],
)
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7])
def test_random_numbers_inside_are_those_of_the_seed(draw, seed):
    """The same at every validation, whatever was drawn before."""
    net = nn.Conv3d(1, 1, 1)
    seen = []
    for _ in range(2):
        with undisturbed(net, seed):
            seen.append(draw())
        draw()
    assert seen[0] == seen[1]
    with undisturbed(net, seed + 1):
        assert draw() != seen[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_the_gpu_go_on_as_if_nothing_had_been(inside):
    """The generator of the network's device."""
    net = nn.Conv3d(1, 1, 1).cuda()
    state = torch.cuda.get_rng_state()
    inside(net, lambda: torch.rand(3, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- modules


def test_the_network_is_in_eval_inside_and_as_it_was_outside(inside):
    """Each submodule by itself: a BatchNorm that a fine-tuner froze stays frozen."""
    net = normed()
    before = {name: m.training for name, m in net.named_modules()}
    assert before["frozen"] is False
    assert before["batch"] is True
    seen = []
    inside(net, lambda: seen.extend(m.training for m in net.modules()))
    assert not any(seen)
    assert {name: m.training for name, m in net.named_modules()} == before
    inside(net, net.train)
    assert {name: m.training for name, m in net.named_modules()} == before


def test_hooks_that_are_left_are_gone(inside):
    """Of every kind, on the network and on its parts."""
    net = normed()

    def leave():
        for m in net.modules():
            m.register_forward_hook(lambda *_: None)
            m.register_forward_hook(lambda *_, **__: None, with_kwargs=True)
            m.register_forward_pre_hook(lambda *_: None)
            m.register_full_backward_hook(lambda *_: None)
            m.register_full_backward_pre_hook(lambda *_: None)
            m.register_state_dict_pre_hook(lambda *_: None)

    def hooks():
        return {
            (name, key): list(value)
            for name, m in net.named_modules()
            for key, value in vars(m).items()
            if "hook" in key and isinstance(value, dict)
        }

    before = hooks()
    full = [m._is_full_backward_hook for m in net.modules()]
    inside(net, leave)
    assert hooks() == before
    assert [m._is_full_backward_hook for m in net.modules()] == full


def test_the_users_hooks_come_back_and_their_handles_still_work(inside):
    """Also when somebody removed them inside."""
    net = normed()
    seen = []
    first = net.conv.register_forward_hook(lambda *_: seen.append("first"))
    second = net.conv.register_forward_hook(lambda *_: seen.append("second"))
    inside(
        net, lambda: (first.remove(), net.act.register_forward_hook(lambda *_: seen.append("x")))
    )
    net(X)
    assert seen == ["first", "second"]
    first.remove()
    second.remove()
    net(X)
    assert seen == ["first", "second"]


def test_a_handle_made_before_removes_its_hook_after_an_undisturbed_examination(inside):
    """Handles refer to the very dictionaries that torch made."""
    net = normed()
    dictionaries = [id(m._forward_hooks) for m in net.modules()]
    handle = net.conv.register_forward_hook(lambda *_: None)
    inside(net, lambda: net(X))
    assert [id(m._forward_hooks) for m in net.modules()] == dictionaries
    handle.remove()
    assert not net.conv._forward_hooks


def test_attributes_are_as_before(inside):
    """New ones are gone, changed and deleted ones are back, on every part."""
    net = normed()
    net.note = "before"
    net.act.gone = 3

    def disturb():
        net.note = "after"
        net.extra = 1
        net.batch.extra = 1
        del net.act.gone
        net.drop.p = 0.9
        net.conv.forward = lambda x: x

    inside(net, disturb)
    assert net.note == "before"
    assert net.act.gone == 3
    assert net.drop.p == 0.5
    assert not hasattr(net, "extra")
    assert not hasattr(net.batch, "extra")
    assert "forward" not in vars(net.conv)


def test_parts_are_as_before(inside):
    """Replaced, added and removed submodules."""
    net = normed()
    children = dict(net.named_children())

    def disturb():
        net.act = nn.Identity()
        net.new = nn.Identity()
        del net.drop

    inside(net, disturb)
    assert dict(net.named_children()) == children
    assert list(dict(net.named_children())) == list(children)  # and their order


# --- buffers


def test_running_statistics_are_as_before(inside):
    """A forward in train mode moves them without bumping their version."""
    net = normed()
    state = {name: b.clone() for name, b in net.named_buffers()}
    objects = {name: id(b) for name, b in net.named_buffers()}
    moved = []

    def disturb():
        net.train()
        net(X * 5 + 3)
        net.calls += 1
        net.ghost.mul_(7)
        moved.append(not torch.equal(net.batch.running_mean, state["batch.running_mean"]))

    inside(net, disturb)
    assert moved == [True]
    assert {name: id(b) for name, b in net.named_buffers()} == objects
    for name, b in net.named_buffers():
        assert torch.equal(b, state[name]), name


def test_reassigned_buffers_are_the_old_objects_with_the_old_content(inside):
    """Changed in place first, replaced then, and a new one beside them."""
    net = normed()
    old, content = net.ghost, net.ghost.clone()

    def disturb():
        net.ghost.add_(1)
        net.ghost = torch.zeros(5)
        net.register_buffer("extra", torch.zeros(1))
        net.batch.running_mean = None

    inside(net, disturb)
    assert net.ghost is old
    assert torch.equal(net.ghost, content)
    assert "extra" not in dict(net.named_buffers())
    assert net.batch.running_mean is not None
    assert "ghost" not in net.state_dict()


def test_untouched_buffers_keep_their_version():
    """A graph that somebody holds over the validation can still be walked backward."""
    net = normed()
    versions = [b._version for b in net.buffers()]
    with undisturbed(net, 0):
        net(X)
    assert [b._version for b in net.buffers()] == versions


def test_a_buffer_with_nan_comes_back():
    """NaN is not equal to itself, and is still the content."""
    net = normed()
    net.ghost.fill_(float("nan"))
    with undisturbed(net, 0):
        net.ghost.zero_()
    assert bool(net.ghost.isnan().all())


def test_a_buffer_of_another_shape_comes_back(inside):
    """Nothing else is forgotten over it."""
    net = normed()
    content = net.ghost.clone()
    state = torch.get_rng_state()

    def disturb():
        net.ghost.data = torch.zeros(5)
        torch.rand(1)

    inside(net, disturb)
    assert torch.equal(net.ghost, content)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_module_keeps_for_itself_is_as_before(inside):
    """Tensors that are no buffers, lists, dictionaries and sets, changed in place."""
    net = normed()
    net.act.seen = torch.zeros(2)
    net.history, net.cache, net.names = [1], {"a": 1}, {"x"}
    objects = [net.act.seen, net.history, net.cache, net.names]

    def disturb():
        net.act.seen += 1
        net.history.append(2)
        net.cache["b"] = 2
        net.names.clear()

    inside(net, disturb)
    assert all(
        a is b
        for a, b in zip(objects, [net.act.seen, net.history, net.cache, net.names], strict=True)
    )
    assert net.act.seen.tolist() == [0, 0]
    assert (net.history, net.cache, net.names) == ([1], {"a": 1}, {"x"})


def test_a_kept_tensor_that_requires_a_gradient_comes_back():
    """A leaf of its own, changed in place."""
    net = normed()
    net.prompt = torch.ones(2, requires_grad=True)
    with undisturbed(net, 0), torch.no_grad():
        net.prompt.add_(1)
    assert net.prompt.tolist() == [1, 1]
    assert net.prompt.is_leaf


# --- gradients and parameters


def test_gradients_are_the_same_tensors_with_the_same_content(inside):
    """Accumulated ones survive a backward, a zero_grad and a step inside."""
    net = normed()
    net(X).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    content = {name: None if g is None else g.clone() for name, g in grads.items()}
    assert any(g is not None for g in grads.values())
    assert any(g is None for g in grads.values())

    def disturb():
        net.requires_grad_(True)
        net(X).square().sum().backward()
        net.zero_grad(set_to_none=False)
        for p in net.parameters():
            p.grad = torch.ones_like(p)

    inside(net, disturb)
    for name, p in net.named_parameters():
        assert p.grad is grads[name], name
        if p.grad is not None:
            assert torch.equal(p.grad, content[name])


def test_what_requires_a_gradient_is_as_before(inside):
    """Frozen layers stay frozen, trained ones trained."""
    net = normed()
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    assert set(before.values()) == {True, False}
    inside(net, lambda: net.requires_grad_(False))
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    inside(net, lambda: net.requires_grad_(True))
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before


def test_parameters_are_not_copied():
    """The network inside is the network."""
    net = normed()
    pointers = [(id(p), p.data_ptr(), p._version) for p in net.parameters()]
    with undisturbed(net, 0):
        assert [(id(p), p.data_ptr(), p._version) for p in net.parameters()] == pointers
    assert [(id(p), p.data_ptr(), p._version) for p in net.parameters()] == pointers


def change_in_place(net):
    with torch.no_grad():
        net.head.weight.add_(1)


def replace(net):
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())


def load(net):
    net.load_state_dict(net.state_dict())


def step(net):
    optimizer = torch.optim.SGD([net.head.weight], lr=0.1)
    net(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [change_in_place, load, step])
def test_changed_parameters_are_noticed(change):
    """The error names network and parameter, after everything else is restored."""
    net = normed()
    with (
        pytest.raises(
            RuntimeError, match=r"`Normed` changed its parameters: .*(head|conv)\.weight"
        ),
        undisturbed(net, 0),
    ):
        change(net)
    assert net.training
    assert not net.frozen.training


def test_a_replaced_parameter_is_put_back():
    """Its dictionary is restored like all others, so nothing is lost."""
    net = normed()
    old = net.head.weight
    with undisturbed(net, 0):
        replace(net)
        net.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert net.head.weight is old
    assert "extra" not in dict(net.named_parameters())


def test_a_changed_parameter_is_noticed_behind_an_exception_too():
    """The first exception is not lost."""
    net = normed()

    def change_and_fail():
        change_in_place(net)
        raise MyError

    with pytest.raises(RuntimeError, match=r"head\.weight") as caught, undisturbed(net, 0):
        change_and_fail()
    assert isinstance(caught.value.__context__, MyError)


def test_shared_parameters_are_fine():
    """Tied weights have two names."""
    net = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1))
    net[1].weight = net[0].weight
    net(X.float()).sum().backward()
    grad = net[0].weight.grad
    with undisturbed(net, 0):
        assert net[0].weight.grad is None
    assert net[0].weight.grad is grad
    with (
        pytest.raises(RuntimeError, match=r"0\.weight, 1\.weight"),
        undisturbed(net, 0),
        torch.no_grad(),
    ):
        net[0].weight.add_(1)


# --- flags

FLAGS = {
    "cudnn.enabled": (
        lambda: torch.backends.cudnn.enabled,
        lambda value: setattr(torch.backends.cudnn, "enabled", value),
        (True, False),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
        (True, False),
    ),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
        (True, False),
    ),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        (True, False),
    ),
    "warn only": (
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda value: torch.use_deterministic_algorithms(True, warn_only=value),
        (True, False),
    ),
    "cudnn.allow_tf32": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
        (True, False),
    ),
    "matmul": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        ("high", "highest"),
    ),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype, (torch.float64, torch.float32)),
}


@pytest.fixture
def flags():
    """Puts every flag back by itself."""
    before = {name: get() for name, (get, _, _) in FLAGS.items()}
    yield
    for name, (_, put, _) in FLAGS.items():
        if name != "warn only":
            put(before[name])
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn only"])


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("turned", [False, True])
def test_flags_are_as_before(inside, name, turned):
    """Whichever way they stood, and whichever way they are turned."""
    get, put, values = FLAGS[name]
    outside, changed = reversed(values) if turned else values
    put(outside)
    inside(nn.Conv3d(1, 1, 1), lambda: put(changed))
    assert get() == outside


def test_the_new_way_to_say_precision_is_understood():
    """``fp32_precision`` of torch 2.9: asking by the old way would raise an error."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with undisturbed(nn.Conv3d(1, 1, 1), 0):
            matmul.fp32_precision = "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_warning_filters_are_as_before(inside):
    """What a library ignores inside is shown outside again."""
    before = list(warnings.filters)
    inside(nn.Conv3d(1, 1, 1), lambda: warnings.simplefilter("ignore"))
    assert warnings.filters == before


# --- grad mode


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_there_whatever_the_mode_outside(mode):
    """Lightning validates under no_grad in fit and under inference_mode in validate."""
    net = normed()
    with mode():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x = X.clone()
        with undisturbed(net, 0):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            leaf = x.clone().requires_grad_()
            [gradient] = torch.autograd.grad(net(leaf).sum(), leaf)
            assert bool(gradient.any())
            net.train()
            net(x)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    net(X).sum().backward()  # no inference tensor is left in the network


def test_grad_mode_comes_back_if_it_is_changed_inside():
    """Also then."""
    with undisturbed(nn.Conv3d(1, 1, 1), 0):
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()


# --- logging


class Logs(nn.Module):
    """Logs in its forward, as a LightningModule may."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 1)
        self.logged = []

    def log(self, name, value):
        self.logged.append(name)

    def log_dict(self, values, prog_bar=False):
        self.logged.append(tuple(values))

    def forward(self, x):
        self.log("a", 1)
        self.log_dict({"b": 1}, prog_bar=True)
        return self.conv(x)


def test_nothing_is_logged_inside(inside):
    """What a forward logs while explaining is not the training's."""
    net = Logs()
    inside(net, lambda: net(X.float()))
    assert net.logged == []
    net(X.float())
    assert net.logged == ["a", ("b",)]
    assert not {"log", "log_dict"} & set(vars(net))


def test_a_log_of_ones_own_comes_back(inside):
    """An instance's own attribute is not lost."""
    net = Logs()
    own = []
    net.log = lambda name, value: own.append(name)
    inside(net, lambda: net(X.float()))
    net(X.float())
    assert own == ["a"]


class Logarithm(nn.Module):
    def forward(self, x):
        return x.abs().log1p()


class NamedLog(nn.Module):
    """Has a part, and no method, of this name."""

    def __init__(self):
        super().__init__()
        self.log = Logarithm()

    def forward(self, x):
        return self.log(x)


class OwnLog(nn.Module):
    """Has a logarithm of its own, and logs nothing."""

    def log(self, x):
        return x.abs().log1p()

    def forward(self, x):
        return self.log(x)


@pytest.mark.parametrize("kind", [NamedLog, OwnLog])
def test_a_logarithm_is_not_silenced(kind):
    """Only what has both ``log`` and ``log_dict`` to call logs."""
    net = kind()
    with undisturbed(net, 0):
        assert torch.equal(net(X), X.abs().log1p())


def test_a_compiled_network_that_logs_is_silent_too():
    """The wrapper's forward is the inner network's."""
    net = Logs()
    compiled = torch.compile(net, backend="eager")
    with undisturbed(compiled, 0):
        compiled(X.float())
    assert net.logged == []


# --- compiled


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile(net)", "net.compile()"])
def test_a_compiled_network_runs_eagerly(wrapped):
    """So that hooks see its parts; outside it is compiled again."""
    torch._dynamo.reset()
    compiling = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)

        def forward(self, x):
            if torch.compiler.is_compiling():
                x = x * 1.0 + 100  # only a compiled graph has this
            return self.conv(x) * 0 + x.mean()

    net = Watch()
    x = torch.zeros(1, 1, 4, 4, 4)
    ran = torch.compile(net, backend="eager") if wrapped else net
    if not wrapped:
        net.compile(backend="eager")
    compiling.append(float(ran(x).mean()))
    with undisturbed(ran, 0):
        seen = []
        net.conv.register_forward_hook(lambda *_: seen.append(1))
        compiling.append(float(ran(x).mean()))
        assert seen == [1]
    compiling.append(float(ran(x).mean()))
    assert compiling == [100.0, 0.0, 100.0]


# --- the promise


def test_training_with_an_examination_is_bit_identical_to_training_without():
    """Weights, statistics and losses, with dropout and momentum, over several steps."""

    def train(examined):
        torch.manual_seed(3)
        net = normed()
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(X + torch.randn_like(X)).square().mean()
            loss.backward()
            if examined:
                with undisturbed(net, 1):
                    leaf = torch.randn(1, 1, 6, 6, 6, dtype=torch.float64).requires_grad_()
                    net.train()
                    net(leaf).sum().backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, net.state_dict()

    (plain, weights), (losses, examined) = train(False), train(True)
    assert losses == plain
    for name, value in weights.items():
        assert torch.equal(value, examined[name]), name


def test_it_can_be_nested():
    """The inner one leaves no trace in the outer one."""
    net = normed()
    with undisturbed(net, 0):
        torch.rand(1)
        state = torch.get_rng_state()
        with undisturbed(net, 1):
            torch.rand(2)
        assert torch.equal(torch.get_rng_state(), state)
        assert not net.training
    assert net.training


def test_a_mistake_before_it_begins_leaves_no_trace():
    """A network whose ``eval`` raises."""

    class Stubborn(nn.Conv3d):
        def eval(self):
            raise MyError

    net = Stubborn(1, 1, 1)
    grad = net.weight.grad = torch.ones_like(net.weight)
    state = torch.get_rng_state()
    with pytest.raises(MyError), undisturbed(net, 0):
        pass
    assert net.weight.grad is grad
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
