"""Many volumes on one page: a small projection of each, its label outlined, a few words below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from lightning_segxai import colors, panels
from lightning_segxai.lettering import Line, draw_lines, fitted, height, wrapped
from lightning_segxai.marks import INK, SOFT, WARNING, mark_space
from lightning_segxai.values import Probe

EDGE: Final = 240
"""Pixels of a tile's edges; what it shows lies in its middle."""

_GAP, _MARGIN, _ROW_GAP = 16, 24, 18
_PAPER: Final[colors.Color] = (255, 255, 255)
_BLANK: Final[colors.Color] = (238, 239, 241)
_BESIDE: Final[colors.Color] = (58, 61, 67)  # not black, so that one sees where the volume ends
_OUTLINE: Final[colors.Color] = colors.OUTCOMES["true positive"]


@dataclass(frozen=True, eq=False)
class Frame:
    """One tile of a page.

    Args:
        name: The line below it.
        words: The next line, smaller.
        probe: A projection: one voxel along k, i to the right and j up; None where there is none.
        trouble: What is wrong: instead of a projection, or marked below it.
    """

    name: str
    words: str
    probe: Probe | None
    trouble: str = ""


def contact_sheet(
    frames: Sequence[Frame], *, title: str, notes: Sequence[str], sides: bool
) -> Image.Image:
    """Draw the frames row by row.

    Each projection fills its tile in millimeters. Gray goes from the percentile 0.5 to 99.9 of what
    is shown.

    Args:
        frames: In this order.
        title: Above all.
        notes: Lines below it.
        sides: Whether to write the patient's sides and a bar of known length on each projection.
    """
    columns = max(3, min(6, math.ceil(math.sqrt(1.5 * len(frames)))))
    width = 2 * _MARGIN + columns * EDGE + (columns - 1) * _GAP
    room = width - 2 * _MARGIN
    lines = [Line(fitted(title, 24, room), 24, INK, below=4)]
    lines += [Line(part, 14, SOFT) for note in notes for part in wrapped(note, 14, room, 3)]
    if any(frame.probe is not None for frame in frames):
        lines.append(Line("label, projected", 14, SOFT, swatch=_OUTLINE))
    rows = [frames[n : n + columns] for n in range(0, len(frames), columns)]
    captions = [[_caption(frame) for frame in row] for row in rows]
    talls = [EDGE + 6 + max(map(height, caption)) + _ROW_GAP for caption in captions]
    top = _MARGIN + height(lines) + 16
    page = Image.new("RGB", (width, top + sum(talls) - _ROW_GAP * bool(rows) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw_lines(draw, (_MARGIN, _MARGIN), lines)
    for row, caption, tall in zip(rows, captions, talls, strict=True):
        for n, (frame, words) in enumerate(zip(row, caption, strict=True)):
            left = _MARGIN + n * (EDGE + _GAP)
            page.paste(_tile(frame, sides), (left, top))
            draw_lines(draw, (left, top + EDGE + 6), words)
        top += tall
    return page


def _caption(frame: Frame) -> list[Line]:
    lines = [Line(part, 15, INK) for part in wrapped(frame.name, 15, EDGE, 2)]
    lines += [Line(part, 13, SOFT) for part in wrapped(frame.words, 13, EDGE, 2)]
    if frame.probe is not None and frame.trouble:
        parts = wrapped(frame.trouble, 13, EDGE - 20, 3)
        lines += [Line(part, 13, INK, warning=True) for part in parts]
    return lines


def _tile(frame: Frame, sides: bool) -> Image.Image:
    if frame.probe is None:
        return _without(frame.trouble)
    view = panels.View.of(frame.probe, EDGE)
    image = Image.fromarray(_projection(frame.probe, view))
    if sides:
        mark_space(image, frame.probe)
    tile = Image.new("RGB", (EDGE, EDGE), _BESIDE)
    tile.paste(image, ((EDGE - view.width) // 2, (EDGE - view.height) // 2))
    return tile


def _projection(probe: Probe, view: panels.View) -> UInt8[np.ndarray, "h w 3"]:
    plane = probe.image[0, :, :, 0].double().numpy()
    low, high = np.percentile(plane, (0.5, 99.9))
    gray = np.clip(view((plane - low) / max(high - low, 1e-12)), 0.0, 1.0)
    tile = np.repeat(255.0 * gray[..., None], 3, axis=2)
    if probe.label is not None:
        # The line that panels draw, in a color of its own: bright vessels would hide a white one
        black = np.zeros((view.height, view.width, 3), dtype=np.uint8)
        line = panels.outlined(black, probe.label[:, :, 0] > 0, view) / 255.0
        tile = (1.0 - line) * tile + line * np.array(_OUTLINE, dtype=np.float64)
    return np.rint(tile).astype(np.uint8)


def _without(trouble: str) -> Image.Image:
    """A tile that says in words why there is nothing to see."""
    tile = Image.new("RGB", (EDGE, EDGE), _BLANK)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, 3, EDGE), fill=WARNING)
    lines = [Line("cannot be used", 16, INK, below=6)]
    lines += [Line(part, 13, SOFT) for part in wrapped(trouble, 13, EDGE - 40, 8)]
    draw_lines(draw, (20, (EDGE - height(lines)) // 2), lines)
    return tile
