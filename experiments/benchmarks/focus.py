"""What the metrics cost, and all else that is not explaining: one line of JSON for each number.

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/focus.py            # all
    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/focus.py metrics    # some

``metrics``: CPU seconds of all default focus metrics of one map of 128^3, once what is kept of the
probe is there, and of all default shift metrics against up to three earlier maps.
``share``: of an observation like the demo's (probes of its size, its network, files, without W&B),
the share of time that is not spent on explaining.
``demo``: where the time of the monitor goes in ``segxai demo``, W&B and all; two to four minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_segxai import Attribution, AttributionMonitor, Probe, UNet3d, tof_phantom
from lightning_segxai import observe as observation
from lightning_segxai.chronicle import Chronicle
from lightning_segxai.cli import run_lightning
from lightning_segxai.defaults import (
    default_methods,
    default_metrics,
    default_shifts,
    default_targets,
)
from lightning_segxai.demo import demo as run_demo
from lightning_segxai.failures import Failures
from lightning_segxai.focus.ranks import similarity
from lightning_segxai.folder import RunFolder
from lightning_segxai.observe import Questions, observe
from lightning_segxai.scored import Predictor
from lightning_segxai.sinks.base import Run
from lightning_segxai.sinks.files import FileSink
from lightning_segxai.sinks.wandb import WandbSink
from lightning_segxai.timeline import Timeline


def say(what: str, value: float, bound: str, **more: object) -> None:
    """One number."""
    print(json.dumps({"what": what, "value": round(value, 4), "bound": bound, **more}), flush=True)


def a_probe(edge: int, name: str = "phantom") -> Probe:
    """A painted phantom with its vessels as the label."""
    found = tof_phantom(shape=(edge, edge, edge), seed=0)
    image = torch.as_tensor(found.image).float()
    label = torch.as_tensor(found.label).long()
    return Probe(name, image.reshape(1, *label.shape), label, spacing_mm=(0.6, 0.6, 0.6))


def metrics() -> None:
    """All default metrics of one map, and of it against three others."""
    torch.set_num_threads(1)
    probe = a_probe(128)
    label = probe.label
    assert label is not None

    def a_map() -> Attribution:
        values = torch.randn(probe.shape)
        return Attribution(probe, "vessel", "m", "", values, "a.u.", label > 0, label, 1.0)

    each: dict[str, float] = defaultdict(float)

    def take(name: str, metric: Callable[..., float | None], *maps: Attribution) -> None:
        begin = time.process_time()
        metric(*maps)
        each[name] += time.process_time() - begin

    def total() -> float:
        return sum(each.values())

    for name, metric in default_metrics().items():  # distances and centerlines are made
        take(name, metric.measure, a_map())
    now, *earlier = (a_map() for _ in range(4))  # of these, nothing is kept yet
    each.clear()
    for name, metric in default_metrics().items():
        take(name, metric.measure, now)
    alone = total()
    after = []
    for then in earlier:
        for name, shift in default_shifts().items():
            take(name, shift.measure, now, then)
        after.append(total())
    slowest = dict(sorted(each.items(), key=lambda item: -item[1])[:5])
    say("metrics of one 128^3 map, CPU seconds", alone, "none")
    say("... and against one earlier map", after[0], "<= 1")
    say("... against three earlier maps", after[-1], "<= 1", slowest=slowest)
    take("untrained", similarity, now, earlier[0])
    say("... and to the untrained network's", total(), "none")


def share() -> None:
    """An observation of two probes of 32^3 by the demo's network: what is not explaining."""
    probes = [a_probe(32, "one"), dataclasses.replace(a_probe(32), name="two")]
    asked = Questions(default_targets(), default_methods(), default_metrics(), default_shifts())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    predictor = Predictor(UNet3d(channels=8, levels=3))
    with tempfile.TemporaryDirectory() as folder:
        run = Run("run", "segxai", RunFolder(Path(folder)), tuple(probes))
        story = Chronicle.begin(run, [FileSink()], "all", Failures("raise"), {})
        for step in range(4):
            begin = time.perf_counter()
            seen = observe(
                predictor,
                probes,
                asked,
                epoch=step,
                step=step,
                logging_step=step,
                run="run",
                timeline=story.timeline,
                seed=0,
                failed=None,
            )
            story.write(seen)
            whole = time.perf_counter() - begin
            explaining = sum(a.seconds for a in seen.attributions)
            say(
                "not explaining, share of an observation",
                1 - explaining / whole,
                "<= 0.15",
                observation=step,
                seconds=round(whole, 2),
            )
        story.close()


@dataclass
class Clock:
    """How long functions took, less those inside that are watched too."""

    now: Callable[[], float]
    took: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: list[float] = field(default_factory=list)

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Let the time of a function, or of a method, count under a name."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            begin = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                whole = self.now() - begin
                self.took[name] += whole - self.inside.pop()
                if self.inside:
                    self.inside[-1] += whole

        setattr(owner, function, timed)


PASSES, EXPLAINING = "passes", "explaining beside the passes"


def demo() -> None:
    """``segxai demo`` as it is; all that its monitor does, from setup to the artifact."""
    hooks = [name for name in vars(AttributionMonitor) if name.startswith("on_")]
    watched: tuple[tuple[Any, str, str], ...] = (
        *((AttributionMonitor, name, "else") for name in (*hooks, "setup", "state_dict")),
        (torch.autograd, "grad", PASSES),
        (Predictor, "_run", PASSES),
        (observation, "explain", EXPLAINING),
        (observation, "measure", "metrics"),
        (observation, "_shifts", "shifts"),
        (observation, "_beside_untrained", "shifts"),
        (Timeline, "references", "reading earlier maps"),
        (observation, "render", "pictures"),
        (FileSink, "open", "files"),
        (FileSink, "write", "files"),
        (WandbSink, "open", "W&B"),
        (WandbSink, "write", "W&B"),
        (WandbSink, "close", "W&B"),
    )
    clocks = {"CPU": Clock(time.process_time), "wall": Clock(time.perf_counter)}
    for clock in clocks.values():
        for place in watched:
            clock.watch(*place)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder, functools.partial(run_lightning, quiet=True))
    for kind, clock in clocks.items():
        whole = sum(clock.took.values())
        share = {k: round(v / whole, 4) for k, v in sorted(clock.took.items(), key=lambda i: -i[1])}
        say("demo: not passes", 1 - share[PASSES], "<= 0.15", by=kind, of=share, seconds=whole)
        rest = 1 - share[PASSES] - share[EXPLAINING]
        say("demo: not explaining", rest, "<= 0.15", by=kind)


PARTS: dict[str, Callable[[], None]] = {"metrics": metrics, "share": share, "demo": demo}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
