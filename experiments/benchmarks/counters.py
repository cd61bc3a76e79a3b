"""Counters for the benchmarks: floating-point operations, and bytes alive at the peak."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and products in some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def peak_bytes(work: Callable[[], Any], aside: Collection[int] = ()) -> int:
    """Bytes that torch's CPU allocator holds at the peak of some work, above where it began.

    Args:
        work: What is measured.
        aside: Sizes in bytes of allocations that do not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        if abs(size) not in aside:
            alive += size
            peak = max(peak, alive)
    return peak
