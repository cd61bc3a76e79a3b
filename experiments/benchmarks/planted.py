"""Which methods find a planted cause: one line of JSON for each number, and a table.

    python experiments/benchmarks/planted.py                   # ten seeds, all methods
    python experiments/benchmarks/planted.py --seeds 3 spots   # some

For each seed a small network is trained on volumes with a planted cause, and every method explains
it on one that it has not seen. The margin is by how much the map does better than its own values at
random places: in `Deletion` (the random map's less the map's), `Insertion` and
`MassInside("cause")` (the map's less the random map's). The table says in how many seeds each
margin is above 0, and the least margin; a map of zeros has none, and counts as lost.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator

import torch
from matrix import METHODS
from planted_margins import MARGINS, margins
from planted_training import HELD_OUT, KINDS, RECIPES, Kind, held_out, overlap, trained

from lightning_segxai import IntegratedGradients

# black, and so blind to what is dark by nature: the plain path method's number to compare with
WAYS = {**METHODS, "IntegratedGradients_black": IntegratedGradients(50, baseline="minimum")}


def cells(kind: Kind, seeds: int) -> Iterator[dict[str, object]]:
    """The numbers of each seed and method."""
    for seed in range(seeds):
        net = trained(kind, seed)
        unseen = [RECIPES[kind].make(HELD_OUT + 100 + n, n % 2 == 0) for n in range(20)]
        dice = round(overlap(net, unseen), 3)
        for method, found in margins(net, held_out(kind, seed), WAYS, seed).items():
            rounded = {name: round(value, 4) for name, value in found.items()}
            yield {"kind": kind, "seed": seed, "dice": dice, "method": method, **rounded}


def table(rows: list[dict[str, object]]) -> str:
    """In Markdown: in how many seeds each margin is above 0, and the least there is."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    heads = [f"{kind}: {name}" for kind in kinds for name in MARGINS]
    lines = [f"| method | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    for method in WAYS:
        line = [method]
        for kind in kinds:
            for name in MARGINS:
                own = [r for r in rows if r["kind"] == kind and r["method"] == method]
                values = [float(str(row[name])) for row in own]
                line.append(f"{sum(v > 0 for v in values)} ({least(values)})")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def least(values: list[float]) -> str:
    """The smallest number among them."""
    known = [value for value in values if not math.isnan(value)]
    return f"{min(known):.2f}" if known else "-"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all where none is given")
    parser.add_argument("--seeds", type=int, default=10, help="how many (%(default)s)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for kind in asked.kinds or KINDS:
        for row in cells(kind, asked.seeds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
