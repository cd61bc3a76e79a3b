"""What the methods say, written down plainly: slow, one network at a time, with nothing of ours.

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

    def of(self, net):
        """The same with another network."""
        return Plain(net, self.probe, self.layer)

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


def replaced(net, kinds, make):
    """A copy of a network with other modules in the place of some kinds, each made once."""
    net, made = copy.deepcopy(net).requires_grad_(False), {}
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, kinds):
                if hasattr(child, "inplace"):
                    child.inplace = False
                made.setdefault(id(child), make(child))
                parent._modules[name] = made[id(child)]
    return net


class _Ruled(torch.autograd.Function):
    """A value, and how a gradient at it goes back to each of some tensors."""

    @staticmethod
    def forward(ctx, value, back, *tensors):
        ctx.back = back
        return value.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            found = ctx.back(gradient)
        return None, None, *(found if isinstance(found, tuple) else (found,))


class _Module(nn.Module):
    """A function of a tensor in the place of a module."""

    def __init__(self, function, **known):
        super().__init__()
        self.function = function
        vars(self).update(known)

    def forward(self, x):
        return self.function(x)


# --- guided


def guided(net, derivative):
    """A copy whose rectifiers let only what is positive back, times their derivative or not."""

    def make(rectifier):
        def rectify(x):
            def back(gradient):
                if not derivative:
                    return gradient.clamp(min=0)
                at = x.detach().requires_grad_()
                return gradient.clamp(min=0) * torch.autograd.grad(rectifier(at).sum(), at)[0]

            return _Ruled.apply(rectifier(x.detach()), back, x)

        return _Module(rectify)

    return replaced(net, RECTIFIERS, make)


# --- relevance


def relevance(plain, excitation=False, contrast=False):
    """LRP by z+, w2 at the input; or excitation, for or against: the relevance of the input."""
    net = copy.deepcopy(plain.net)
    merged, of_input, last = _traced(net, plain.x)
    net.load_state_dict(plain.net.state_dict())
    by_name = {module: name for name, module in net.named_modules()}
    tags = {id(plain.net.get_submodule(name)): module for module, name in by_name.items()}
    copies = {}

    def conv(module):
        original = names[id(module)]
        first = original in of_input
        weight = -module.weight if contrast and original is last else module.weight
        bias = module.bias if module.bias is not None else torch.zeros(module.out_channels)
        wide = (-1, 1, 1, 1, 1) if isinstance(module, nn.Conv3d) else (1, -1, 1, 1, 1)

        def pass_on(x, value, scale, shift):
            """Of the convolution and the norm behind it, as one."""
            share = _Shares(module, weight * scale.reshape(wide), bias * scale + shift, excitation)
            back = partial(share, x.detach(), value.detach(), first=first)
            return _Ruled.apply(value, back, x)

        def convolve(x):
            copies[original] = (pass_on, x)
            value = module(x.detach())
            return pass_on(x, value, torch.ones_like(bias), torch.zeros_like(bias))

        return _Module(convolve)

    def norm(module):
        original = names[id(module)]

        def normalize(x):
            value = module(x.detach())
            if original not in merged:
                return _unchanged(x, value)
            pass_on, given = copies[merged[original]]
            return pass_on(given, value, *_constants(module, x.detach()))

        return _Module(normalize)

    def make(module):
        if isinstance(module, CONVOLUTIONS):
            return conv(module)
        if isinstance(module, NORMS):
            return norm(module)
        return _Module(lambda x: _unchanged(x, module(x.detach())))

    kinds = (*CONVOLUTIONS, *NORMS, *ACTIVATIONS)
    names = {}
    ruled = copy.deepcopy(net)
    for name, module in ruled.named_modules():
        names[id(module)] = net.get_submodule(name)
    del tags
    _replace(ruled, kinds, make)
    x = plain.x[None].clone().requires_grad_()
    logits = ruled(x)
    weights = torch.zeros_like(logits)
    weights[:, 1] = plain.region
    seed = weights / _away(logits.detach(), 1e-12) if excitation else weights
    return torch.autograd.grad(logits, x, seed)[0][0].sum(0)
