"""What the methods say, written down plainly: slow, one network at a time, with nothing of ours but `spread`.

Gradients are by autograd and a hook; rules by other modules in the place of activations,
convolutions and norms.
"""

from __future__ import annotations

import copy
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from lightning_segxai.taps import spread

RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
ACTIVATIONS = (*RECTIFIERS, nn.Sigmoid)
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm)


class Plain:
    """A copy of a network, the volume, and the layer that is looked at."""

    def __init__(self, net, probe, layer):
        self.net, self.layer = copy.deepcopy(net).requires_grad_(False), layer
        self.probe, self.x = probe, probe.image
        self.region = (probe.label == 1).double()
        self.voxels = int(self.region.sum())

    def at(self, layer):
        """The same, looked at in another layer."""
        return Plain(self.net, self.probe, layer)

    def score(self, x):
        """The summed logits of class 1 in the region, of all rows."""
        return (self.net(x)[:, 1] * self.region).sum()

    def look(self, rows):
        """For each row the gradient, the layer, and the gradient with respect to the layer."""
        found = []
        for part in torch.stack(list(rows)).split(2):
            given, kept = part.clone().requires_grad_(), []

            def keep(_module, _args, output, kept=kept):
                kept[:] = [output]
                return output.clone()

            handle = self.net.get_submodule(self.layer).register_forward_hook(keep)
            score = self.score(given)
            handle.remove()
            gradients = torch.autograd.grad(score, [given, *kept])
            found.append((gradients[0], kept[0].detach(), gradients[1]))
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    @cached_property
    def here(self):
        """At the volume: gradient, layer, gradient of the layer."""
        return [found[0] for found in self.look([self.x])]

    @cached_property
    def blurred(self):
        """The baseline."""
        sigma = (0, *(5 / edge for edge in self.probe.spacing_mm))
        return torch.from_numpy(ndimage.gaussian_filter(self.x.numpy(), sigma, mode="nearest"))

    def line(self, t):
        """A point between the baseline and the volume."""
        return self.blurred + t * (self.x - self.blurred)

    def grid(self, values):
        """Trilinear."""
        if values.shape == self.x.shape[1:]:
            return values
        return F.interpolate(values[None, None], self.x.shape[1:], mode="trilinear")[0, 0]

    def spread(self, values):
        """Trilinear, the sum kept."""
        shape = tuple(self.x.shape[1:])
        return spread(values, shape, tuple(slice(0, size) for size in shape))


def nodes(steps):
    """Those of Gauss-Legendre between 0 and 1, with their weights, ascending."""
    t, w = np.polynomial.legendre.leggauss(steps)
    return torch.tensor((t + 1) / 2), torch.tensor(w / 2)


def noisy_saliencies(plain, samples, absolute):
    """The gradient at noisy copies: its largest absolute value, or its sum, over channels."""
    generator = torch.Generator().manual_seed(0)
    extent = 0.1 * (plain.x.max() - plain.x.min())
    copies = [
        plain.x + extent * torch.randn(plain.x.shape, generator=generator, dtype=plain.x.dtype)
        for _ in range(samples)
    ]
    gradient = plain.look(copies)[0]
    return gradient.abs().amax(1) if absolute else gradient.sum(1)


def conductance(t, w, layer, gradient):
    """Each node's gradient times how far the layer goes in its part; first and last are the ends.

    The layer between two nodes is interpolated.
    """
    bounds = torch.cat([torch.zeros(1), w.cumsum(0)]).double()
    at = torch.cat([torch.zeros(1), t, torch.ones(1)]).double()

    def values(where):
        k = int(torch.searchsorted(at, where).clamp(1, len(at) - 1))
        share = (where - at[k - 1]) / (at[k] - at[k - 1])
        return layer[k - 1] + share * (layer[k] - layer[k - 1])

    gone = [values(b) - values(a) for a, b in zip(bounds, [*bounds[1:-1], at[-1]], strict=False)]
    return sum((g * way).sum(0) for g, way in zip(gradient[1:-1], gone, strict=True))


def walking_layer(plain, steps):
    """The layer's values alone walk; the volume stays."""
    here, there = plain.look([plain.x, plain.blurred])[1]
    module, calls = plain.net.get_submodule(plain.layer), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    plain.net(plain.x[None])
    handle.remove()
    total = torch.zeros_like(here)
    for t, w in zip(*nodes(steps), strict=True):
        values = (there + t * (here - there))[None].requires_grad_()
        waiting = [None] * (len(calls) - 1) + [values]

        def replace(_module, _args, output, waiting=waiting):
            values = waiting.pop(0)
            return output if values is None else values.clone()

        handle = module.register_forward_hook(replace)
        [gradient] = torch.autograd.grad(plain.score(plain.x[None]), values)
        handle.remove()
        total += w * gradient[0]
    return ((here - there) * total).sum(0)


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


def guided(plain, derivative):
    """Rectifiers let only what is positive back, times their derivative or not."""

    def make(rectifier):
        def rectify(x):
            def back(gradient):
                if not derivative:
                    return gradient.clamp(min=0)
                at = x.detach().requires_grad_()
                return gradient.clamp(min=0) * torch.autograd.grad(rectifier(at).sum(), at)[0]

            return _Ruled.apply(rectifier(x.detach()), back, x)

        return rectify

    net = swapped(copy.deepcopy(plain.net), RECTIFIERS, make)
    x = plain.x[None].clone().requires_grad_()
    logits = net(x)
    return torch.autograd.grad((logits[:, 1] * plain.region).sum(), x)[0][0].sum(0)


# --- relevance


def relevance(plain, excitation=False, contrast=False):
    """LRP by z+, w2 at the input; or excitation, for or against: the relevance of the input.

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

    of = Plain(plain.net, plain.probe, plain.layer)
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


# --- hiding


def fallen(plain, masks):
    """How far the score falls where the baseline shows in each mask."""
    rows = [torch.where(mask, plain.blurred, plain.x) for mask in masks]
    return [float(plain.score(plain.x[None]) - plain.score(row[None])) for row in rows]
