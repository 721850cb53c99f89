"""`--profile`: a trace of a generation for a trace viewer, and a table of its time by stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from audioldm2.atomic import replacing

if TYPE_CHECKING:
    from torch.profiler import profile

    from audioldm2.runtime.profiling import StageTime

SUFFIXES = (".json", ".json.gz")


def check_trace_name(path: str) -> None:
    """Raise ValueError unless the suffix is one of a Chrome trace."""
    if not path.lower().endswith(SUFFIXES):
        raise ValueError(f"a trace is a .json or .json.gz file, got {Path(path).name!r}")


class Profile:
    """A profile of what runs in the block of `recording`; to be created before PyTorch is imported."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
        self._profiler: profile | None = None
        self.seconds = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the block, on the CPU and on GPUs."""
        from torch.profiler import profile

        with profile() as self._profiler:
            start = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - start

    def save(self, path: str) -> list[str]:
        """Write the trace; it is either complete or not there.

        Args:
            path: of the file, .json or .json.gz.

        Returns:
            The lines of the table of times.

        Raises:
            OSError: the file cannot be written.
        """
        from audioldm2.runtime.profiling import stage_times

        assert self._profiler is not None, "nothing was recorded"
        with replacing(path) as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        return table(stage_times(self._profiler), self.seconds)


def table(stages: Sequence[StageTime], total: float) -> list[str]:
    """The lines of a table: time and share by stage, and what ran outside them.

    With a GPU, the host only starts its work and runs ahead of it: the shares are those of the GPU's time.

    Args:
        stages: their times.
        total: seconds of the whole generation.
    """
    on_device = sum(stage.device_seconds for stage in stages)
    rows = [(stage.name, str(stage.calls), stage.seconds, stage.device_seconds) for stage in stages]
    rows.append(("other", "", max(total - sum(stage.seconds for stage in stages), 0.0), 0.0))
    rows.append(("total", "", total, on_device))
    lines = [f"{'stage':<16} {'calls':>5} {'seconds':>9}{' on the GPU' if on_device else ''}  share"]
    for name, calls, seconds, device_seconds in rows:
        part, whole = (device_seconds, on_device) if on_device else (seconds, total)
        device = f" {device_seconds:>10.3f}" if on_device else ""
        lines.append(f"{name:<16} {calls:>5} {seconds:>9.3f}{device} {part / whole:>6.1%}")
    return lines
