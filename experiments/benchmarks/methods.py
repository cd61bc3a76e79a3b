"""What the attribution methods cost and how right they are: one line of JSON for each number.

    python experiments/benchmarks/methods.py              # all
    python experiments/benchmarks/methods.py flops memory # some

Ratios within one run, or counts; nothing depends on the machine but the CPU time.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from captum import attr
from counters import flops, peak_bytes
from networks import NETWORKS, network
from torch import Tensor, nn
from volumes import SCALES, probe

from lightning_segxai import (
    LRP,
    AttributionMethod,
    ClassEvidence,
    DeepLift,
    GradCAM,
    GuidedBackprop,
    HiResCAM,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerGradientXActivation,
    Probe,
    Saliency,
    UNet3d,
    examine,
)
from lightning_segxai.defaults import default_methods
from lightning_segxai.scored import Predictor
from lightning_segxai.windows import Windows

TARGET = {"cube": ClassEvidence(1)}
LAYERS = ("encoder.1", "encoder.2", "encoder.3", "decoder.1")


def say(what: str, value: float, bound: str, **more: Any) -> None:
    """One number."""
    print(json.dumps({"what": what, "value": value, "bound": bound, **more}), flush=True)


def single(of: Probe) -> Probe:
    """The same in float32."""
    return Probe(of.name, of.image.float(), of.label)


def shared_set() -> dict[str, AttributionMethod]:
    """Six methods; the layer methods at four layers."""
    methods: dict[str, AttributionMethod] = {"s": Saliency(), "ixg": InputXGradient()}
    for layer in LAYERS:
        name = layer.replace(".", "-")
        methods |= {
            f"cam-{name}": GradCAM(layer),
            f"hires-{name}": HiResCAM(layer),
            f"gxa-{name}": LayerGradientXActivation(layer),
            f"act-{name}": LayerActivation(layer),
        }
    return methods


def explained(net: nn.Module, on: Probe, methods: dict[str, AttributionMethod]) -> Any:
    """All maps of a network that has been rehearsed, in one go; they are ok."""
    found = examine(net, [on], TARGET, methods)
    assert all(f.status == "ok" for f in found), [f.reason for f in found]
    return found


def rehearsal_flops(net: nn.Module, on: Probe) -> int:
    """What finding out about a new network takes, once for each shape of window."""
    return flops(lambda: Predictor(net).rehearse(on.image))


def a_pass(net: nn.Module, on: Probe) -> int:
    """One forward and one backward to the input."""

    def work() -> None:
        x = (on.image[None] + 0 * torch.zeros_like(on.image, requires_grad=True)).requires_grad_()
        torch.autograd.grad(net(x)[:, 1].sum(), x)

    for parameter in net.parameters():
        parameter.requires_grad_(False)
    found = flops(work)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    return found


def count_flops() -> None:
    """The shared passes."""
    net = UNet3d(1, 2, 8, 4).eval()
    on = single(probe(32))
    one, first = a_pass(net, on), rehearsal_flops(net, on)
    together = flops(lambda: explained(net, on, shared_set())) - first
    say("FLOPs of six methods at four layers / (forward + backward)", together / one, "<= 1.05")
    path: dict[str, AttributionMethod] = {"ig": IntegratedGradients(16)}
    for layer in LAYERS[:2]:
        name = layer.replace(".", "-")
        path[f"conductance-{name}"] = LayerConductance(layer, 16)
        path[f"influence-{name}"] = InternalInfluence(layer, 16)
    walked = flops(lambda: explained(net, on, path)) - first
    ratio = walked / one / 16
    say("FLOPs of the path methods at two layers, 16 steps / 16 passes", ratio, "<= 1.10")


def time_against_captum() -> None:
    """CPU time of the shared set and of one Captum call for each map."""
    net = UNet3d(1, 2, 8, 4).eval()
    on = single(probe(64))
    assert on.label is not None
    weights = (on.label == 1).float()
    x = on.image[None]

    def score(volume: Tensor) -> Tensor:
        return (net(volume)[:, 1] * weights).sum(dim=(1, 2, 3))

    def theirs() -> None:
        attr.Saliency(score).attribute(x.clone().requires_grad_())
        attr.InputXGradient(score).attribute(x.clone().requires_grad_())
        for layer in LAYERS:
            part = net.get_submodule(layer)
            attr.LayerGradCam(score, part).attribute(x)
            attr.LayerGradientXActivation(score, part).attribute(x)  # HiResCAM by its ReLU
            attr.LayerGradientXActivation(score, part).attribute(x)
            attr.LayerActivation(score, part).attribute(x)

    def ours() -> None:
        explained(net, on, shared_set())

    found: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(5):
        for name, work in (("theirs", theirs), ("ours", ours)):
            begin = time.process_time()
            work()
            found[name].append(time.process_time() - begin)
    ratio = sorted(found["theirs"])[2] / sorted(found["ours"])[2]
    say("CPU time of Captum, a call for each of 18 maps, / ours", ratio, ">= 7", **found)


def memory() -> None:
    """Bytes at the peak."""
    torch.manual_seed(0)
    on = single(probe(64))
    assert on.label is not None
    net = UNet3d(1, 2, 8, 4).train()
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(on.image[None]), on.label[None]).backward()
        optimizer.step()

    step()
    training = peak_bytes(step)
    optimizer.zero_grad()
    monitor = peak_bytes(lambda: explained(net, on, default_methods()))
    say("peak memory of the default set / a training step, 64^3", monitor / training, "<= 1.0",
        monitor=monitor, training=training)  # fmt: skip

    net = UNet3d(1, 2, 6, 3).eval()
    peaks = []
    for shape in ((128, 128, 128), (256, 256, 128)):
        image = torch.randn(1, *shape)
        label = torch.zeros(shape, dtype=torch.long)
        label[40:60, 40:60, 40:60] = 1
        voxels = image.numel()
        aside = {k * voxels for k in (1, 2, 4, 8, 16)}

        def work(image: Tensor = image, label: Tensor = label) -> None:
            methods = {
                "saliency": Saliency(),
                "guided": GuidedBackprop(),
                "deeplift": DeepLift("minimum"),
                "lrp": LRP(),
                "hires": HiResCAM(),
            }
            examine(net, [Probe("v", image, label)], TARGET, methods, window=64, overlap=0.0)

        peaks.append(peak_bytes(work, aside))
    say("peak memory of 256x256x128 / 128^3 by windows, volumes aside", peaks[1] / peaks[0],
        "<= 1.1", bytes=peaks)  # fmt: skip


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


Oracle = tuple[AttributionMethod, Callable[[], Tensor]]
"""A method of ours, and the same map by others."""


def captum_oracles(net: nn.Module, on: Probe) -> dict[str, Oracle]:
    """Captum where it is right: BatchNorm in eval mode, distinct ReLUs, whole volumes."""
    assert on.label is not None
    region = (on.label == 1).to(on.image.dtype)
    voxels = int(region.sum())
    scored = _Scored(net, region)
    x = on.image[None].clone().requires_grad_()
    deep = net.get_submodule("deep")

    def on_the_grid(layer: Tensor) -> Tensor:
        return attr.LayerAttribution.interpolate(layer, on.shape, "trilinear")[0].sum(0)

    def saliency() -> Tensor:
        return attr.Saliency(scored).attribute(x)[0, 0] / voxels

    def input_x_gradient() -> Tensor:
        return attr.InputXGradient(scored).attribute(x)[0, 0] / voxels

    def integrated() -> Tensor:
        # of two steps, whose weights are exact in the float32 that Captum holds them in
        found = attr.IntegratedGradients(scored).attribute(x, float(x.min()), n_steps=2)
        return found[0, 0] / voxels

    def guided() -> Tensor:
        return attr.GuidedBackprop(scored).attribute(x)[0, 0] / voxels

    def grad_cam() -> Tensor:
        return on_the_grid(attr.LayerGradCam(scored, deep).attribute(x))

    def hires_cam() -> Tensor:
        return on_the_grid(attr.LayerGradientXActivation(scored, deep).attribute(x))

    return {
        "Saliency": (Saliency(), saliency),
        "InputXGradient": (InputXGradient(), input_x_gradient),
        "IntegratedGradients": (IntegratedGradients(2, "minimum"), integrated),
        "GuidedBackprop": (GuidedBackprop(), guided),
        "GradCAM": (GradCAM("deep", relu=False), grad_cam),
        "HiResCAM": (HiResCAM("deep", relu=False), hires_cam),
    }


def equality() -> None:
    """Captum where it is right, and autograd through the whole sliding-window predictor."""
    for kind, bound, on in (
        ("float64", "<= 1e-10", probe(16)),
        ("float32", "<= 1e-5", single(probe(16))),
    ):
        net = network("module ReLU", seed=1).to(on.image.dtype)
        for name, (method, oracle) in captum_oracles(net, on).items():
            [mine] = explained(net, on, {"m": method})
            off = largest_difference(mine.values, oracle().detach())
            say(f"{name} against Captum, {kind}", off, bound)

    net, on = network("module ReLU"), probe(20)
    assert on.label is not None
    windows = Windows((20, 20, 20), (16, 16, 16), 0.5)
    x = on.image.clone().requires_grad_()
    score = torch.zeros((), dtype=torch.float64)
    for place in windows.places:
        blended = net(x[(slice(None), *place)][None])[0, 1] * windows.share(place, torch.float64)
        score = score + (blended * (on.label[place] == 1)).sum()
    [whole] = torch.autograd.grad(score, x)
    [mine] = examine(net, [on], TARGET, {"m": Saliency(absolute=False)}, window=16)
    off = largest_difference(mine.values * int(on.label.sum()), whole[0])
    say("windowed gradient against autograd through the whole predictor", off, "<= 1e-5")


class _Scored(nn.Module):
    """A network and its score as one module, as Captum's rules want it."""

    def __init__(self, net: nn.Module, region: Tensor) -> None:
        super().__init__()
        self.net, self.region = net, region

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = (self.net(x)[:, 1] * self.region).sum(dim=(1, 2, 3))
        return score


