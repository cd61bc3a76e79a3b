"""Make lrp_zennit.json: relevances of three tiny 3D networks under LRP, by zennit 0.5.1.

Versions: Python 3.11, torch 2.13.0 (CPU), numpy 2.4.6, pillow (any), zennit 0.5.1. Set up and run,
from the repository's root (a CPU build of torch is enough, and torchvision is not needed):

    python3 -m venv /tmp/zennit-venv
    /tmp/zennit-venv/bin/pip install torch==2.13.0 numpy==2.4.6 pillow
    /tmp/zennit-venv/bin/pip install --no-deps zennit==0.5.1
    /tmp/zennit-venv/bin/python tests/oracles/make_lrp.py

zennit asks for torchvision only to make canonizers for its ResNets, which are not used here:
``import_zennit`` puts two empty classes in torchvision's place. Nothing here imports zennit before
``main`` runs, so the project's tests, which have no zennit, can import this file for ``network``.

Everything is float64 and in eval mode. zennit's merging of a BatchNorm leaves its ``eps`` in place:
the norm that should be an identity then divides by sqrt(1 + eps), so the network that is explained
is not quite the one that was given. ``relevance`` in the file is therefore with the eps of the
merged norms put to 0 (and is checked to be what zennit gives for a network that was merged by hand
and has no norms); ``relevance_stock`` is zennit's own.
"""

from __future__ import annotations

import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SEED = 7  # logits of both signs in A and C; no tiny denominator in epsilon; no maxima that tie
SIZE = 6
CLASS = 1
CUBE = ((0, 2), (2, 4), (4, 6))  # where the logits are explained: 2 x 2 x 2, at two borders
COMMAND = "/tmp/zennit-venv/bin/python tests/oracles/make_lrp.py"
FILE = Path(__file__).with_name("lrp_zennit.json")

NETWORKS = {
    "A": "Sequential: 0 Conv3d(1,3,3,padding=1), 1 ReLU, 2 Conv3d(3,4,3,padding=1), 3 ReLU, "
    "4 Conv3d(4,2,1)",
    "B": "Sequential: 0 Conv3d(1,3,3,padding=1), 1 BatchNorm3d(3), 2 ReLU, "
    "3 Conv3d(3,4,3,padding=1), 4 BatchNorm3d(4), 5 ReLU, 6 Conv3d(4,2,1)",
    "C": "one = ReLU(norm1(conv1(x))), conv1 = Conv3d(1,3,3,padding=1); "
    "two = ReLU(norm2(conv2(MaxPool3d(2)(one)))), conv2 = Conv3d(3,4,3,padding=1); "
    "three = ReLU(norm3(conv3(cat([one, Upsample(scale_factor=2, mode='nearest')(two)], dim=1)))), "
    "conv3 = Conv3d(7,3,3,padding=1); head = Conv3d(3,2,1) of three",
}
RULES = {
    "epsilon": "every convolution Epsilon(epsilon=1e-6)",
    "zplus": "every convolution ZPlus(stabilizer=1e-6, the default)",
    "zplus_wsquare": "as zplus, but the first convolution WSquare(stabilizer=1e-6, the default)",
    "zplus_zbox": "as zplus, but the first convolution ZBox(low=input.min(), high=input.max(), "
    "stabilizer=1e-6, the default), low and high as float64 tensors of no axes",
}
FORMULAS = {
    "notation": "j is a cell (voxel and channel) of a convolution's input x, k one of its output; "
    "w_jk and b_k are weight and bias, after merging a BatchNorm; R_k is the relevance that comes "
    "in, R_j what goes on; (.)+ = max(., 0), (.)- = min(., 0); sum_j runs over the cells in the "
    "volume: padding is a zero of every modified input (also of WSquare's ones and of ZBox's low "
    "and high), so it is in no sum, neither above nor below the line.",
    "stabilizer": "s(z) = z + 1e-6 * sign(z), with sign(0) = +1; the same in all rules",
    "zero_params": "None in all cases, so no bias is put to zero but where a formula says so. With "
    "zero_params='bias' the bias of every modified module would be 0: b_k = 0 in the formulas.",
    "epsilon": "R_j = x_j sum_k w_jk R_k / s(z_k), z_k = sum_j x_j w_jk + b_k",
    "zplus": "R_j = sum_k (x_j+ w_jk+ + x_j- w_jk-) R_k / s(z_k), "
    "z_k = sum_j (x_j+ w_jk+ + x_j- w_jk-) + b_k+: the positive part of the bias takes relevance, "
    "its negative part is ignored",
    "alphabeta_1_0": "the formula of zplus; equal to the last bit in all three networks",
    "wsquare": "R_j = sum_k w_jk^2 R_k / s(z_k), z_k = sum_j w_jk^2 + b_k^2: the squared bias "
    "takes relevance; at the border, sum_j has only the weights that meet the volume",
    "zbox": "R_j = sum_k (x_j w_jk - l w_jk+ - h w_jk-) R_k / s(z_k), "
    "z_k = sum_j (x_j w_jk - l w_jk+ - h w_jk-) + (b_k - b_k+ - b_k-): the bias cancels, and takes "
    "nothing",
    "relu": "Pass: R_j = R_k",
    "batchnorm": "merged: w' = w * g / sqrt(var + eps) for each output channel, "
    "b' = (b - mean) * g / sqrt(var + eps) + beta; then Pass",
    "maxpool": "no rule, so the gradient: all of R_k goes to the maximum",
    "upsample": "no rule, so the gradient: R_j is the sum of R_k over the 2 x 2 x 2 copies",
    "cat": "the gradient: each part keeps its own; where a tensor is used twice its two relevances "
    "are added",
    "output": "R = logits of class 1 in the cube (also where negative), 0 elsewhere",
}


