"""The montage of a probe, its tiles and its color scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_segxai import colors, panels
from lightning_segxai.lettering import printable, width, wrapped
from lightning_segxai.marks import WARNING, edge_letters
from lightning_segxai.render import render
from lightning_segxai.values import Attribution, Probe

GOLDEN = Path(__file__).parent / "golden" / "render.png"


def ball(shape=(20, 16, 12), center=(10, 8, 6), radius=4.0):
    ijk = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    return sum((x - c) ** 2 for x, c in zip(ijk, center, strict=True)).sqrt() <= radius


def attribution(**changes):
    label = ball()
    image = torch.linspace(0, 0.3, label.numel()).reshape(1, *label.shape) + 1.0 * label
    distance = torch.linspace(-1, 1, 20)[:, None, None] ** 2 + torch.zeros(label.shape)
    cell = Attribution(
        probe=Probe("ball", image, label.long(), (0.5, 0.5, 1.0)),
        target="vessel",
        method="ig",
        layer="",
        values=torch.exp(-8 * distance) * (0.02 + label),
        unit="logit per voxel",
        region=label,
        prediction=ball(center=(11, 8, 6)).long(),
        score=1.0,
        epoch=3,
        step=70,
    )
    return replace(cell, **changes)


def blocks(densities, side=40):
    """A map of mean magnitude 1 with 5x5x1 voxels of each density, the first at i = j = 2..6."""
    values = torch.zeros(side, side, side, dtype=torch.float64)
    mask = torch.zeros_like(values, dtype=torch.bool)
    for n, density in enumerate(densities):
        at = (slice(2 + 8 * n, 7 + 8 * n), slice(2, 7), slice(9, 10))
        values[at], mask[at] = density, True
    values[~mask] = (values.numel() - values.abs().sum()) / (~mask).sum()
    zero = torch.zeros(values.shape, dtype=torch.long)
    return attribution(
        probe=Probe("blocks", torch.zeros(1, *values.shape)),
        values=values,
        region=mask,
        prediction=zero,
    )


def tiles_of(cell, k, edge=320):
    tiles = panels.map_tiles(cell, k, panels.View.of(cell.probe, edge))
    assert tiles is not None
    return tiles


def pixel(tile, i, j, per_voxel=8):
    """The color in the middle of a voxel of a tile."""
    return tuple(tile[tile.shape[0] - 1 - (per_voxel * j + 4), per_voxel * i + 4].tolist())


def contains(image, color):
    return bool((np.asarray(image) == np.array(color)).all(axis=-1).any())


def test_known_densities_have_known_colors():
    """1x is black, 10x a third and 1,000x the end of the scale, in projection and in slice."""
    tiles = tiles_of(blocks([1.0, 10.0, 1000.0]), k=9)
    wanted = [(0, 0, 4), None, (252, 255, 164)]
    wanted[1] = tuple(colors.paint(np.array([1 / 3]))[0].tolist())
    for tile in (tiles.projection, tiles.cut):
        assert [pixel(tile, 4 + 8 * n, 4) for n in range(3)] == wanted
    assert not tiles.signed


def test_beyond_the_scale_is_its_end():
    """Below 1x all is black, above 1,000x all is the brightest color."""
    position = colors.positions(np.array([0.0, 0.5, 1.0, 1e3, 1e4]), 1.0)
    assert position.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("factor", [7.0, 1e-30, 2.0**60])
def test_scale_invariance(factor):
    """A map and a multiple of it are drawn with the same pixels."""
    cell = attribution(values=attribution().values.double())
    assert (
        render([cell]).tobytes() == render([replace(cell, values=factor * cell.values)]).tobytes()
    )


def test_signs_have_their_own_colors():
    """At equal density positive is warm and negative blue; a negated map swaps the two."""
    cell = blocks([100.0, -100.0])
    tiles = tiles_of(cell, k=9)
    assert tiles.signed
    for tile in (tiles.projection, tiles.cut):
        red, _, blue = pixel(tile, 4, 4)
        assert red > 150 > 50 > blue
        red, _, blue = pixel(tile, 12, 4)
        assert blue > 150 > 50 > red
    swapped = tiles_of(replace(cell, values=-cell.values), k=9)
    assert pixel(swapped.projection, 4, 4) == pixel(tiles.projection, 12, 4)


def test_a_negative_map_is_not_drawn_as_positive():
    """A map without positive values is signed too; invisible negative values do not matter."""
    cell = attribution()
    assert tiles_of(replace(cell, values=-cell.values), 6).signed
    faint = cell.values.clone()
    faint[0, 0, 0] = -0.9 * faint.abs().mean()
    assert not tiles_of(replace(cell, values=faint), 6).signed


@pytest.mark.parametrize(
    "changes",
    [
        {"values": torch.full((20, 16, 12), torch.nan)},
        {"values": torch.full((20, 16, 12), torch.inf)},
        {"values": torch.zeros(20, 16, 12)},
        {"status": "failed", "reason": "CUDA out of memory\nagain " * 40},
        {"status": "empty", "region": torch.zeros(20, 16, 12, dtype=torch.bool)},
    ],
)
def test_what_has_no_map_has_no_colors(changes):
    """Such a cell is a gray tile, no color scale is shown, and no NaN is ever cast."""
    cell = attribution(**changes)
    assert panels.map_tiles(cell, 6, panels.View.of(cell.probe, 64)) is None
    with np.errstate(all="raise"):
        image = render([cell])
    lower = np.asarray(image)[-250:, 270:].astype(int)
    assert (np.ptp(lower, axis=-1) <= 24).all()
    assert contains(image, (238, 239, 241))


def test_outcomes_have_their_colors_at_their_voxels():
    """True positive, false positive and false negative voxels have the legend's hues."""
    label = torch.zeros(40, 40, 3, dtype=torch.long)
    prediction = torch.zeros_like(label)
    label[2:7, 2:7, 1], prediction[2:7, 2:7, 1] = 2, 1  # another class is still foreground
    prediction[10:15, 2:7, 1] = 1
    label[18:23, 2:7, 1] = 1
    probe = Probe("errors", torch.zeros(1, 40, 40, 3), label)
    view = panels.View.of(probe, 320)
    masks = panels.outcomes(probe, prediction)
    cut = {name: mask[:, :, 1] for name, mask in masks.items()}
    for shown in (cut, panels.projected(masks)):
        tile = panels.errors(probe.image[0, :, :, 1], shown, view)
        for n, name in enumerate(("true positive", "false positive", "false negative")):
            wanted = np.rint(0.8 * np.array(colors.OUTCOMES[name]))
            assert pixel(tile, 4 + 8 * n, 4) == tuple(wanted.tolist())
        assert pixel(tile, 30, 30) == (0, 0, 0)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_projected_outcomes_are_the_majority(seed):
    """Each line has the outcome of most of its foreground voxels, the worse one among equals."""
    generator = torch.Generator().manual_seed(seed)
    label, prediction = torch.randint(0, 2, (2, 3, 4, 5), generator=generator)
    masks = panels.outcomes(Probe("p", torch.zeros(1, 3, 4, 5), label), prediction)
    projected = panels.projected(masks)
    for i in range(3):
        for j in range(4):
            counts = {name: int(mask[i, j].sum()) for name, mask in masks.items()}
            most = max(counts.values())
            winner = [name for name in masks if counts[name] == most > 0][-1:]
            assert [name for name in masks if projected[name][i, j]] == winner


