"""Rules written down plainly: other modules in the place of activations, convolutions and norms."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
ACTIVATIONS = (*RECTIFIERS, nn.Sigmoid)
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm)


def swapped(net, kinds, make):
    """The network with other modules in the place of some kinds; each is made once."""
    made = {}
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, kinds):
                if hasattr(child, "inplace"):
                    child.inplace = False
                if id(child) not in made:
                    made[id(child)] = _Swapped(make(child))
                parent._modules[name] = made[id(child)]
    return net


class _Swapped(nn.Module):
    """A function in the place of a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class _Ruled(torch.autograd.Function):
    """A value, and how the gradient there goes back to each of some tensors."""

    @staticmethod
    def forward(ctx, value, back, *tensors):
        ctx.back = back
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            found = ctx.back(gradient)
        return None, None, *(found if isinstance(found, tuple) else (found,))


# --- guided


def guided(plain, derivative=True, of_layer=False):
    """From the score, or a layer's magnitudes, back by positive gradients."""

    def make(rectifier):
        def rectify(x):
            def back(gradient):
                if not derivative:
                    return gradient.clamp(min=0)
                at = x.detach().requires_grad_()
                return gradient.clamp(min=0) * torch.autograd.grad(rectifier(at).sum(), at)[0]

            return _Ruled.apply(rectifier(x.detach()), back, x)

        return rectify

    of, kept = plain.at(plain.layer), []
    swapped(of.net, RECTIFIERS, make)
    of.net.get_submodule(of.layer).register_forward_hook(lambda *call: kept.append(call[-1]))
    x = plain.x[None].clone().requires_grad_()
    start = of.score(x)
    if of_layer:
        start = kept[-1].abs().sum()
    return torch.autograd.grad(start, x)[0][0].sum(0)


# --- relevance


def relevance(plain, excitation=False, contrast=False):
    """The relevance of the input: LRP by z+, w2 at the input, or excitation, for or against.

    A convolution and the norm behind it are one convolution; activations, and norms behind
    anything else, pass relevance on.
    """
    net, given = copy.deepcopy(plain.net), {}
    merged, of_input, last = _traced(net, plain.x[None])

    def make(module):
        if isinstance(module, CONVOLUTIONS):
            bias = torch.zeros(module.out_channels) if module.bias is None else module.bias.clone()
            sign = -1 if contrast and module is last else 1
            first = module in of_input

            def weighing(scale, shift):
                weight = sign * module.weight * scale.reshape(_OUT[type(module)])
                return partial(_shares, module, weight, bias * scale + shift, excitation, first)

            def convolve(x):
                given[module] = x, weighing
                share = weighing(torch.ones_like(bias), torch.zeros_like(bias))
                return _passed(x, module(x.detach()), share, first)

            return convolve

        def other(x):
            value = module(x.detach())
            if module not in merged:
                return _passed(x, value, lambda _, relevance: relevance, False)
            before, weighing = given[merged[module]]
            share = weighing(*_constants(module, x.detach()))
            return _passed(before, value, share, merged[module] in of_input)

        return other

    swapped(net, (*CONVOLUTIONS, *NORMS, *ACTIVATIONS), make)
    x = plain.x[None].clone().requires_grad_()
    logits = net(x)
    seed = torch.zeros_like(logits)
    seed[:, 1] = plain.region
    if excitation:
        seed = seed / _away_from_zero(logits.detach(), 1e-12)
    return torch.autograd.grad(logits, x, seed)[0][0].sum(0)


_OUT = {nn.Conv3d: (-1, 1, 1, 1, 1), nn.ConvTranspose3d: (1, -1, 1, 1, 1)}


def _passed(x, value, share, is_input):
    """Relevance is value times gradient; at the network's input the gradient is the relevance."""
    at, y = x.detach().clone(), value.clone()

    def back(gradient):
        relevance = share(at, y * gradient)
        return relevance if is_input else torch.where(at == 0, 0, relevance / at)

    return _Ruled.apply(value, back, x)


