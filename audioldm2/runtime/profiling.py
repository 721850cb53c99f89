"""Where a generation's time goes: named ranges for torch.profiler, and their times as a table.

Each stage runs in a range "audioldm2.<name of the stage>", each step of the sampler in "audioldm2.scheduler",
inside the UNet's, and the ranking of candidates in "audioldm2.ranking", around CLAP's. They are in the traces
that torch.profiler writes, and cost microseconds when no profiler runs.

    with torch.profiler.profile() as profiler:
        pipe("A bell")
    profiler.export_chrome_trace("trace.json")
    for stage in stage_times(profiler):
        print(f"{stage.name}: {stage.seconds:.2f} s")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.profiler import profile

PREFIX = "audioldm2."


@dataclass
class StageTime:
    """The time in the ranges of one name, without the ranges inside them.

    Attributes:
        name: of the stage, or "scheduler" or "ranking".
        calls: number of ranges.
        seconds: time of the host.
        device_seconds: time of the kernels that it started on a GPU; 0 on a CPU.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0


def recorded(name: str) -> torch.profiler.record_function:
    """A context manager: the range "audioldm2.<name>" in a profiler's trace."""
    return torch.profiler.record_function(f"{PREFIX}{name}")


def stage_times(profiler: profile) -> list[StageTime]:
    """The times of the ranges in a finished profile, in the order in which they first ran.

    Args:
        profiler: after its block has ended.
    """
    events = [
        event
        for event in profiler.events() or []
        if event.name.startswith(PREFIX) and event.device_type.name == "CPU"
    ]
    events.sort(key=lambda event: (event.thread, event.time_range.start, -event.time_range.end))
    times: dict[str, StageTime] = {}
    around: list[torch.autograd.profiler_util.FunctionEvent] = []  # the ranges that hold the current one
    for event in events:
        while around and (
            around[-1].thread != event.thread or around[-1].time_range.end <= event.time_range.start
        ):
            around.pop()
        # Times of the profiler are in microseconds.
        seconds, device_seconds = event.cpu_time_total / 1e6, event.device_time_total / 1e6
        for range_, sign in ((event, 1), *((outer, -1) for outer in around[-1:])):
            name = range_.name.removeprefix(PREFIX)
            time = times.setdefault(name, StageTime(name))
            time.seconds += sign * seconds
            time.device_seconds += sign * device_seconds
        times[event.name.removeprefix(PREFIX)].calls += 1
        around.append(event)
    return list(times.values())
