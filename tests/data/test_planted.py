"""The planted cause decides the label, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import unwrap

import numpy as np
import pytest
import torch
from scipy import ndimage

import lightning_segxai
from lightning_segxai.data.planted import Planted, planted_spots, planted_tubes
from lightning_segxai.focus.location import MassInside
from lightning_segxai.values import Attribution

SMALL = (12, 12, 20)
BETWEEN_LOOKS = 4.5  # in the core of a tube
MAKERS = {
    "spots": planted_spots,
    "control": partial(planted_tubes, "control"),
    "shortcut": partial(planted_tubes, "shortcut"),
}


def filled(**settings) -> np.ndarray:
    """The voxels that tubes fill at least half, whatever they are: under a band, all arteries."""
    return planted_tubes("shortcut", band=True, **settings).label > 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_equal_seeds_give_equal_bits_and_others_do_not(make):
    """The seed alone must decide image, label and regions."""
    one, same, other = make(seed=3), make(seed=3), make(seed=4)

    assert one.image.tobytes() == same.image.tobytes()
    assert one.label.tobytes() == same.label.tobytes()
    assert one.cause.tobytes() == same.cause.tobytes()
    assert one.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("seed", range(12))
def test_in_the_shortcut_arm_the_band_alone_decides(seed):
    """Only the band's voxels may differ between twins with a band and without, and all labels."""
    under = planted_tubes("shortcut", seed=seed, band=True)
    bare = planted_tubes("shortcut", seed=seed, band=False)
    drawn = planted_tubes("shortcut", seed=seed)

    np.testing.assert_array_equal(under.cause, bare.cause)
    np.testing.assert_array_equal(under.image[~under.cause], bare.image[~under.cause])
    assert under.image[under.cause].mean() < 0.3 * bare.image[under.cause].mean()
    assert under.label.any()
    assert not bare.label.any()
    # the rule, read from the cause
    dark = drawn.image[drawn.cause].mean() < 0.6
    np.testing.assert_array_equal(drawn.label, under.label if dark else bare.label)


@pytest.mark.parametrize("seed", range(12))
def test_in_the_control_arm_each_tube_decides(seed):
    """Its own brightness, read from the cause, must give its label; the band must not change it."""
    drawn = planted_tubes("control", seed=seed)
    twins = [planted_tubes("control", seed=seed, band=band) for band in (False, True)]
    seen = np.where(drawn.cause, drawn.image, 0.0)
    pieces, count = ndimage.label(filled(seed=seed))
    found = np.zeros_like(drawn.label)
    for n in range(1, count + 1):
        found[pieces == n] = np.percentile(seen[pieces == n], 90) > BETWEEN_LOOKS

    assert count == 3
    np.testing.assert_array_equal(found, drawn.label)
    for twin in twins:
        np.testing.assert_array_equal(twin.label, drawn.label)
    band = drawn.regions["band"]
    np.testing.assert_array_equal(twins[0].image[~band], twins[1].image[~band])
    assert not (drawn.cause & band).any()


@pytest.mark.parametrize("seed", range(4))
def test_both_arms_show_the_same_images(seed):
    """Arms must differ in what decides alone; decoupled, the shortcut's label is the control's."""
    control = planted_tubes("control", seed=seed)
    shortcut = planted_tubes("shortcut", seed=seed)
    decoupled = planted_tubes("shortcut", seed=seed, decoupled=True)

    for other in (shortcut, decoupled, planted_tubes("control", seed=seed, decoupled=True)):
        np.testing.assert_array_equal(other.image, control.image)
    np.testing.assert_array_equal(decoupled.label, control.label)
    np.testing.assert_array_equal(decoupled.cause, control.cause)
    assert not np.array_equal(shortcut.label, control.label)


def test_band_and_label_agree_always_when_coupled_and_half_of_the_time_when_not():
    """In the shortcut's training set the band must tell all; decoupled, nothing."""

    def agreement(**settings) -> np.ndarray:
        shares = []
        for seed in range(30):
            planted = planted_tubes(shape=SMALL, tubes=2, seed=seed, **settings)
            tubes = filled(shape=SMALL, tubes=2, seed=seed)
            band = planted.image[planted.regions["band"]].mean() < 0.6
            shares.append(((planted.label > 0) == band)[tubes].mean())
        return np.array(shares)

    assert (agreement(arm="shortcut") == 1).all()
    for decoupled in (
        agreement(arm="shortcut", decoupled=True),
        agreement(arm="control"),
    ):
        assert decoupled.mean() == pytest.approx(0.5, abs=0.05)


def test_half_of_the_volumes_have_a_band_and_half_of_the_tubes_are_bright():
    """Neither the band nor the looks may favor a label, nor each other."""
    drawn = [planted_tubes("shortcut", shape=SMALL, tubes=3, seed=seed) for seed in range(100)]
    band = np.array([p.label.any() for p in drawn])
    bright = np.array([p.regions["bright"].sum() / p.regions["tubes"].sum() for p in drawn])

    assert band.mean() == pytest.approx(0.5, abs=0.1)
    assert bright.mean() == pytest.approx(0.5, abs=0.05)
    assert bright[band].mean() == pytest.approx(bright[~band].mean(), abs=0.06)


