"""Text in pictures: the font that comes with Pillow, cut and broken so that nothing overlaps."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


_SWAPS = {
    ord("\N{MULTIPLICATION SIGN}"): "x",
    ord("\N{EM DASH}"): "-",
    ord("\N{EN DASH}"): "-",
    ord("\N{MINUS SIGN}"): "-",
    ord("\N{MICRO SIGN}"): "u",
    ord("\N{LATIN SMALL LETTER SHARP S}"): "ss",
}
"""For what the font lacks."""


@cache
def font(size: int) -> Font:
    """Pillow's own font, so that pictures are the same on machines without any."""
    return ImageFont.load_default(size)


def printable(text: str) -> str:
    """The text in the letters that the font has, on one line: accents go, others become ``?``.

    >>> printable("Züge \N{MULTIPLICATION SIGN} 3 \N{GREEK CAPITAL LETTER DELTA}")
    'Zuge x 3 ?'
    """
    swapped = text.translate(_SWAPS)
    letters = (a for a in unicodedata.normalize("NFKD", swapped) if not unicodedata.combining(a))
    known = (a if a.isspace() or " " <= a <= "~" or a == "·" else "?" for a in letters)
    return " ".join("".join(known).split())


def width(text: str, size: int) -> int:
    """Pixels from the start of the text to its end."""
    return int(font(size).getlength(text)) + 1


def fitted(text: str, size: int, room: int) -> str:
    """The text, cut with dots at its end where it is wider than the room.

    >>> fitted("integrated gradients", 14, 90)
    'integrated...'
    """
    text = printable(text)
    if width(text, size) <= room:
        return text
    while text and width(text.rstrip() + "...", size) > room:
        text = text[:-1]
    return text.rstrip() + "..."


def wrapped(text: str, size: int, room: int, lines: int) -> list[str]:
    """The text on at most so many lines, broken at spaces and after ``_ - . / ,`` where it can be.

    >>> wrapped("layer_integrated_gradients", 14, 150, 2)
    ['layer_integrated_', 'gradients']
    """
    done: list[str] = []
    line = ""
    for piece in re.findall(r"[^\s_./,-]*(?:[_./,-]+|\s+|$)", printable(text)):
        line += piece
        while width(line.rstrip(), size) > room:
            # Before the piece where something stands there, else anywhere.
            cut = len(line) - len(piece)
            if cut <= 0:
                fits = (n for n in range(len(line), 1, -1) if width(line[:n], size) <= room)
                cut = next(fits, 1)
            done.append(line[:cut])
            line = piece = line[cut:]
    if line.strip():
        done.append(line)
    if len(done) > lines:
        done = [*done[: lines - 1], fitted("".join(done[lines - 1 :]), size, room)]
    return [part.rstrip() for part in done]


@dataclass(frozen=True)
class Line:
    """One line of words.

    Args:
        text: What it says.
        size: Of its letters, in pixels.
        color: Red, green, blue.
        below: Pixels to the next line.
        swatch: Color of a square before the words, as in a legend.
        warning: Whether it stands in a box that catches the eye.
    """

    text: str
    size: int
    color: tuple[int, int, int]
    below: int = 0
    swatch: tuple[int, int, int] | None = None
    warning: bool = False

    @property
    def height(self) -> int:
        """Pixels from its top to the next line's."""
        return round(1.4 * self.size) + self.below


def height(lines: Sequence[Line]) -> int:
    """Pixels that the lines take, one below the other."""
    return sum(line.height for line in lines)


def draw_lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[Line]) -> None:
    """Write the lines one below the other, from the left upper corner ``at``."""
    left, top = at
    for line in lines:
        indent = 0
        tall = line.height - line.below
        if line.warning:
            indent = 12
            room = (left, top, left + 235, top + tall - 1)
            draw.rectangle(room, fill=(255, 242, 214))
            draw.rectangle((left, top, left + 3, top + tall - 1), fill=(230, 159, 0))
        if line.swatch is not None:
            indent = 20
            box = (left, top + 2, left + 12, top + 14)
            draw.rectangle(box, fill=line.swatch, outline=(100, 104, 112))
        # "ls": the baseline is at a fixed part of the line, whatever letters it has.
        base = top + round(1.05 * line.size)
        draw.text(
            (left + indent, base), line.text, fill=line.color, font=font(line.size), anchor="ls"
        )
        top += line.height
