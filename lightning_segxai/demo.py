"""``segxai demo``: the phantom experiment, and what the monitor saw of it."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_segxai.folder import RunFolder
from lightning_segxai.values import Record

CONFIG = "phantom.yaml"
METHOD = "integrated_gradients"


def demo(out: str, run: Callable[[list[str]], Any]) -> None:
    """Train on phantoms, and print how the focus moved and where everything is.

    Args:
        out: Folder to write to.
        run: Runs the LightningCLI.

    Raises:
        ValueError: if the folder is a file.
    """
    root = Path(out).absolute()
    if root.exists() and not root.is_dir():
        raise ValueError(f"`segxai demo --out {out}` needs a folder, but that is a file.")
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    # Lightning 2.6 under torch 2.13 says it at every batch type; to go with a later Lightning.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    begin = time.perf_counter()
    cli = run(
        [
            "fit",
            f"--config={config_path()}",
            f"--trainer.default_root_dir={root}",
            f"--trainer.logger.init_args.save_dir={root}",
        ]
    )
    seconds = time.perf_counter() - begin
    folder: RunFolder = cli.segxai.run.folder
    console = Console()
    records = folder.read_records()
    console.print(_table(records))
    console.print(_trust(records))
    dice = float(cli.trainer.callback_metrics["val_dice"])
    first, last = (_mean(_at(records, end), "mass_inside", METHOD) for end in (0, -1))
    console.print(f"final validation Dice   {dice:.3f}")
    console.print(f"{METHOD}    {first} on vessels untrained, {last} at the end")
    console.print(f"wall time               {seconds:.0f} s")
    console.print(f"peak memory             {peak_gib():.2f} GiB")
    for what, where in (
        ("numbers", "records.csv"),
        ("pictures", "panels/"),
        ("maps", "maps/"),
    ):
        console.print(f"{what:23} {folder.root / where}", soft_wrap=True)
    console.print(f"W&B, offline            wandb sync {root}/wandb/latest-run", soft_wrap=True)


def config_path() -> Path:
    """The experiment's file: in the checkout, or beside this module in an installed package."""
    here = Path(__file__).parent
    installed, checkout = here / CONFIG, here.parent / "experiments" / CONFIG
    return installed if installed.exists() else checkout


def peak_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _table(records: list[Record]) -> Table:
    """How much of each method's attribution lies on vessels, over the training."""
    table = Table(title="Share of the attribution that lies on vessels (mass_inside)")
    methods = list(dict.fromkeys(r.method for r in records if r.metric == "mass_inside"))
    for column in ("epoch", "step", "probe Dice", *methods):
        table.add_column(column, justify="right")
    for n, (epoch, step) in enumerate(_moments(records)):
        now = _at(records, n)
        cells = [_mean(now, "dice", "")] + [_mean(now, "mass_inside", m) for m in methods]
        table.add_row(str(epoch), "untrained" if step == 0 else str(step), *cells)
    return table


def _trust(records: list[Record]) -> Table:
    """What the network says to each method's last maps."""
    table = Table(
        title="Whether the last maps are to be trusted (segxai metrics tells how to read)"
    )
    names = ("deletion", "deletion_random", "insertion", "randomization")
    table.add_column("method", no_wrap=True)
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right")
    end = max(r.step for r in records)
    last = [r for r in records if r.step == end]
    for method in dict.fromkeys(r.method for r in last if r.method):
        table.add_row(method, *(_mean(last, name, method) for name in names))
    return table


def _moments(records: list[Record]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r.epoch, r.step) for r in records))


def _at(records: list[Record], n: int) -> list[Record]:
    """The records of the n-th observation."""
    moment = _moments(records)[n]
    return [r for r in records if (r.epoch, r.step) == moment]


def _mean(records: list[Record], metric: str, method: str) -> str:
    found = [r.value for r in records if (r.metric, r.method, r.status) == (metric, method, "ok")]
    return f"{sum(found) / len(found):.3f}" if found else "-"