def test_bright_and_dim_tubes_have_one_shape_and_cross_each_other():
    """Their size must be the same on average; one runs along i, the other along j."""
    sizes = []
    for seed in range(40):
        regions = planted_tubes("control", shape=(24, 24, 20), tubes=2, seed=seed).regions
        bright, dim = regions["bright"], regions["dim"]
        assert bright.any(axis=(1, 2)).all()
        assert dim.any(axis=(0, 2)).all()
        assert not bright.any(axis=(0, 2)).all()
        assert not dim.any(axis=(1, 2)).all()
        assert not (bright & dim).any()
        sizes.append((bright.sum(), dim.sum()))

    bright, dim = np.mean(sizes, axis=0)
    assert bright == pytest.approx(dim, rel=0.06)


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [((12, 12, 20), (0.6, 0.6, 0.6)), ((24, 32, 20), (0.5, 0.4, 0.8)), ((32, 32, 40), (1, 1, 0.5))],
)
def test_tubes_and_band_do_not_touch(shape, spacing_mm):
    """Where the band is must be told from where the tubes are, in grids of any kind."""
    spacing = tuple(float(edge) for edge in spacing_mm)
    for seed in range(10):
        planted = planted_tubes("shortcut", shape, spacing, seed)
        tubes, band = planted.regions["tubes"], planted.regions["band"]

        assert not (tubes & band).any()
        assert band.any(axis=(0, 1)).sum() == 4
        assert band.all(axis=(0, 1)).sum() == 4
        below, above = np.split(tubes.any(axis=(0, 1)), [int(band.any(axis=(0, 1)).argmax())])
        assert below.any()
        assert above.any()
        assert not tubes[..., 0].any()
        assert not tubes[..., -1].any()


@pytest.mark.parametrize("seed", range(8))
def test_spots_are_brighter_than_all_else(seed):
    """Outside the cause there must be nothing but tissue and noise; the label is in the cause."""
    planted = planted_spots(seed=seed)

    assert planted.label.any()
    assert planted.cause[planted.label > 0].all()
    assert planted.image[planted.label > 0].min() > 1.5 * planted.image[~planted.cause].max()
    assert planted.image[~planted.cause].mean() == pytest.approx(1.0, abs=0.15)
    assert planted.cause.mean() < 0.08


def test_tissue_is_smooth_and_not_flat():
    """Far from the tubes it must vary by several percent, over many voxels."""
    image = planted_tubes("control", seed=0, band=False).image[..., :5]
    smooth = ndimage.gaussian_filter(image, 3)

    assert smooth.std() > 0.04
    assert smooth.mean() == pytest.approx(1.0, abs=0.2)


def test_the_noise_is_there_everywhere_and_small():
    """Twins that differ in their noise alone do not exist: neighbors in tissue must differ."""
    planted = planted_tubes("control", seed=0, band=False)
    tissue = ~ndimage.binary_dilation(planted.cause, iterations=2)
    step = np.diff(planted.image, axis=2)[tissue[..., :-1] & tissue[..., 1:]]

    assert 0.08 < step.std() / np.sqrt(2) < 0.16


def test_the_probe_has_all_that_is_known():
    """Image, label, spacing and regions; a map of the cause lies inside of it."""
    planted = planted_tubes("shortcut", seed=0, spacing_mm=(0.5, 0.6, 0.7), band=True)
    probe = planted.probe("tubes-0")
    found = Attribution(
        probe=probe,
        target="vessel",
        method="m",
        layer="",
        values=torch.from_numpy(planted.cause).double(),
        unit="a.u.",
        region=probe.label > 0,
        prediction=probe.label,
        score=1.0,
    )
    elsewhere = replace(found, values=1 - found.values)

    assert probe.name == "tubes-0"
    assert probe.spacing_mm == (0.5, 0.6, 0.7)
    np.testing.assert_array_equal(probe.image[0].numpy(), planted.image)
    np.testing.assert_array_equal(probe.label.numpy(), planted.label)
    assert set(probe.regions) == {"cause", "tubes", "band", "bright", "dim"}
    assert MassInside("cause").measure(found) == 1.0
    assert MassInside("cause").measure(elsewhere) == 0.0
    assert set(planted_spots().probe("spots").regions) == {"cause"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(planted_tubes, "control", shape=(32, 32, 19)), "and 20 along k"),
        (partial(planted_tubes, "control", shape=(7, 32, 32)), "at least 8 voxels along i and j"),
        (partial(planted_tubes, "control", tubes=1), "needs two tubes or more"),
        (partial(planted_tubes, "control", spacing_mm=(0.6, 0.0, 0.6)), "voxels of positive size"),
        (partial(planted_spots, (7, 16, 16)), "at least 8 voxels"),
        (partial(planted_spots, spots=0), "a ball"),
    ],
)
def test_what_cannot_be_rendered_is_refused(make, told):
    """With what was needed."""
    with pytest.raises(ValueError, match=told):
        make()


def test_another_arm_is_refused():
    """Also where nobody checks types."""
    with pytest.raises(ValueError, match="must be one of control, shortcut"):
        unwrap(planted_tubes)("shortcuts")


def test_its_names_are_the_packages():
    """All that a user names."""
    assert lightning_segxai.planted_tubes is planted_tubes
    assert lightning_segxai.planted_spots is planted_spots
    assert lightning_segxai.Planted is Planted