def completeness() -> None:
    """DeepLift, and integrated gradients with what helps them."""
    for name in NETWORKS:
        on = probe(32 if "Basic" in name else 16)
        for baseline in ("minimum", "blurred", "noise"):
            method = DeepLift(baseline, norm="exact")
            [found] = explained(network(name), on, {"m": method})
            say(f"completeness of DeepLift, {name}, {baseline}",
                found.completeness_error, "<= 1e-6", cancellation=found.cancellation)  # fmt: skip
    helps: dict[str, AttributionMethod] = {
        "steps50": IntegratedGradients(50),
        "steps200": IntegratedGradients(200),
        "adaptive50": IntegratedGradients(50, adaptive=True),
        "frozen50": IntegratedGradients(50, norm="frozen"),
        "minimum50": IntegratedGradients(50, "minimum"),
    }
    for name in NETWORKS:
        if "MONAI" not in name and "UNet3d" not in name and name != "module ReLU":
            continue
        for scale in SCALES:
            on = probe(32 if "Basic" in name else 16, scale)
            found = {f.method: f for f in examine(network(name), [on], TARGET, helps)}
            errors = {k: f.completeness_error for k, f in found.items()}
            marked = [k for k, f in found.items() if f.doubtful]
            say(f"completeness of IntegratedGradients, {name}, {scale}", errors["steps50"],
                "<= 1e-2 on BatchNorm", **errors, marked=marked)  # fmt: skip


