"""One picture for one probe at one validation: what was predicted, and where the network looked.

Attributions come in, a montage goes out. It is made of bands of equal width: a header; for every
target a band with the anatomy and the prediction's errors, and one for each method; a footer with
the color scales. All bands have the same three columns: words, projection, slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

from lightning_segxai import colors, panels
from lightning_segxai.lettering import Line, draw_lines, fitted, font, height, wrapped
from lightning_segxai.marks import INK, SOFT, WARNING, color_bar, mark_space, no_map
from lightning_segxai.values import Attribution, Probe

EDGE: Final = 320
"""Pixels of a tile's longer edge."""

_WORDS, _GAP, _MARGIN = 240, 14, 24
_LEAST_WIDTH, _LEAST_HEIGHT = 260, 110
_PAPER: Final[colors.Color] = (255, 255, 255)
_RULE: Final[colors.Color] = (208, 211, 216)


def render(
    attributions: Sequence[Attribution], *, title: str = "", dice: float | None = None
) -> Image.Image:
    """Draw all maps of one probe at one validation.

    Colors are densities (the magnitude of a voxel over the volume's mean magnitude) on a fixed
    logarithmic scale from 1x to 1,000x; signed maps are warm and blue on the same scale.

    Args:
        attributions: Cells that share probe, epoch and step; drawn in this order, by target.
        title: A line above everything, such as the run's name.
        dice: Dice of the prediction, from 0 to 1.

    Raises:
        ValueError: without an attribution, or where they are of different probes or moments.
    """
    moments = sorted({(a.probe.name, a.epoch, a.step) for a in attributions})
    if len(moments) != 1:
        raise ValueError(
            "`render` needs attributions of one probe, epoch and step, "
            f"but got {moments or 'none'}. Call it once for each."
        )
    page = _Page(attributions[0].probe)
    bands = [page.header(attributions[0], title, dice)]
    scales: set[bool] = set()
    for target in dict.fromkeys(a.target for a in attributions):
        cells = [a for a in attributions if a.target == target]
        k = panels.target_slice(cells[0])
        bands.append(page.reference(cells[0], k))
        for cell in cells:
            tiles = panels.map_tiles(cell, k, page.view)
            if tiles is not None:
                scales.add(tiles.signed)
            bands.append(page.method(cell, tiles, k))
    bands.append(page.footer(sorted(scales)))
    montage = Image.new("RGB", (page.width, sum(band.height for band in bands)), _PAPER)
    top = 0
    for band in bands:
        montage.paste(band, (0, top))
        top += band.height
    return montage


