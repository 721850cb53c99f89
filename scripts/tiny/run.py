"""The settings of a training of the tiny checkpoint, which all of its stages read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from audioldm2.training import loop


@dataclass(frozen=True)
class Run(loop.Run):
    """Where and how the tiny checkpoint is trained.

    Args:
        batch: examples per step; None is each stage's own number.
        compile: compile the UNet first, which takes minutes and makes its steps a fifth faster.
        begin: a folder in the Hub's layout with the UNet to start from; None starts from random weights.
    """

    batch: int | None = None
    compile: bool = False
    begin: Path | None = None

    def batch_or(self, default: int) -> int:
        """The number of examples per step, `default` unless the run sets one."""
        return default if self.batch is None else self.batch

    @property
    def checkpoint(self) -> Path:
        """Where the trained parts are written, in the Hub's layout."""
        return self.folder / "checkpoint"