class DarkBand(nn.Module):
    """Reads a dark band and nothing else: says that it is there where it is darker than 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.zeros_like(x)
        inside[..., 12:16] = 1
        dark = (0.5 - x).relu() * inside
        said = dark.mean(dim=(2, 3, 4), keepdim=True).expand_as(x)
        return torch.cat([torch.zeros_like(x), said], dim=1)


def dark_band() -> None:
    """Evidence that is darker than what is around it."""
    generator = torch.Generator().manual_seed(0)
    image = 0.8 + 0.05 * torch.randn(1, 32, 32, 32, generator=generator, dtype=torch.float64)
    image[..., 12:16] = 0.05 * torch.rand(1, 32, 32, 4, generator=generator, dtype=torch.float64)
    on = Probe("dark", image, (image[0] > 0.9).long())
    for baseline in ("blurred", "minimum", "noise"):
        [found] = examine(DarkBand(), [on], TARGET, {"m": IntegratedGradients(16, baseline)})
        mass = found.values.abs()
        say(f"mass of IntegratedGradients on a dark band, {baseline}",
            float(mass[..., 12:16].sum() / mass.sum().clamp_min(1e-30)),
            ">= 0.9" if baseline == "blurred" else "", total=float(mass.sum()))  # fmt: skip


PARTS = {
    "flops": count_flops,
    "time": time_against_captum,
    "memory": memory,
    "equality": equality,
    "completeness": completeness,
    "dark": dark_band,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
