"""Draw every number of a run over its steps: a small chart for each metric, a line for each method.

    python experiments/trajectories.py RUN_FOLDER --out trajectories.png

RUN_FOLDER is the monitor's folder of a run, the one with records.csv. A point is the mean over the
probes, of the first target; shifts are those from the previous map.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lightning_segxai.folder import RunFolder
from lightning_segxai.lettering import fitted, font
from lightning_segxai.values import Record

WIDE, TALL, COLUMNS = 300, 190, 5
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 44, 26  # around the lines of a chart
HEAD, SCALE = 64, 2
PAPER, INK, SOFT, RULE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (222, 222, 222)
# Okabe and Ito's colors, told apart by color-blind readers, too.
LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
BLACK = (0, 0, 0)

Curve = dict[int, float]


def curves(records: list[Record]) -> dict[str, dict[str, Curve]]:
    """Mean over the probes by metric, method (empty for a probe's own) and step."""
    target = next((r.target for r in records if r.target), "")
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for r in records:
        moved = r.metric.partition("/")[2]
        if r.target in ("", target) and moved in ("", "previous") and r.status == "ok":
            of_method = found.setdefault(r.metric, {}).setdefault(r.method, {})
            of_method.setdefault(r.step, []).append(r.value)
    return {
        metric: {
            method: {step: math.fsum(v) / len(v) for step, v in sorted(steps.items())}
            for method, steps in methods.items()
        }
        for metric, methods in found.items()
    }


def ticks(low: float, high: float) -> list[float]:
    """Two to four round numbers within the range."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (power / 5, power / 2, power, 2 * power, 5 * power):
        marks = [n * step for n in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]
        if 2 <= len(marks) <= 4:
            return marks
    return [low, high]


def chart(
    title: str, unit: str, lines: dict[str, Curve], colors: dict[str, tuple[int, int, int]]
) -> Image.Image:
    """One metric."""
    s = SCALE
    image = Image.new("RGB", (WIDE * s, TALL * s), PAPER)
    draw = ImageDraw.Draw(image)
    words = title if unit == "1" else f"{title}, {unit}"
    head = fitted(words, 13 * s, (WIDE - 20) * s)
    draw.text((12 * s, 26 * s), head, INK, font=font(13 * s), anchor="ls")
    values = [v for curve in lines.values() for v in curve.values()]
    steps = sorted({step for curve in lines.values() for step in curve})
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - margin, high + margin

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDE - LEFT - RIGHT) * (step - steps[0]) / max(1, steps[-1] - steps[0])
        y = TOP + (TALL - TOP - BOTTOM) * (high - value) / (high - low)
        return x * s, y * s

    for mark in ticks(low, high):
        y = at(steps[0], mark)[1]
        draw.line((LEFT * s, y, (WIDE - RIGHT) * s, y), RULE, width=s)
        draw.text(((LEFT - 6) * s, y), f"{mark:.4g}", SOFT, font=font(11 * s), anchor="rm")
    for step, anchor in {steps[0]: "ms", steps[-1]: "rs"}.items():
        place = (at(step, low)[0], (TALL - 8) * s)
        draw.text(place, f"{step:,}", SOFT, font=font(11 * s), anchor=anchor)
    for method, curve in lines.items():
        points = [at(step, value) for step, value in curve.items()]
        draw.line(points, colors[method], width=2 * s, joint="curve")
        for x, y in points:
            draw.ellipse((x - 2 * s, y - 2 * s, x + 2 * s, y + 2 * s), colors[method])
    return image.resize((WIDE, TALL), Image.Resampling.LANCZOS)


def page(folder: RunFolder) -> Image.Image:
    """All metrics of a run."""
    records = folder.read_records()
    units = {r.metric: r.unit for r in records}
    found = curves(records)
    methods = list(dict.fromkeys(m for lines in found.values() for m in lines if m))
    colors = {m: LINES[n % len(LINES)] for n, m in enumerate(methods)} | {"": BLACK}
    steady = {m for m, lines in found.items() if np.ptp([*_all(lines)]) == 0.0}
    shown = [m for m in found if m not in steady]
    rows = -(-len(shown) // COLUMNS)
    image = Image.new("RGB", (WIDE * COLUMNS, HEAD + TALL * rows + 40), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((12, 30), "Every metric over the training steps", INK, font=font(20), anchor="ls")
    left = 12
    for name, color in colors.items():
        draw.line((left, 52, left + 22, 52), color, width=4)
        words = name or "the probe itself"
        draw.text((left + 28, 52), words, INK, font=font(13), anchor="lm")
        left += 28 + round(font(13).getlength(words)) + 24
    for n, metric in enumerate(shown):
        tile = chart(metric, units[metric], found[metric], colors)
        image.paste(tile, (WIDE * (n % COLUMNS), HEAD + TALL * (n // COLUMNS)))
    if steady:
        words = "The same at every step: " + ", ".join(
            f"{m} ({next(_all(found[m])):g})" for m in sorted(steady)
        )
        place = (12, image.height - 14)
        draw.text(place, fitted(words, 13, image.width - 24), SOFT, font=font(13), anchor="ls")
    return image


def _all(lines: dict[str, Curve]) -> Iterator[float]:
    return (value for curve in lines.values() for value in curve.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the monitor's folder of a run")
    parser.add_argument("--out", type=Path, default=Path("trajectories.png"))
    chosen = parser.parse_args()
    page(RunFolder(chosen.run)).save(chosen.out, optimize=True)


if __name__ == "__main__":
    main()
