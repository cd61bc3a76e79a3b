"""What is written on and beside tiles: patient's sides, lengths, color bars, missing maps."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw

from lightning_segxai import colors
from lightning_segxai.lettering import Line, draw_lines, font, height, width, wrapped
from lightning_segxai.values import Attribution, Probe

INK: Final[colors.Color] = (28, 30, 34)
SOFT: Final[colors.Color] = (96, 100, 108)
WARNING: Final[colors.Color] = (230, 159, 0)
_BLACK: Final[colors.Color] = (0, 0, 0)
_WHITE: Final[colors.Color] = (255, 255, 255)
_BLANK: Final[colors.Color] = (238, 239, 241)
_HATCH: Final[colors.Color] = (216, 218, 222)


def edge_letters(probe: Probe) -> tuple[str, str, str, str]:
    """Patient's sides at a tile's left, right, top and bottom, as the affine says."""
    affine = np.asarray(probe.affine)
    ends: list[str] = []
    for axis in (0, 1):
        world = int(np.abs(affine[:3, axis]).argmax())
        low, high = ("LR", "PA", "IS")[world]
        ends += [low, high] if affine[world, axis] > 0 else [high, low]
    left, right, bottom, top = ends
    return left, right, top, bottom


def mark_space(tile: Image.Image, probe: Probe) -> None:
    """Write the patient's sides at the tile's edges, and draw a bar of known length."""
    draw = ImageDraw.Draw(tile)
    wide, tall = tile.size
    left, right, top, bottom = edge_letters(probe)
    words = [
        (left, (6, tall // 2), "lm"),
        (right, (wide - 6, tall // 2), "rm"),
        (top, (wide // 2, 5), "mt"),
        (bottom, (wide // 2, tall - 5), "mb"),
    ]
    per_mm = wide / (probe.shape[0] * probe.spacing_mm[0])
    longest = min(wide / 3, wide / 2 - 50)
    length = next((mm for mm in (100, 50, 20, 10, 5, 2, 1) if 12 <= mm * per_mm < longest), None)
    if length is not None and tall > 90:
        bar = (8, tall - 9, 8 + length * per_mm, tall - 8)
        draw.rectangle((bar[0] - 1, bar[1] - 1, bar[2] + 1, bar[3] + 1), fill=_BLACK)
        draw.rectangle(bar, fill=_WHITE)
        words.append((f"{length} mm", (8, tall - 13), "ls"))
    for text, at, anchor in words:
        draw.text(
            at, text, _WHITE, font=font(13), anchor=anchor, stroke_width=1, stroke_fill=_BLACK
        )


def no_map(cell: Attribution, size: tuple[int, int]) -> Image.Image:
    """A hatched tile that says why there is no map."""
    wide, tall = size
    tile = Image.new("RGB", size, _BLANK)
    draw = ImageDraw.Draw(tile)
    for x in range(-tall, wide, 14):
        draw.line((x, tall, x + tall, 0), fill=_HATCH, width=2)
    why: str = cell.status
    if why == "ok":
        finite = bool(torch.isfinite(cell.values).all())
        why = "zero everywhere" if finite else "not finite"
    room = wide - 80
    lines = [Line(text, 16, INK, below=4) for text in wrapped(f"no map: {why}", 16, room, 2)]
    most = min(6, (tall - height(lines) - 20) // 18)
    if most > 0:
        lines += [Line(text, 13, SOFT) for text in wrapped(cell.reason, 13, room, most)]
    across, down = max(width(line.text, line.size) for line in lines), height(lines)
    x, y = (wide - across) // 2, (tall - down) // 2
    draw.rectangle((x - 16, y - 8, x + across + 16, y + down + 6), fill=_BLANK)
    draw_lines(draw, (x, y), lines)
    return tile


def color_bar(size: tuple[int, int], *, signed: bool) -> Image.Image:
    """The scale with its decades; 24 pixels of the height are for their names."""
    wide, tall = size
    bar = Image.new("RGB", size, _WHITE)
    position = np.linspace(-1.0 if signed else 0.0, 1.0, wide)
    paint = np.repeat(colors.paint(position, signed=signed)[None], tall - 24, axis=0)
    bar.paste(Image.fromarray(paint), (0, 0))
    draw = ImageDraw.Draw(bar)
    first = -colors.DECADES if signed else 0
    for decade in range(first, colors.DECADES + 1):
        x = (wide - 1) * (decade - first) / (colors.DECADES - first)
        sign = "" if not signed else "-" if decade < 0 else "+"
        name = f"{sign}{10 ** abs(decade):,}x" if decade or not signed else "1x or less"
        anchor = "ls" if decade == first else "rs" if decade == colors.DECADES else "ms"
        draw.line((x, tall - 24, x, tall - 19), fill=SOFT)
        draw.text((x, tall - 6), name, SOFT, font=font(13), anchor=anchor)
    return bar