@pytest.mark.parametrize("name", list(colors.OUTCOMES)[:3])
def test_outcomes_stay_apart_for_the_color_blind(name):
    """Under simulated deuteranopia no two outcomes are close (Machado et al., 2009)."""
    matrix = np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    )
    seen = {n: matrix @ (np.array(c) / 255) ** 2.2 for n, c in colors.OUTCOMES.items()}
    others = [n for n in list(colors.OUTCOMES)[:3] if n != name]
    assert all(np.linalg.norm(seen[name] - seen[other]) > 0.35 for other in others)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("signed", [True, False])
def test_scales_grow_brighter(sign, signed):
    """Luminance grows with density, so that the pictures can be read in gray."""
    paint = colors.paint(sign * np.linspace(0, 1, 65), signed=signed) / 255
    luminance = (paint**2.2) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -1e-3).all()
    assert luminance[0] < 0.001
    assert luminance[-1] > 0.7


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((64, 64, 64), (1.0, 1.0, 1.0), (320, 320)),
        ((140, 123, 34), (0.3, 0.3, 2.0), (320, 281)),
        ((40, 20, 8), (0.5, 2.0, 1.0), (160, 320)),
    ],
)
def test_tiles_are_isotropic_in_millimeters(shape, spacing, size):
    """A tile is as wide and high as its millimeters, whatever the spacing along k."""
    view = panels.View.of(Probe("p", torch.zeros(1, *shape), spacing_mm=spacing), 320)
    assert (view.width, view.height) == size


def test_i_runs_right_and_j_up():
    """The voxel of largest i and j is in the upper right corner, the sides are RAS's."""
    plane = torch.zeros(4, 4)
    plane[3, 3] = 1.0
    tile = panels.View(64, 64)(plane)
    assert tile[8, 56] > 0.9
    assert tile[56, 8] == tile[8, 8] == tile[56, 56] == 0
    probe = attribution().probe
    assert edge_letters(probe) == ("L", "R", "A", "P")
    flipped = replace(probe, affine=np.diag([-0.5, -0.5, 1.0, 1.0]))
    assert edge_letters(flipped) == ("R", "L", "P", "A")


def test_target_slice():
    """The slice has most of the region; the middle one among equals; the label's without one."""
    cell = attribution()
    region = torch.zeros(20, 16, 12, dtype=torch.bool)
    assert panels.target_slice(replace(cell, region=region)) == 6
    region[:3, 0, 2] = region[:2, 0, 9] = True
    assert panels.target_slice(replace(cell, region=region)) == 2
    assert panels.target_slice(replace(cell, region=torch.ones_like(region))) in (5, 6)