class UNet(nn.Module):
    """Two levels, a skip, and a module of its own for every step that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = (
            nn.Conv3d(1, 3, 3, padding=1),
            nn.BatchNorm3d(3),
            nn.ReLU(),
        )
        self.pool = nn.MaxPool3d(2)
        self.conv2, self.norm2, self.act2 = (
            nn.Conv3d(3, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.ReLU(),
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv3, self.norm3, self.act3 = (
            nn.Conv3d(7, 3, 3, padding=1),
            nn.BatchNorm3d(3),
            nn.ReLU(),
        )
        self.head = nn.Conv3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.act1(self.norm1(self.conv1(x)))
        two = self.act2(self.norm2(self.conv2(self.pool(one))))
        both = torch.cat([one, self.up(two)], dim=1)
        return self.head(self.act3(self.norm3(self.conv3(both))))


def bare(name: str) -> nn.Module:
    """The network, with whatever weights torch gives it."""
    if name == "C":
        return UNet()
    first, second = nn.Conv3d(1, 3, 3, padding=1), nn.Conv3d(3, 4, 3, padding=1)
    head = nn.Conv3d(4, 2, 1)
    if name == "A":
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)
    norms = nn.BatchNorm3d(3), nn.BatchNorm3d(4)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), head)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Network A, B or C and its input (1, 1, 6, 6, 6), by one generator that starts at SEED.

    The input is drawn first, then module after module in order: a convolution's weight and bias;
    a norm's mean, variance, weight (every second one negative) and bias.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    x = normal(1, 1, SIZE, SIZE, SIZE)
    net = bare(name).double().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            scale = module.weight[0].numel() ** -0.5
            module.weight.copy_(normal(*module.weight.shape) * scale)
            module.bias.copy_(normal(*module.bias.shape) * 0.3)
        elif isinstance(module, nn.BatchNorm3d):
            channels = module.num_features
            module.running_mean.copy_(normal(channels) * 0.3)
            module.running_var.copy_(uniform(channels))
            module.weight.copy_(uniform(channels) * (1 - 2 * (torch.arange(channels) % 2)))
            module.bias.copy_(normal(channels) * 0.3)
    return net, x


def initial(logits: Tensor) -> Tensor:
    """The relevance that starts: the logits of the class in the cube, 0 elsewhere."""
    mask = torch.zeros_like(logits)
    mask[(slice(None), CLASS, *(slice(*ends) for ends in CUBE))] = 1
    return mask * logits.detach()


def norms_of(name: str) -> list[tuple[str, str]]:
    """Which convolution goes before which norm."""
    return {
        "A": [],
        "B": [("0", "1"), ("3", "4")],
        "C": [(f"conv{level}", f"norm{level}") for level in (1, 2, 3)],
    }[name]


def merged(name: str) -> nn.Module:
    """The network with its norms merged by hand, and identities in their places."""
    net, _ = network(name)
    for conv_name, norm_name in norms_of(name):
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight.mul_(scale[:, None, None, None, None])
        conv.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
        setattr(net, norm_name, nn.Identity())
    return net


def import_zennit() -> types.ModuleType:
    """Zennit, with a stub where it asks for torchvision."""
    resnet = types.ModuleType("torchvision.models.resnet")
    resnet.Bottleneck = type("Bottleneck", (nn.Module,), {})
    resnet.BasicBlock = type("BasicBlock", (nn.Module,), {})
    models = types.ModuleType("torchvision.models")
    models.resnet = resnet
    vision = types.ModuleType("torchvision")
    vision.models = models
    sys.modules.update(
        {"torchvision": vision, vision.models.__name__: models, resnet.__name__: resnet}
    )
    import zennit

    return zennit


def relevance(zennit: Any, name: str, rule: str, way: str) -> Tensor:
    """What zennit gives at the input.

    ``way``: "stock", zennit's merging; "exact", the same with the norms' eps put to 0 after it;
    "by hand", no merging by zennit, but a network that was merged before.
    """
    rules = zennit.rules
    net, x = network(name)
    norms = norms_of(name)
    canonizers = []
    if way == "by hand":
        net = merged(name)
    elif name == "B":
        canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    elif name == "C":
        canonizers = [
            zennit.canonizers.NamedMergeBatchNorm([((conv,), norm) for conv, norm in norms])
        ]
    every = {"epsilon": rules.Epsilon(1e-6), "alphabeta": rules.AlphaBeta(alpha=1, beta=0)}
    first = {
        "zplus_wsquare": lambda: rules.WSquare(),
        "zplus_zbox": lambda: rules.ZBox(low=x.min(), high=x.max()),
    }
    kinds = zennit.types
    layers = [
        (kinds.Convolution, every.get(rule, rules.ZPlus())),
        (kinds.Activation, rules.Pass()),
        (kinds.BatchNorm, rules.Pass()),
    ]
    composite = zennit.composites.SpecialFirstLayerMapComposite(
        layer_map=layers,
        first_map=[(kinds.Convolution, first[rule]())] if rule in first else [],
        canonizers=canonizers,
    )
    original = {key: value.clone() for key, value in net.state_dict().items()}
    by_hand = merged(name)
    with composite.context(net), torch.enable_grad():
        if way != "by hand":
            for conv_name, norm_name in norms:
                conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
                assert not torch.allclose(conv.weight, original[f"{conv_name}.weight"])
                torch.testing.assert_close(
                    conv.weight.data,
                    by_hand.get_submodule(conv_name).weight.data,
                    rtol=1e-13,
                    atol=0,
                )
                torch.testing.assert_close(
                    conv.bias.data,
                    by_hand.get_submodule(conv_name).bias.data,
                    rtol=1e-12,
                    atol=1e-15,
                )
                assert norm.running_mean.eq(0).all()
                assert norm.bias.eq(0).all()
                assert norm.running_var.eq(1).all()
                assert norm.weight.eq(1).all()
                if way == "exact":
                    norm.eps = 0.0
        attributor = zennit.attribution.Gradient(net, attr_output=initial)
        _, result = attributor(x.clone())
    assert all(torch.equal(value, original[key]) for key, value in net.state_dict().items())
    return result.detach()


def main() -> None:
    """Write the file."""
    zennit = import_zennit()
    from importlib.metadata import version

    networks, cases = {}, []
    for name, description in NETWORKS.items():
        net, x = network(name)
        logits = net(x)
        state = {key: v for key, v in net.state_dict().items() if v.is_floating_point()}
        start = float(initial(logits).sum())
        networks[name] = {
            "description": description,
            "input": x.tolist(),
            "state": {key: value.tolist() for key, value in state.items()},
            "sums": {
                "state": float(sum(value.sum() for value in state.values())),
                "input": float(x.sum()),
                "logits": float(logits.sum()),
                "initial_relevance": start,
                "absolute_initial_relevance": float(initial(logits).abs().sum()),
            },
            "initial_relevance": initial(logits)[0, CLASS][tuple(slice(*e) for e in CUBE)].tolist(),
        }
        zplus = relevance(zennit, name, "zplus", "exact")
        assert torch.equal(zplus, relevance(zennit, name, "alphabeta", "exact"))
        for rule, words in RULES.items():
            ours = zplus if rule == "zplus" else relevance(zennit, name, rule, "exact")
            torch.testing.assert_close(
                ours,
                relevance(zennit, name, rule, "by hand"),
                rtol=0,
                atol=1e-11 * float(ours.abs().max()),
            )
            case = {
                "name": f"{name}_{rule}",
                "network": name,
                "rule": words,
                "sum": float(ours.sum()),
                "sum_over_initial": float(ours.sum()) / start,
                "relevance": ours.tolist(),
            }
            if norms_of(name):
                stock = relevance(zennit, name, rule, "stock")
                case["relevance_stock"] = stock.tolist()
                off = float((stock - ours).abs().max() / ours.abs().max())
                case["stock_off_by"] = off
            cases.append(case)
            print(case["name"], case["sum_over_initial"], case.get("stock_off_by"))
    head = {
        "about": "LRP relevances by zennit; see make_lrp.py. relevance: BatchNorm merged exactly "
        "(eps of the merged norms 0); relevance_stock: zennit's merging, which leaves a division "
        "by sqrt(1 + eps), eps = 1e-5, after each merged convolution; stock_off_by: their largest "
        "difference over the largest |relevance|.",
        "command": COMMAND,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "zennit": version("zennit"),
        },
        "seed": SEED,
        "dtype": "float64",
        "class": CLASS,
        "cube": CUBE,
        "formulas": FORMULAS,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in networks.items()]
    lines.append('"networks": {\n' + ",\n".join(rows) + "\n}")
    lines.append('"cases": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
