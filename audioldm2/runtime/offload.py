"""Running a pipeline whose stages do not all fit on the device: each is there only while it works."""

from __future__ import annotations

import torch
from torch import nn


class Offload:
    """Gives stages the device, one after the other.

    A stage stays until another one needs the place, so one that works again and again (the UNet) moves once.

    Args:
        device: where stages work.
        home: where they wait.
    """

    def __init__(self, device: torch.device | str, home: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.home = torch.device(home)
        self._working: nn.Module | None = None

    def take(self, stage: nn.Module) -> None:
        """Have `stage` on the device, and the one that was there before at home."""
        if self._working is not stage:
            self.release()
            stage.to(self.device)
            self._working = stage

    def release(self) -> None:
        """Send the stage that is on the device home."""
        if self._working is not None:
            self._working.to(self.home)
            self._working = None