def _shares(module, weight, bias, excitation, first, x, relevance):
    """What each voxel of the input gets of what each of the output has."""

    def convolve(values, weights):
        without = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
        return torch.func.functional_call(module, {"weight": weights, **without}, (values,))

    if first and not excitation:
        parts, absorbed = [(torch.ones_like(x), weight**2)], bias**2
    else:
        parts = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
        absorbed = bias.clamp(min=0)
    parts = [(values.requires_grad_(), weights) for values, weights in parts]
    sums = [convolve(*part) for part in parts]
    whole = sum(sums).detach()
    if not excitation:
        whole = whole + absorbed[:, None, None, None]
    of_one = relevance / _away_from_zero(whole, 1e-12 if excitation else 1e-6)
    return sum(
        values.detach() * torch.autograd.grad(made, values, of_one)[0]
        for (values, _), made in zip(parts, sums, strict=True)
    )


def _away_from_zero(values, epsilon):
    return values + torch.where(values < 0, -epsilon, epsilon)


def _constants(norm, x):
    """Scale and shift of each channel that a norm comes down to at its input."""
    if isinstance(norm, nn.BatchNorm3d):
        mean, variance = norm.running_mean, norm.running_var
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        each = x.reshape(groups, -1)
        mean, variance = (
            m.repeat_interleave(x.shape[1] // groups)
            for m in (each.mean(1), each.var(1, correction=0))
        )
    weight = 1 if norm.weight is None else norm.weight
    bias = 0 if norm.bias is None else norm.bias
    scale = weight / torch.sqrt(variance + norm.eps)
    return scale, bias - mean * scale


def _traced(net, x):
    """The convolution before each norm that has one; those of the input; the last one."""
    answers, merged, of_input, calls = [], {}, set(), []

    def after(module, args, output):
        answers.append((module, output, output._version))
        calls.append(module)
        if args[0] is x:
            of_input.add(module)

    def before(module, args):
        for conv, output, version in answers:
            if args[0] is output and output._version == version:
                merged[module] = conv

    handles = [
        m.register_forward_hook(after)
        if isinstance(m, CONVOLUTIONS)
        else m.register_forward_pre_hook(before)
        for m in net.modules()
        if isinstance(m, (*CONVOLUTIONS, *NORMS))
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return merged, of_input, calls[-1]


# --- the rescale rule


def rescaled_layer(plain):
    """Slopes between the two answers, from the logits down to the layer, times its difference."""

    def make(module):
        if isinstance(module, RECTIFIERS):
            return lambda x: _slope(module, x)

        def normalize(x):
            groups = module.num_groups if isinstance(module, nn.GroupNorm) else x.shape[1]
            each = x.reshape(len(x), groups, -1)
            off = each - each.mean(2, keepdim=True)
            variance = _product(off, off).mean(2, keepdim=True)
            scale = _slope(lambda v: torch.rsqrt(v + module.eps), variance)
            y = _product(off, scale.expand_as(off)).reshape(x.shape)
            if module.weight is None:
                return y
            wide = (-1, 1, 1, 1)
            return y * module.weight.reshape(wide) + module.bias.reshape(wide)

        return normalize

    of = plain.at(plain.layer)
    swapped(of.net, (*RECTIFIERS, nn.InstanceNorm3d, nn.GroupNorm), make)
    _, layer, multiplier = of.look([plain.x, plain.blurred])
    return ((layer[0] - layer[1]) * multiplier[0]).sum(0)


def _slope(function, x):
    """Rise over run; the derivative where the two are equal."""

    def back(gradient):
        at = x.detach().requires_grad_()
        y = function(at)
        [derivative] = torch.autograd.grad(y.sum(), at)
        run, rise = x.detach()[0] - x.detach()[1], (y[0] - y[1]).detach()
        equal = run.abs() < 1e-14 * x.detach().abs().amax(0)
        return gradient * torch.where(equal, derivative[0], rise / torch.where(equal, 1, run))

    return _Ruled.apply(function(x.detach()), back, x)


def _product(a, b):
    """Each factor gets the mean of the other."""

    def back(gradient):
        return gradient * b.detach().mean(0), gradient * a.detach().mean(0)

    return _Ruled.apply(a.detach() * b.detach(), back, a, b)
