"""Supervoxels: as many as wanted and never more, connected or not, the same every time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_segxai.methods.supervoxels import _merged, per_voxel, supervoxels

ONE = (1.0, 1.0, 1.0)


def noise(shape, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((channels, *shape), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "shape", [(8, 8, 8), (16, 16, 16), (16, 16, 1), (1, 3, 9), (1, 1, 5), (5, 11, 8), (1, 1, 1)]
)
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "noise"])
def test_as_many_as_wanted_each_with_a_voxel(shape, count, constant):
    """Numbered from zero without a gap, as far as there are voxels."""
    image = torch.full((2, *shape), 3.0) if constant else noise(shape, 2)
    numbers = supervoxels(image, ONE, count, 0.1)
    assert tuple(numbers.shape) == shape
    assert numbers.dtype == torch.int64
    assert numbers.unique().tolist() == list(range(min(count, math.prod(shape))))


@pytest.mark.parametrize("spacing", [(0.3, 0.3, 2.0), (1.0, 0.2, 1.0), (4.0, 1.0, 1.0)])
def test_never_more_than_wanted_whatever_the_voxels(spacing):
    """Voxels that are no cubes; a grid of cubes with other sides than the volume."""
    for shape in ((12, 12, 4), (3, 16, 5), (2, 2, 2)):
        numbers = supervoxels(noise(shape), spacing, 20, 0.1)
        found = numbers.unique().tolist()
        assert found == list(range(len(found)))
        assert len(found) <= min(20, math.prod(shape))


def test_a_grid_of_cubes_where_nothing_is_to_be_seen():
    """Eight cubes of a constant volume."""
    numbers = supervoxels(torch.zeros(1, 8, 8, 8), ONE, 8, 0.1)
    i, j, k = torch.meshgrid(*[torch.arange(8) // 4] * 3, indexing="ij")
    assert torch.equal(numbers, 4 * i + 2 * j + k)


def test_spacing_is_respected():
    """With voxels four times as long along k, supervoxels have a fourth of the voxels there."""
    numbers = supervoxels(torch.zeros(1, 16, 16, 16), (0.5, 0.5, 2.0), 32, 0.1)
    sides = [
        [s.stop - s.start for s in place] for place in ndimage.find_objects(numbers.numpy() + 1)
    ]
    i, j, k = np.median(sides, axis=0)
    assert 0.5 * i <= 4 * k <= 2 * i
    assert 0.5 * j <= 4 * k <= 2 * j
    unit = supervoxels(noise((8, 8, 8)), ONE, 9, 0.1)
    assert torch.equal(supervoxels(noise((8, 8, 8)), (0.3, 0.3, 0.3), 9, 0.1), unit)


def test_edges_are_followed():
    """A thin bright line keeps supervoxels of its own among 16 of a noisy volume."""
    image = 0.02 * noise((16, 16, 16))
    image[0, 7:9, 7:9] += 1
    line = image[0] > 0.5
    numbers = supervoxels(image, ONE, 16, 0.1)
    for region in numbers[line].unique():
        assert float(line[numbers == region].double().mean()) > 0.9


def test_all_channels_count():
    """An edge in the second channel only."""
    image = torch.zeros(2, 8, 8, 8)
    image[1, :, :, 3:] = 1
    numbers = supervoxels(image, ONE, 8, 0.05)
    assert not set(numbers[..., :3].unique().tolist()) & set(numbers[..., 3:].unique().tolist())


def test_the_scale_of_intensities_does_not_matter():
    """Compactness is a fraction of the volume's range."""
    image = noise((8, 8, 8))
    a, b = (supervoxels(v, ONE, 9, 0.1) for v in (image, 4096 * image - 1024))
    assert torch.equal(a, b)


def test_the_same_every_time():
    """And the volume stays as it was; random numbers around do not matter."""
    image = noise((9, 8, 7), 2)
    before = image.clone()
    torch.manual_seed(3)
    np.random.seed(3)
    a = supervoxels(image, ONE, 20, 0.1)
    torch.manual_seed(4)
    np.random.seed(4)
    assert torch.equal(a, supervoxels(image, ONE, 20, 0.1))
    assert torch.equal(image, before)


def test_large_volumes_are_cut_on_a_coarser_grid(monkeypatch):
    """And the numbers are those of all voxels."""
    monkeypatch.setattr("lightning_segxai.methods.supervoxels._MOST_CUBES", 8**3)
    image = torch.zeros(1, 16, 16, 16)
    image[0, 8:] = 1
    numbers = supervoxels(image, ONE, 8, 0.1)
    assert numbers.unique().tolist() == list(range(8))
    assert not set(numbers[:8].unique().tolist()) & set(numbers[8:].unique().tolist())


def test_the_cheapest_union_comes_first():
    """Four pieces in a row, of which the middle ones are alike, and the ends are not."""
    numbers = np.repeat([0, 1, 2, 3], 4).reshape(-1, 1, 1)
    features = np.repeat([0.0, 9.0, 9.5, 40.0], 4).reshape(1, -1, 1, 1)
    assert _merged(numbers, features, 4).ravel().tolist() == numbers.ravel().tolist()
    assert _merged(numbers, features, 3).ravel()[::4].tolist() == [0, 1, 1, 2]
    assert _merged(numbers, features, 2).ravel()[::4].tolist() == [0, 0, 0, 1]
    assert _merged(numbers, features, 1).max() == 0


def test_only_neighbors_become_one():
    """However alike those are that do not touch."""
    numbers = np.array([0, 0, 1, 1, 2, 2]).reshape(-1, 1, 1)
    features = np.array([5.0, 5, 90, 90, 5, 5]).reshape(1, -1, 1, 1)
    merged = _merged(numbers, features, 2).ravel().tolist()
    assert merged in ([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1])


def test_sharing_out_keeps_the_sum():
    """Each voxel gets its part of its supervoxel's effect."""
    numbers = supervoxels(noise((8, 8, 8)), ONE, 20, 0.1)
    effects = torch.arange(20, dtype=torch.float64) - 5
    shared = per_voxel(effects, numbers)
    assert float(shared.sum()) == pytest.approx(float(effects.sum()))
    for region in range(20):
        assert float(shared[numbers == region].sum()) == pytest.approx(float(effects[region]))
        assert len(shared[numbers == region].unique()) == 1
