"""The command line: ``segxai fit|validate|test|demo|data|layers|metrics|explain``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION = "Watch where a 3D vessel segmentation network looks while it trains."
TRAINING = {
    "fit": "train a network, watched by the monitor (LightningCLI)",
    "validate": "run one validation epoch (LightningCLI)",
    "test": "run the test set (LightningCLI)",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command. Exit status 0; 2, with one line, for what a user can mend; 130 on Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given and given[0] in TRAINING:
            run_lightning(given)
        else:
            parser = _parser()
            chosen, settings = parser.parse_known_args(given)
            if settings and "config" not in chosen:
                parser.error(f"unrecognized arguments: {' '.join(settings)}")
            chosen.settings = settings
            chosen.run(chosen)
    except KeyboardInterrupt:
        print("segxai: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # told in one line, or raised again
        if not _users(error) or os.environ.get("SEGXAI_TRACEBACK"):
            raise
        print(f"segxai: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "segxai",
        description=DESCRIPTION,
        epilog="A mistake is told in one line; set SEGXAI_TRACEBACK=1 to see where it arose.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)

    demo = commands.add_parser("demo", help="train on phantoms on a CPU in about two minutes")
    demo.add_argument("--out", default="demo", metavar="DIR", help="where to write")
    demo.set_defaults(run=_demo)

    data = commands.add_parser("data", help="look at the data before training")
    _add_config(data)
    data.add_argument(
        "--out", default="data-look", metavar="DIR", help="for the pictures; else data-look"
    )
    data.set_defaults(run=_data)

    layers = commands.add_parser("layers", help="the network's layers with their output shapes")
    _add_config(layers)
    layers.add_argument(
        "--shape", type=int, nargs=3, metavar=("I", "J", "K"), help="voxels; else a patch"
    )
    layers.add_argument("--channels", type=int, default=1, help="of the image")
    layers.set_defaults(run=_layers)

    metrics = commands.add_parser("metrics", help="every metric with unit, range and reading help")
    metrics.set_defaults(run=_metrics)

    explain = commands.add_parser("explain", help="explain a trained network on a volume")
    _add_config(explain)
    explain.add_argument("--ckpt", required=True, metavar="F", help="checkpoint of the training")
    explain.add_argument("--image", required=True, metavar="V.nii.gz", help="the volume")
    explain.add_argument("--label", metavar="L.nii.gz", help="its label, where the truth is known")
    explain.add_argument("--out", required=True, metavar="DIR", help="where to write")
    explain.set_defaults(run=_explain)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="C.yaml",
        help="as for `segxai fit`, and like there a setting may follow: --data.patch_size 32",
    )


def _demo(chosen: argparse.Namespace) -> None:
    from lightning_segxai.demo import demo

    demo(chosen.out, partial(run_lightning, quiet=True))


def _data(chosen: argparse.Namespace) -> None:
    from lightning_segxai.inspection import inspect_data

    inspect_data(configured(chosen.config, chosen.settings).datamodule, chosen.out)


def _layers(chosen: argparse.Namespace) -> None:
    from lightning_segxai.posthoc import show_layers

    parts = configured(chosen.config, chosen.settings)
    show_layers(parts.model, parts.datamodule, parts.segxai, chosen.shape, chosen.channels)


def _metrics(chosen: argparse.Namespace) -> None:
    import lightning_segxai
    from lightning_segxai.catalogue import show_catalogue

    show_catalogue(getattr(lightning_segxai, name) for name in lightning_segxai.__all__)


def _explain(chosen: argparse.Namespace) -> None:
    from lightning_segxai.posthoc import explain_file

    parts = configured(chosen.config, chosen.settings)
    explain_file(
        parts.model,
        parts.datamodule,
        parts.segxai,
        parts.trainer,
        ckpt=chosen.ckpt,
        image=chosen.image,
        label=chosen.label,
        out=chosen.out,
    )


def configured(configs: Sequence[str], settings: Sequence[str]) -> Any:
    """The parts that configuration files describe, made but not run.

    Args:
        configs: The files.
        settings: Further ones, as on the command line of ``segxai fit``.

    Returns:
        A LightningCLI with ``model``, ``datamodule`` and ``segxai``.
    """
    files = [part for config in configs for part in ("--config", config)]
    return run_lightning([*files, *settings], run=False, quiet=True)


def run_lightning(args: list[str], *, run: bool = True, quiet: bool = False) -> Any:
    """LightningCLI with the monitor as the top-level key ``segxai:``, and first of the callbacks.

    Args:
        args: The command line.
        run: Whether to run the subcommand that ``args`` starts with.
        quiet: Whether to leave out Lightning's greetings and tips.
    """
    import pytorch_lightning.cli as lightning

    import lightning_segxai
    from lightning_segxai.callback import AttributionMonitor
    from lightning_segxai.checkpoints import read_checkpoint

    if quiet:
        for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.WARNING)
    for name in lightning_segxai.__all__:  # known by their short names once they are imported
        getattr(lightning_segxai, name)

    class SegxaiCLI(lightning.LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(AttributionMonitor, "segxai")

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            known = lightning.LightningCLI.subcommands()
            return {name: known[name] for name in TRAINING}

        @property
        def segxai(self) -> AttributionMonitor:
            return self._get(self.config_init, "segxai")

        def _check_checkpoint(self) -> None:
            path = self.config[self.subcommand].get("ckpt_path")
            if path is not None and Path(path).suffix:  # not a word such as `last`
                read_checkpoint(Path(path))

        def before_validate(self) -> None:
            self._check_checkpoint()

        def before_test(self) -> None:
            self._check_checkpoint()

        def before_fit(self) -> None:
            self._check_checkpoint()
            # Lightning appends it; a weight-averaging callback before it would hide its weights.
            trainer: Any = self.trainer
            others = [c for c in trainer.callbacks if c is not self.segxai]
            trainer.callbacks = [self.segxai, *others]
            self.segxai.cli_config = self._config_of_run()

        def _config_of_run(self) -> dict[str, Any]:
            config = self.config.get(self.subcommand) if self.subcommand else self.config
            return config.as_dict()

    with warnings.catch_warnings():
        # Lightning 2.6 with jsonargparse 4.53; to go with the Lightning that no longer says it.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="pytorch_lightning")
        # Lightning suspects that both were given by mistake: our own commands stand in between.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return SegxaiCLI(
            save_config_callback=None,  # the configuration goes to run.json
            parser_kwargs={"exit_on_error": False},
            args=args,
            run=run,
        )


def _users(error: Exception) -> bool:
    """Whether an error is a user's mistake, to be told in one line.

    Not if code that is neither ours nor an installed package's was running: who wrote it wants the
    traceback.
    """
    ours = (str(Path(__file__).parent), sys.prefix, sys.base_prefix, "<")
    frames = traceback.extract_tb(error.__traceback__)
    if any(not frame.filename.startswith(ours) for frame in frames):
        return False
    kinds = (ValueError, TypeError, OSError, argparse.ArgumentError)
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, kinds) or "MisconfigurationException" in names


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" Given value type:")[0]  # jsonargparse repeats the whole block behind it
