"""Deformations: SciPy as an oracle of splines and warps, flows with known answers, no folds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates
from torch import Tensor

from lightning_segxai.deformations import SplineDeformation, flow, spline, warp

SHAPE = (17, 14, 20)
STRONG = SplineDeformation(displacement=(0.3,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(field: Tensor) -> Tensor:
    """Where each voxel of a deformed volume comes from."""
    axes = [torch.arange(n, dtype=field.dtype) for n in field.shape[1:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")) + field


def test_splines_are_scipys():
    """A field is SciPy's cubic B-spline of the coefficients, 0 outside, the ends in the corners."""
    values = torch.rand(1, 3, 4, 5, generator=seeded(), dtype=torch.float64)
    grid = [np.linspace(0, n - 1, size) for n, size in zip((3, 4, 5), SHAPE, strict=True)]
    expected = map_coordinates(
        values[0].numpy(),
        np.meshgrid(*grid, indexing="ij"),
        order=3,
        mode="grid-constant",
        prefilter=False,
    )
    np.testing.assert_allclose(spline(values, SHAPE)[0], expected, atol=1e-12)


def test_splines_along_one_axis():
    """With three locked layers a line of control points is scipy.interpolate's B-spline of it."""
    values = torch.rand(1, 1, 1, 6, generator=seeded(), dtype=torch.float64)
    line = spline(values, (7, 7, 50), locked=3)[0, 3, 3]
    knots = np.arange(-3.0, 15)  # control points -1 to 12, each between two knots to either side
    coefficients = np.zeros(14)
    coefficients[4:10] = values.flatten()
    expected = BSpline(knots, coefficients, 3)(np.linspace(0, 11, 50)) * (2 / 3) ** 2
    np.testing.assert_allclose(line, expected, atol=1e-12)


def test_of_five_control_points_only_the_middle_one_moves():
    """Two locked layers on each side leave one, whose velocity is a product of three splines."""
    deformation = SplineDeformation(control_points=(5,), displacement=(0.1,))
    velocity = deformation.velocity((17, 17, 17), seeded())
    x = torch.linspace(-2, 2, 17).abs()
    bump = torch.where(x < 1, 2 / 3 - x**2 + x**3 / 2, (2 - x) ** 3 / 6)
    shape = bump[:, None, None] * bump[None, :, None] * bump
    weight = velocity[:, 8, 8, 8] / (2 / 3) ** 3
    assert torch.allclose(velocity, weight[:, None, None, None] * shape, atol=1e-6)
    assert bool((weight.abs() <= 0.1 * 8).all())
    assert len(set(weight.tolist())) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("reach", [0.5, 30.0])
def test_linear_warps_are_scipys(dtype, tolerance, reach):
    """Also from far outside, where SciPy's nearest mode repeats the border."""
    volumes = torch.rand(2, 3, *SHAPE, generator=seeded(), dtype=dtype)
    field = reach * (2 * torch.rand(3, *SHAPE, generator=seeded(1), dtype=dtype) - 1)
    warped = warp(volumes, field)
    assert warped.dtype == dtype
    for ours, volume in zip(warped.flatten(0, 1), volumes.flatten(0, 1), strict=True):
        expected = map_coordinates(volume, places(field), order=1, mode="nearest")
        np.testing.assert_allclose(ours, expected, atol=tolerance)


def test_nearest_warps_are_scipys_and_keep_integers():
    """Every voxel has the class of one voxel, in the label's own type."""
    label = torch.randint(0, 5, (2, 1, *SHAPE), generator=seeded())
    field = 4 * torch.rand(3, *SHAPE, generator=seeded(1)) - 2
    warped = warp(label, field, "nearest")
    assert warped.dtype == torch.int64
    for ours, volume in zip(warped[:, 0], label[:, 0], strict=True):
        expected = map_coordinates(volume, places(field), order=0, mode="nearest")
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_shift_by_whole_voxels(mode):
    """A field of 2 along the last axis takes the voxel after next, bit for bit."""
    volumes = torch.rand(1, 1, 3, 1, 5, generator=seeded())
    field = torch.zeros(3, 3, 1, 5)
    field[2] = 2
    expected = volumes[..., [2, 3, 4, 4, 4]]
    assert torch.equal(warp(volumes, field, mode), expected)


def test_a_constant_volume_stays_constant():
    """Bit for bit, as each step goes from one value towards the same."""
    volumes = torch.full((1, 2, *SHAPE), 0.1)
    assert torch.equal(warp(volumes, STRONG.draw(SHAPE, seeded())), volumes)


def test_warps_have_gradients_and_keep_half_precision_from_the_weights():
    """The gradient is that of finite differences; halves are interpolated in float32."""
    volumes = torch.rand(1, 2, 3, 4, 3, generator=seeded(), dtype=torch.float64)
    field = 3 * torch.rand(3, 3, 4, 3, generator=seeded(1), dtype=torch.float64) - 1.5
    assert torch.autograd.gradcheck(lambda x: warp(x, field), volumes.requires_grad_())
    halves = volumes.detach().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(warp(halves, field), warp(halves.float(), field).half())
        assert torch.equal(STRONG.draw(SHAPE, seeded()), _outside_autocast(seeded()))