def test_the_outline_hides_nothing_of_the_region():
    """The white line runs around the region and leaves its inner pixels as they were."""
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:15, 5:15] = True
    tile = np.zeros((160, 160, 3), dtype=np.uint8)
    outlined = panels.outlined(tile, mask, panels.View(160, 160))
    assert outlined.max() > 200
    assert outlined[44:116, 44:116].max() == 0
    assert outlined[:30].max() == 0


def test_the_legend_names_what_is_drawn():
    """Colors of the outcomes stand in the legend; without a label only the prediction's."""
    cell = attribution()
    words = render([cell]).crop((0, 0, 264, 500))
    three = ("true positive", "false positive", "false negative")
    assert all(contains(words, colors.OUTCOMES[name]) for name in three)
    bare = replace(cell, probe=Probe("bare", cell.probe.image))
    words = render([bare]).crop((0, 0, 264, 500))
    assert contains(words, colors.OUTCOMES["predicted, no label"])
    assert not contains(words, colors.OUTCOMES["false positive"])


def test_scales_in_use_are_shown():
    """The footer has a bar for each kind of map in the montage."""
    cell = attribution()
    signed = replace(cell, method="signed", values=-cell.values)
    both, one = render([cell, signed]), render([cell, cell])
    assert both.height > one.height
    ends = [tuple(colors.paint(np.array([p]), signed=True)[0].tolist()) for p in (-1.0, 1.0)]
    assert all(contains(both.crop((0, both.height - 80, *both.size)), end) for end in ends)


def test_doubtful_maps_are_marked():
    """A map that breaks its axiom has a frame in the warning color, a sound one has not."""
    assert not contains(render([attribution()]), WARNING)
    assert contains(render([attribution(completeness_error=0.23)]), WARNING)
    assert contains(render([attribution(cancellation=1e9)]), WARNING)


def test_a_map_that_training_left_as_it_was_is_marked():
    """Above 0.95 it has a frame, whether or not it breaks an axiom too."""
    assert not contains(render([attribution(untrained_similarity=0.94)]), WARNING)
    assert contains(render([attribution(untrained_similarity=0.96)]), WARNING)
    assert contains(render([attribution(untrained_similarity=1.0, cancellation=1e9)]), WARNING)


def test_long_names_move_nothing():
    """Names of 40 letters, accents and foreign scripts leave size and tiles as they are."""
    cell = attribution(layer="layer")
    long = replace(cell, method="Layer_integrated_gradients_steps32_blur", unit="Größe Δ 漢字 " * 9)
    one, other = render([cell], title="run"), render([long], title="Läufe")
    assert one.size == other.size
    tiles = (270, 150, *one.size)
    assert one.crop(tiles).tobytes() == other.crop(tiles).tobytes()
    assert contains(one, (255, 255, 255))


@given(st.text(max_size=60), st.integers(60, 300), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_wrapped_lines_fit(text, room, lines):
    """No line is wider than its room, there are never more than asked for, all letters print."""
    parts = wrapped(text, 14, room, lines)
    assert len(parts) <= lines
    assert all(width(part, 14) <= room for part in parts)
    assert set(printable(text)) <= {chr(n) for n in range(32, 127)} | {"·"}


def test_what_does_not_belong_together_is_refused():
    """Attributions of several probes or moments, or none, are an error that says so."""
    with pytest.raises(ValueError, match="one probe, epoch and step, but got none"):
        render([])
    with pytest.raises(ValueError, match="Call it once for each"):
        render([attribution(), attribution(epoch=4)])


def test_many_cells():
    """Two targets by eight methods are one tall picture of the usual width."""
    cell = attribution()
    cells = [replace(cell, target=t, method=f"m{n}") for t in ("a", "b") for n in range(8)]
    one, many = render([cell]), render(cells)
    assert many.width == one.width
    assert many.height > 16 * 256


def test_half_precision_and_several_channels():
    """A map of 16 bits and an image of two channels are drawn."""
    cell = attribution()
    probe = replace(cell.probe, image=cell.probe.image.repeat(2, 1, 1, 1).bfloat16())
    assert render([replace(cell, probe=probe, values=cell.values.bfloat16())]).mode == "RGB"


def golden_montage():
    cell = attribution()
    wave = torch.linspace(-3, 3, 16).sin()[None, :, None]
    return render(
        [
            cell,
            replace(cell, method="signed", values=wave * cell.values, completeness_error=0.2),
            replace(cell, method="none", status="failed", reason="out of memory"),
        ],
        title="golden",
        dice=0.75,
    ).reduce(4)


def test_golden_montage():
    """The montage looks as it did (``python tests/test_render.py`` renews the picture)."""
    with Image.open(GOLDEN) as golden:
        wanted = np.asarray(golden, dtype=float)
    found = np.asarray(golden_montage(), dtype=float)
    assert found.shape == wanted.shape
    # A quarter of the size and a tolerance: FreeType's versions differ in the edges of letters.
    assert np.abs(found - wanted).mean() < 0.5
    assert np.abs(found - wanted)[:, 70:].max() < 40


if __name__ == "__main__":
    golden_montage().save(GOLDEN, optimize=True)