@dataclass(frozen=True, eq=False)
class _Page:
    """What all bands of a montage share.

    Args:
        probe: The volume that was explained.
    """

    probe: Probe

    @property
    def view(self) -> panels.View:
        return panels.View.of(self.probe, EDGE)

    @property
    def starts(self) -> tuple[int, int, int]:
        """Where the three columns start."""
        projection = _MARGIN + _WORDS + _GAP
        return _MARGIN, projection, projection + max(self.view.width, _LEAST_WIDTH) + _GAP

    @property
    def width(self) -> int:
        return self.starts[2] + max(self.view.width, _LEAST_WIDTH) + _MARGIN

    def header(self, any_cell: Attribution, title: str, dice: float | None) -> Image.Image:
        """Title, probe, moment, Dice and geometry."""
        moment = f"epoch {any_cell.epoch:,}  ·  step {any_cell.step:,}"
        if dice is not None and math.isfinite(dice):
            moment += f"  ·  Dice {dice:.3f}"
        size = " x ".join(str(n) for n in self.probe.shape)
        spacing = " x ".join(f"{mm:.3g}" for mm in self.probe.spacing_mm)
        room = self.width - 2 * _MARGIN
        lines = [
            *_lines(title, 15, SOFT, room, 2, below=6),
            *_lines(self.probe.name, 28, INK, room, 3, below=4),
            *_lines(moment, 17, INK, room, 2, below=3),
            *_lines(f"{size} voxels of {spacing} mm", 13, SOFT, room, 2),
        ]
        band = Image.new("RGB", (self.width, 22 + height(lines) + 16), _PAPER)
        draw_lines(ImageDraw.Draw(band), (_MARGIN, 22), lines)
        return band

    def reference(self, cell: Attribution, k: int) -> Image.Image:
        """Anatomy with the prediction's errors, and what the target is."""
        voxels = int(cell.region.sum())
        masks = panels.outcomes(self.probe, cell.prediction)
        lines = [
            Line("target", 13, SOFT),
            *_lines(cell.target, 20, INK, _WORDS, 3, below=2),
            Line(f"{voxels:,} voxels" + ", outlined in white" * (voxels > 0), 13, SOFT, below=16),
            Line("prediction", 13, SOFT, below=4),
            *(Line(name, 13, INK, below=2, swatch=colors.OUTCOMES[name]) for name in masks),
        ]
        top = 38
        band = self._band(lines, top)
        draw = ImageDraw.Draw(band)
        draw.line((_MARGIN, 2, self.width - _MARGIN, 2), fill=_RULE)
        view = self.view
        anatomy = (panels.projected_anatomy(self.probe), self.probe.image[0, :, :, k])
        shown = (panels.projected(masks), {name: mask[:, :, k] for name, mask in masks.items()})
        regions = (cell.region.any(dim=2), cell.region[:, :, k])
        heads = (
            "maximum projection along k",
            f"slice through the target, k = {k} of {self.probe.shape[2]}",
        )
        for n, left in enumerate(self.starts[1:]):
            draw.text(
                (left, 26),
                fitted(heads[n], 13, max(view.width, _LEAST_WIDTH)),
                SOFT,
                font=font(13),
                anchor="ls",
            )
            tile = panels.outlined(panels.errors(anatomy[n], shown[n], view), regions[n], view)
            image = Image.fromarray(tile)
            mark_space(image, self.probe)
            band.paste(image, (left, top))
        return band

    def method(self, cell: Attribution, tiles: panels.MapTiles | None, k: int) -> Image.Image:
        """One map, or the reason why there is none."""
        lines = _lines(cell.method, 18, INK, _WORDS, 3, below=2)
        if cell.layer:
            lines += _lines(f"at {cell.layer}", 13, SOFT, _WORDS, 3)
        lines += _lines(cell.unit, 13, SOFT, _WORDS, 2)
        marked = cell.doubtful or cell.unmoved
        if marked:
            lines += [Line("", 6, SOFT), *_doubts(cell)]
        band = self._band(lines, 0)
        if tiles is None:
            room = self.width - _MARGIN - self.starts[1]
            band.paste(
                no_map(cell, (room, max(self.view.height, _LEAST_HEIGHT))), (self.starts[1], 0)
            )
            return band
        cut = panels.outlined(tiles.cut, cell.region[:, :, k], self.view)
        for left, tile in zip(self.starts[1:], (tiles.projection, cut), strict=True):
            image = Image.fromarray(tile)
            if marked:
                box = (0, 0, image.width - 1, image.height - 1)
                ImageDraw.Draw(image).rectangle(box, outline=WARNING, width=3)
            band.paste(image, (left, 0))
        return band

    def footer(self, scales: Sequence[bool]) -> Image.Image:
        """Color bars of the scales in use."""
        band = Image.new("RGB", (self.width, 12 + 56 * len(scales) + 8), _PAPER)
        left, right = self.starts[1], self.width - _MARGIN
        for row, signed in enumerate(scales):
            top = 12 + 56 * row
            name = "signed maps" if signed else "unsigned maps"
            lines = [Line(name, 13, INK), Line("magnitude / mean of the volume", 13, SOFT)]
            draw_lines(ImageDraw.Draw(band), (_MARGIN, top - 3), lines)
            band.paste(color_bar((right - left, 40), signed=signed), (left, top))
        return band

    def _band(self, lines: Sequence[Line], top: int) -> Image.Image:
        """A band as high as its words and tiles ask for, with its words."""
        tall = top + max(self.view.height, _LEAST_HEIGHT, height(lines)) + _GAP
        band = Image.new("RGB", (self.width, tall), _PAPER)
        draw_lines(ImageDraw.Draw(band), (_MARGIN, top), lines)
        return band


def _lines(
    text: str, size: int, color: colors.Color, room: int, most: int, below: int = 0
) -> list[Line]:
    return [Line(part, size, color, below) for part in wrapped(text, size, room, most)]


def _doubts(cell: Attribution) -> list[Line]:
    """What is wrong with a map that cannot be trusted, with the numbers."""
    texts: list[str] = []
    if cell.doubtful:
        texts.append("doubtful")
        if cell.completeness_error is not None:
            texts.append(f"completeness error {_number(100 * cell.completeness_error)} %")
        if cell.cancellation is not None:
            texts.append(f"cancellation {_number(cell.cancellation)}x")
    if cell.unmoved:
        texts += ["as if untrained", f"rank correlation {cell.untrained_similarity:.3f}"]
    return [Line(text, 13, INK, warning=True) for text in texts]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.2g}"