def _outside_autocast(generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return STRONG.draw(SHAPE, generator)


def test_no_displacement_is_the_identity():
    """A largest displacement of 0 gives no field, and no field changes no bit."""
    field = SplineDeformation(displacement=(0.0,)).draw(SHAPE, seeded())
    volumes = torch.rand(1, 1, *SHAPE, generator=seeded())
    assert not field.any()
    assert torch.equal(warp(volumes, field), volumes)


def test_the_flow_of_a_logistic_velocity():
    """x' = r x (1 - x / L) goes to L / (1 + (L / x - 1) exp(-r)) in one unit of time."""
    length, rate = 80, 0.8
    x = torch.arange(length + 1, dtype=torch.float64)
    velocity = torch.zeros(3, 2, 2, length + 1, dtype=torch.float64)
    velocity[2] = rate * x * (1 - x / length)
    moved = x + flow(velocity)[2, 0, 0]
    expected = length / (1 + (length / x - 1) * math.exp(-rate))
    assert float((moved - expected).abs().max()) < 0.02
    assert float((expected - x).max()) > 10


def test_a_constant_velocity_flows_as_far_as_it_says():
    """Without a slope, scaling and squaring is exact."""
    velocity = torch.tensor([3.0, -0.01, 0.0]).view(3, 1, 1, 1).expand(3, 6, 6, 6)
    assert torch.allclose(flow(velocity), velocity)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deformation", [SplineDeformation(), STRONG])
def test_nothing_folds(deformation, seed):
    """The Jacobian of p + field(p) has a positive determinant at every voxel."""
    field = deformation.draw((24, 24, 24), seeded(seed)).double()
    slopes = torch.stack(torch.gradient(places(field), dim=(1, 2, 3)), dim=1)
    assert float(torch.linalg.det(slopes.permute(2, 3, 4, 0, 1)).min()) > 0


@pytest.mark.parametrize(("deformation", "tolerance"), [(SplineDeformation(), 2e-3), (STRONG, 0.1)])
def test_the_negative_velocity_flows_back(deformation, tolerance):
    """T(-v) after T(v) leads every voxel back, up to the interpolation of the fields."""
    velocity = deformation.velocity((24, 24, 24), seeded(3)).double()
    there, back = flow(velocity), flow(-velocity)
    assert float((there + warp(back[None], there)[0]).abs().max()) < tolerance
    assert float(there.abs().max()) > 5 * tolerance


@pytest.mark.parametrize("seed", range(4))
def test_displacements_are_bounded_and_the_border_stays(seed):
    """No voxel moves farther than the share of half the edge, none of the border at all."""
    deformation = SplineDeformation(displacement=(0.2,))
    field = deformation.draw(SHAPE, seeded(seed))
    for along, size in zip(field, SHAPE, strict=True):
        assert float(along.abs().max()) <= 0.2 * (size - 1) / 2
        assert float(along.abs().max()) > 0
    for axis in (1, 2, 3):
        assert not field.select(axis, 0).any()
        assert not field.select(axis, -1).any()


def test_fewer_locked_layers_move_the_border():
    """With none locked, the border moves, and what lies behind it is the border repeated."""
    deformation = SplineDeformation(displacement=(0.3,), locked_borders=0)
    field = deformation.draw(SHAPE, seeded())
    assert bool(field[:, 0].any())
    assert bool(torch.isfinite(warp(torch.rand(1, 1, *SHAPE), field)).all())


def test_equal_seeds_draw_equal_fields_and_nothing_else_is_drawn_from():
    """The generator that is given decides everything; torch's own stays where it was."""
    before = torch.get_rng_state()
    fields = [SplineDeformation().draw(SHAPE, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(fields[0], fields[1])
    assert not torch.equal(fields[0], fields[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_control_points_and_displacement_are_drawn():
    """Over 40 draws, 5 points (symmetric about the middle) and 7, no and some displacement."""
    deformation = SplineDeformation(control_points=(5, 7), displacement=(0.0, 0.1))
    generator = seeded()
    kinds = set()
    for _ in range(40):
        field = deformation.velocity((9, 9, 9), generator)
        kinds.add((bool(field.any()), torch.allclose(field, field.flip(1, 2, 3), atol=1e-6)))
    assert kinds == {(False, True), (True, True), (True, False)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"control_points": (4, 7)}, "at least 5 .* locked_borders=2"),
        ({"control_points": ()}, "Take more, or lock fewer"),
        ({"control_points": (1,), "locked_borders": 0}, "at least 2"),
        ({"displacement": (-0.1,)}, "at least 0, in units of half the edge"),
        ({"displacement": (math.nan,)}, "at least 0, in units of half the edge"),
        ({"displacement": ()}, "at least 0, in units of half the edge"),
        ({"locked_borders": -1}, "must be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    """The error says what is needed."""
    with pytest.raises(ValueError, match=said):
        SplineDeformation(**settings)


def test_warps_that_cannot_be_are_refused():
    """Another mode, another shape, a linear warp of a label."""
    volumes, field = torch.zeros(1, 1, 4, 4, 4), torch.zeros(3, 4, 4, 4)
    with pytest.raises(ValueError, match=r"needs a field of shape \(3, 4, 4, 4\)"):
        warp(volumes, field[:, :3])
    with pytest.raises(ValueError, match='Labels are warped with mode "nearest"'):
        warp(volumes.long(), field)
