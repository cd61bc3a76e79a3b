"""The networks of the benchmarks and of the test matrix: seeded, tiny, in eval mode.

Five MONAI networks, the three forms of `UNet3d`, and one U-Net in five styles of writing the same
activation, which must all give the same maps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.networks.nets import AttentionUnet, BasicUNet, DynUNet, SegResNet, UNet
from torch import Tensor, nn

from lightning_segxai import UNet3d

STYLES = ("module", "in place", "reused", "functional", "method")
"""How the activation is written."""


class Styled(nn.Module):
    """A U-Net of two levels whose ReLUs, next to BatchNorm and max pooling, are of one style."""

    def __init__(self, style: str, channels: int = 4) -> None:
        super().__init__()
        self.style = style
        self.down = nn.Conv3d(1, channels, 3, padding=1)
        self.down_norm = nn.BatchNorm3d(channels)
        self.deep = nn.Conv3d(channels, 2 * channels, 3, padding=1)
        self.deep_norm = nn.BatchNorm3d(2 * channels)
        self.up = nn.Conv3d(3 * channels, channels, 3, padding=1)
        self.up_norm = nn.BatchNorm3d(channels)
        self.pool = nn.MaxPool3d(2)
        self.head = nn.Conv3d(channels, 2, 1)
        one = nn.ReLU()
        self.acts = nn.ModuleList(
            one if style == "reused" else nn.ReLU(inplace=style == "in place") for _ in range(3)
        )

    def act(self, x: Tensor, n: int) -> Tensor:
        """The activation, in the network's style."""
        if self.style == "functional":
            return F.relu(x)
        if self.style == "method":
            return x.relu()
        activated: Tensor = self.acts[n](x)
        return activated

    def forward(self, x: Tensor) -> Tensor:
        fine = self.act(self.down_norm(self.down(x)), 0)
        deep = self.act(self.deep_norm(self.deep(self.pool(fine))), 1)
        joined = torch.cat([fine, F.interpolate(deep, scale_factor=2.0)], dim=1)
        logits: Tensor = self.head(self.act(self.up_norm(self.up(joined)), 2))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MONAI UNet": lambda: UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1),
    "MONAI BasicUNet": lambda: BasicUNet(3, 1, 2, (4, 4, 8, 8, 16, 4)),
    "MONAI DynUNet": lambda: DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 16]),
    "MONAI SegResNet": lambda: SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    "MONAI AttentionUnet": lambda: AttentionUnet(3, 1, 2, (4, 8, 16), (2, 2)),
    "UNet3d": lambda: UNet3d(1, 2, 4, 3),
    "UNet3d multi-scale": lambda: UNet3d(1, 2, 4, 3, supervision=(1,)),
    "UNet3d attention": lambda: UNet3d(1, 2, 4, 3, attention=True),
    **{f"{style} ReLU": lambda style=style: Styled(style) for style in STYLES},
}


def network(name: str, seed: int = 2) -> nn.Module:
    """One of the networks, in float64, its norms having seen something.

    With the default seed every rule has something to hand down in each of them.
    """
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    if "ReLU" in name:  # all five styles have the same weights, whatever they draw
        torch.manual_seed(seed)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm3d):
                shape = part.running_mean.shape
                part.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
                part.weight.copy_(1 + 0.3 * torch.randn(shape, generator=generator))
                part.bias.copy_(0.1 + 0.3 * torch.randn(shape, generator=generator))
    return net.eval()
