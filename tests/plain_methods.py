"""What the methods say, written down plainly: slow, and with nothing of ours but `spread`.

Gradients are by autograd, layers by a hook. `plain_rules` writes down other ways backward.
"""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from lightning_segxai.taps import spread


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
    """Each node's gradient times how far the layer, interpolated, goes in the node's part."""
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


def fallen(plain, masks):
    """How far the score falls where the baseline shows in each mask."""
    rows = [torch.where(mask, plain.blurred, plain.x) for mask in masks]
    return [float(plain.score(plain.x[None]) - plain.score(row[None])) for row in rows]
