"""The networks of DS6: a 3D U-Net, plain, with multi-scale supervision, with attention gates.

They are ordinary modules; nothing else in the package depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class UNet3d(nn.Module):
    r"""A 3D U-Net that maps a volume to logits of the same size.

    Each level is two convolutions of 3x3x3, each with BatchNorm and ReLU; on the way down a max
    pooling halves the volume and the channels double, on the way up a nearest upsampling and a
    convolution double it again before the skip is concatenated. With 64 channels and 5 levels it
    is DS6's U-Net (103,536,449 parameters), with ``supervision=(1, 2)`` its U-Net MSS
    (103,546,883).

    Supervised levels have a head of their own: convolution, BatchNorm, ReLU, convolution,
    BatchNorm. In training the output is a tuple of logits, the full resolution first and then
    the supervised levels in the order given; in evaluation it is the full resolution alone, as
    nothing but the loss wants the others. DS6 returns the tuple always, and ends its heads in a
    further ReLU; that would forbid negative logits, hence probabilities below one half, and has
    no parameters, so it is left out.

    Args:
        in_channels: Channels of the volume.
        out_channels: Channels of the logits; 1 for a sigmoid, the number of classes for a softmax.
        channels: Channels of the first level.
        levels: Number of resolutions. Sizes of the volume are multiples of ``2 ** (levels - 1)``.
        supervision: Levels of the decoder that get a head: 1 is half the resolution, 2 a quarter.
        attention: Whether additive gates weigh the skips.

    Raises:
        ValueError: for fewer than two levels, and a supervised level that is not in the decoder
            or comes twice; in ``forward`` for sizes that cannot be halved often enough.

    References:
        Chatterjee et al., "DS6, Deformation-Aware Semi-Supervised Learning: Application to Small
        Vessel Segmentation with Noisy Training Data", J. Imaging 8(10):259, 2022.
        Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", 2018,
        arXiv:1804.03999.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: int = 64,
        levels: int = 5,
        supervision: Sequence[int] = (),
        attention: bool = False,
    ) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"`UNet3d(levels={levels})` needs at least 2 levels.")
        in_decoder = range(1, levels - 1)
        if len(set(supervision)) < len(supervision) or not set(supervision) <= set(in_decoder):
            raise ValueError(
                f"`UNet3d(supervision={tuple(supervision)})` needs different levels "
                f"out of {list(in_decoder)}: with {levels} levels, these are the ones "
                "of the decoder below full resolution."
            )
        widths = [channels * 2**level for level in range(levels)]
        self.supervision = tuple(supervision)
        self.multiple = 2 ** (levels - 1)
        self.encoder = nn.ModuleList(
            _Block(before, width)
            for before, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        # decoder modules are indexed by level, as the encoder's are: 0 is full resolution
        self.up = nn.ModuleList(_Up(2 * width, width) for width in widths[:-1])
        self.gates = nn.ModuleList(_Gate(width) if attention else _Open() for width in widths[:-1])
        self.decoder = nn.ModuleList(_Block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv3d(channels, out_channels, 1)
        self.supervised_heads = nn.ModuleList(
            _supervised_head(widths[level], out_channels) for level in supervision
        )

    def forward(
        self, x: Float[Tensor, "b c i j k"]
    ) -> Float[Tensor, "b classes i j k"] | tuple[Float[Tensor, "b classes _ _ _"], ...]:
        """Logits; in training, and with supervision, those of all heads."""
        sizes = tuple(x.shape[2:])
        if any(size % self.multiple for size in sizes):
            raise ValueError(
                f"`UNet3d(levels={len(self.encoder)})` needs volumes whose sizes are multiples "
                f"of {self.multiple}, but got {sizes}. Pad the volume, or take it by windows "
                "of such a size."
            )
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        decoded = {}
        for level in reversed(range(len(self.decoder))):
            x = self.up[level](x)
            skip = self.gates[level](skips[level], x)
            x = self.decoder[level](torch.cat((skip, x), dim=1))
            decoded[level] = x
        logits = self.head(x)
        if not (self.training and self.supervision):
            return logits
        heads = zip(self.supervision, self.supervised_heads, strict=True)
        return logits, *(head(decoded[level]) for level, head in heads)


class _Block(nn.Sequential):
    """Two convolutions, each with BatchNorm and ReLU."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__(*_convolution(before, width), *_convolution(width, width))


class _Up(nn.Sequential):
    """Twice the resolution."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2), *_convolution(before, width))


class _Open(nn.Module):
    """The skip as it is, where there is no gate."""

    def forward(self, skip: Tensor, _: Tensor) -> Tensor:
        return skip


class _Gate(nn.Module):
    r"""An additive attention gate: the skip, weighed voxel by voxel.

    $$\alpha = \sigma(\psi^\top \mathrm{ReLU}(W_x x + W_g g))$$

    The gating signal is taken after the upsampling, so both have one resolution, where Oktay et
    al. gate at the coarser one and resample; every map has a BatchNorm, as in DS6.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.of_skip = nn.Sequential(nn.Conv3d(width, inner, 1), nn.BatchNorm3d(inner))
        self.of_signal = nn.Sequential(nn.Conv3d(width, inner, 1), nn.BatchNorm3d(inner))
        self.relu = nn.ReLU()
        self.weight = nn.Sequential(nn.Conv3d(inner, 1, 1), nn.BatchNorm3d(1), nn.Sigmoid())

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        return skip * self.weight(self.relu(self.of_skip(skip) + self.of_signal(signal)))


def _convolution(before: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv3d(before, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()


def _supervised_head(width: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(width, out_channels), *_convolution(out_channels, out_channels)[:-1]
    )
