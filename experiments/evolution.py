"""Draw how the focus of one probe evolved over a run: a strip with one column for each moment.

    python experiments/evolution.py RUN_FOLDER --probe NAME --out evolution.png

RUN_FOLDER is the monitor's folder of a run, the one with records.csv.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lightning_segxai import panels
from lightning_segxai.colors import OUTCOMES
from lightning_segxai.folder import RunFolder
from lightning_segxai.lettering import font
from lightning_segxai.marks import color_bar
from lightning_segxai.values import Attribution, Probe, Record

EDGE, GAP, HEAD, WORDS = 190, 8, 46, 150


@dataclass(frozen=True)
class Moment:
    epoch: int
    step: int
    records: list[Record]

    def value(self, metric: str, method: str = "") -> float:
        found = [r.value for r in self.records if (r.metric, r.method) == (metric, method)]
        return found[0] if found else float("nan")


def moments(folder: RunFolder, probe: str) -> list[Moment]:
    rows = [r for r in folder.read_records() if r.probe == probe]
    when = dict.fromkeys((r.epoch, r.step) for r in rows)
    return [Moment(e, s, [r for r in rows if (r.epoch, r.step) == (e, s)]) for e, s in when]


def attribution(
    folder: RunFolder, probe: Probe, target: str, method: str, now: Moment
) -> Attribution:
    values = folder.read_nifti(folder.map_path(probe.name, target, method, now.epoch, now.step))
    prediction = folder.read_nifti(folder.prediction_path(probe.name, now.epoch, now.step))
    region = torch.zeros(probe.shape, dtype=torch.bool) if probe.label is None else probe.label > 0
    return Attribution(
        probe, target, method, "", values, "", region, prediction.long(), 0.0, now.epoch, now.step
    )


def strip(folder: RunFolder, name: str, target: str, methods: list[str], count: int) -> Image.Image:
    probe = folder.load_probe(name)
    all_moments = moments(folder, name)
    chosen = np.unique(np.geomspace(1, len(all_moments), count).round().astype(int)) - 1
    shown = [all_moments[n] for n in chosen]
    view = panels.View.of(probe, EDGE)
    rows = 1 + len(methods)
    width = WORDS + len(shown) * (view.width + GAP)
    page = Image.new("RGB", (width, HEAD + rows * (view.height + GAP + 18) + 50), "white")
    draw = ImageDraw.Draw(page)
    row_height = view.height + GAP + 18
    for n, label in enumerate(["prediction", *methods]):
        draw.text((8, HEAD + n * row_height + view.height // 2), label, "black", font(14))
    for column, now in enumerate(shown):
        left = WORDS + column * (view.width + GAP)
        what = "untrained" if now.step == 0 else f"step {now.step}"
        draw.text((left, 6), what, "black", font(15))
        draw.text((left, 26), f"Dice {now.value('dice'):.2f}", "#555", font(13))
        cells = [attribution(folder, probe, target, method, now) for method in methods]
        masks = panels.projected(panels.outcomes(probe, cells[0].prediction))
        tiles = [panels.errors(panels.projected_anatomy(probe), masks, view)]
        tiles += [
            drawn.projection
            if (drawn := panels.map_tiles(cell, panels.target_slice(cell), view)) is not None
            else np.full((view.height, view.width, 3), 200, np.uint8)
            for cell in cells
        ]
        for n, tile in enumerate(tiles):
            page.paste(Image.fromarray(tile), (left, HEAD + n * row_height))
            if n:
                share = now.value("mass_inside", methods[n - 1])
                place = (left, HEAD + n * row_height + view.height + 1)
                draw.text(place, f"{share:.0%} on vessels", "#555", font(12))
    draw.text((8, page.height - 42), "x mean of the volume", "#555", font(12))
    half = (width - WORDS) // 2 - 3 * GAP
    for n, signed in enumerate((False, True)):
        bar = color_bar((half, 40), signed=signed)
        page.paste(bar, (WORDS + n * (half + 4 * GAP), page.height - 44))
    for n, (name, color) in enumerate(list(OUTCOMES.items())[:3]):
        draw.rectangle((8, HEAD + 10 + 18 * n, 18, HEAD + 20 + 18 * n), fill=color)
        draw.text((24, HEAD + 8 + 18 * n), name, "#555", font(12))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the monitor's folder of a run")
    parser.add_argument("--probe", required=True)
    parser.add_argument("--target", default="vessel")
    parser.add_argument("--methods", nargs="+", default=["saliency", "integrated_gradients"])
    parser.add_argument("--moments", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("evolution.png"))
    chosen = parser.parse_args()
    folder = RunFolder(chosen.run)
    picture = strip(folder, chosen.probe, chosen.target, chosen.methods, chosen.moments)
    picture.save(chosen.out, optimize=True)
    print(f"{chosen.out}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
