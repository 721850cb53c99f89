"""Running a pipeline whose stages do not all fit on the device: each is there only while it works.

On a GPU the weights wait in page-locked ("pinned") main memory, from where they are copied while the GPU
works on something else: while one stage runs, the one after it is on its way. Nothing is copied back, as a
stage that has worked has not changed; a weight that was changed on the device all the same is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Place:
    """Where a tensor waits, and its version when it left: a higher one says that it was changed since."""

    home: Tensor
    version: int


class Offload:
    """Gives stages the device, one after the other.

    A stage stays until another one needs the place, so one that works again and again (the UNet) moves once.

    Args:
        device: where stages work.
        stages: all that will, in the order in which they do.
    """

    def __init__(self, device: torch.device | str, stages: Sequence[nn.Module]):
        self.device = torch.device(device)
        self.stages = list(stages)
        self._working: nn.Module | None = None
        self._coming: tuple[nn.Module, torch.cuda.Event] | None = None
        self._places: dict[Tensor, _Place] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def take(self, stage: nn.Module) -> None:
        """Have `stage` on the device, the one that was there before at home, and the next one on its way."""
        if self._working is stage:
            return
        if self._working is not None:
            self._send_home(self._working)
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is stage:
            torch.cuda.current_stream(self.device).wait_event(coming[1])
        else:
            if coming is not None:
                torch.cuda.current_stream(self.device).wait_event(coming[1])
                self._send_home(coming[0])
            self._bring(stage)
        self._working = stage
        self._prefetch(stage)

    def release(self) -> None:
        """Send all that is on the device home."""
        if self._coming is not None:
            stage, event = self._coming
            self._coming = None
            torch.cuda.current_stream(self.device).wait_event(event)
            self._send_home(stage)
        if self._working is not None:
            self._send_home(self._working)
            self._working = None

    def _prefetch(self, stage: nn.Module) -> None:
        """Begin to copy the stage that works after `stage`, beside the work."""
        if self._stream is None or stage not in self.stages[:-1]:
            return
        upcoming = self.stages[self.stages.index(stage) + 1]
        # The memory is taken on the stream that will use it; the copy waits until it is free there.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._bring(upcoming, self._stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        self._coming = (upcoming, event)

    def _bring(self, stage: nn.Module, stream: torch.cuda.Stream | None = None) -> None:
        for tensor in _tensors(stage):
            place = self._places.get(tensor)
            # Weights that were replaced at home (another dtype, say) are not those that were noted.
            if place is None or place.home.data_ptr() != tensor.data_ptr():
                home = tensor.data.to("cpu")
                if self._stream is not None:
                    home = home.pin_memory()
                place = self._places[tensor] = _Place(home, 0)
            there = torch.empty_like(place.home, device=self.device)
            if stream is None:
                there.copy_(place.home, non_blocking=True)
            else:
                with torch.cuda.stream(stream):
                    there.copy_(place.home, non_blocking=True)
            tensor.data = there
            place.version = tensor._version

    def _send_home(self, stage: nn.Module) -> None:
        for tensor in _tensors(stage):
            place = self._places.get(tensor)
            if place is None:  # it came to be while the stage was at work
                tensor.data = tensor.data.to("cpu")
                continue
            if tensor._version != place.version:
                place.home.copy_(tensor.data)
            tensor.data = place.home


def _tensors(stage: nn.Module) -> list[Tensor]:
    return [*stage.parameters(), *stage.buffers()]
