"""UNet3d: the parameter counts of DS6, what goes in and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_segxai.nets import UNet3d


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("supervision", "count"), [((), 103_536_449), ((1, 2), 103_546_883)], ids=["unet", "mss"]
)
def test_full_size_has_the_parameters_of_ds6(supervision, count):
    """The networks of DS6 have exactly the published number of parameters."""
    with torch.device("meta"):
        assert parameters(UNet3d(supervision=supervision)) == count


def test_attention_adds_only_the_gates():
    """A gate at width w adds two maps to w/2, one to 1, and their norms, and nothing else."""
    gates = sum(2 * (w * w // 2 + w // 2 + w) + w // 2 + 1 + 2 for w in (4, 8))
    plain, gated = (UNet3d(channels=4, levels=3, attention=a) for a in (False, True))
    assert parameters(gated) - parameters(plain) == gates


def test_a_closed_gate_removes_the_skip():
    """With gates at 0, what the first level saw at full resolution does not matter."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=2, attention=True).eval()
    gate = net.gates[0]
    x = torch.randn(1, 1, 4, 4, 4)
    skip = torch.randn(1, 2, 4, 4, 4)
    nn.init.constant_(gate.weight[1].bias, -1e4)
    assert torch.equal(gate(skip, skip), torch.zeros_like(skip))
    nn.init.constant_(gate.weight[1].bias, 1e4)
    assert torch.equal(gate(skip, skip), skip)
    assert net(x).shape == x.shape


def test_heads_in_training_and_one_tensor_in_evaluation():
    """In training the heads come as (full, half, quarter); in evaluation the full one alone."""
    net = UNet3d(2, 3, channels=2, levels=4, supervision=(1, 2))
    x = torch.randn(2, 2, 16, 8, 24)
    outputs = net(x)
    assert [tuple(o.shape) for o in outputs] == [
        (2, 3, 16, 8, 24),
        (2, 3, 8, 4, 12),
        (2, 3, 4, 2, 6),
    ]
    assert net.eval()(x).shape == (2, 3, 16, 8, 24)
    assert isinstance(UNet3d(channels=2, levels=2)(x[:, :1]), torch.Tensor)


def test_supervised_heads_can_say_no():
    """A supervised head gives logits of both signs; DS6's, which end in a ReLU, could not."""
    torch.manual_seed(0)
    _, half = UNet3d(channels=2, levels=3, supervision=(1,))(torch.randn(2, 1, 16, 16, 16))
    assert half.min() < 0 < half.max()


def test_every_parameter_learns():
    """Every parameter has a gradient, those of gates and supervised heads included."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=3, supervision=(1,), attention=True)
    sum(o.square().sum() for o in net(torch.randn(2, 1, 8, 8, 8))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_shift_by_the_pooling_shifts_the_logits():
    """Away from borders, the network commutes with shifts by its multiple."""
    torch.manual_seed(0)
    net = UNet3d(channels=2, levels=2).double().eval()
    x = torch.randn(1, 1, 24, 8, 8, dtype=torch.float64)
    before, after = net(x), net(x.roll(2, dims=2))
    # two levels see at most 11 voxels to each side; the rest is free of the seam
    assert torch.allclose(before[:, :, 11:12], after[:, :, 13:14], atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8, 12), (10, 8, 8), (4, 8, 8)])
def test_a_size_that_cannot_be_halved_is_refused_by_its_multiple(size):
    """The error names the multiple that sizes must have, and the sizes found."""
    with pytest.raises(ValueError, match=r"multiples of 8, but got \(") as error:
        UNet3d(channels=2, levels=4)(torch.randn(1, 1, *size))
    assert str(size) in str(error.value)


@pytest.mark.parametrize("supervision", [(0,), (3,), (1, 1), (-1,)])
def test_a_level_without_a_decoder_cannot_be_supervised(supervision):
    """Only different levels of the decoder below full resolution can be supervised."""
    with pytest.raises(ValueError, match=r"needs different levels out of \[1, 2\]"):
        UNet3d(channels=2, levels=4, supervision=supervision)


def test_one_level_is_no_unet():
    """One level is refused."""
    with pytest.raises(ValueError, match="at least 2 levels"):
        UNet3d(levels=1)
