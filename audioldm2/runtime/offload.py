"""Running a pipeline whose stages do not all fit on the device: each is there only while it works.

On a GPU the weights wait in page-locked ("pinned") main memory. While one stage works, the next one is copied
to the GPU. Back go only weights that changed on the device: those with a new version counter, and all of a
stage during whose work a caller's code ran (`may_have_changed`), as a write through `.data` is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Home:
    """A tensor's copy in main memory, and the tensor's version when it was copied from there."""

    copy: Tensor
    version: int


class Offload:
    """Moves stages to the device, one after the other.

    A stage stays until another one is needed, so one that is called many times (the UNet) moves once.

    Args:
        device: where stages work.
        stages: gives all of them, in the order in which they work.
    """

    def __init__(self, device: torch.device | str, stages: Callable[[], Sequence[nn.Module]]):
        self.device = torch.device(device)
        self.stages = stages
        self._working: nn.Module | None = None
        self._coming: tuple[nn.Module, torch.cuda.Event] | None = None
        self._homes: MutableMapping[Tensor, _Home] = WeakTensorKeyDictionary()
        self._changed: list[nn.Module] = []  # whose weights may differ from their copies
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def take(self, stage: nn.Module) -> None:
        """Move `stage` to the device and the one before it back, and start to copy the next one."""
        if self._working is stage:
            return
        if self._working is not None:
            self._send_home(self._working)
            self._working = None
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is stage:
            torch.cuda.current_stream(self.device).wait_event(coming[1])
        else:
            if coming is not None:
                torch.cuda.current_stream(self.device).wait_event(coming[1])
                self._send_home(coming[0])
            try:
                self._bring(stage)
            except BaseException:
                self._send_home(stage)
                raise
        self._working = stage
        self._prefetch(stage)

    def release(self) -> None:
        """Move everything that is on the device back to main memory."""
        if self._coming is not None:
            stage, event = self._coming
            self._coming = None
            torch.cuda.current_stream(self.device).wait_event(event)
            self._send_home(stage)
        if self._working is not None:
            self._send_home(self._working)
            self._working = None

    def may_have_changed(self) -> None:
        """Have all weights that are on the device copied back when they leave it."""
        coming = self._coming[0] if self._coming is not None else None
        self._changed = [stage for stage in (self._working, coming) if stage is not None]

    def _prefetch(self, stage: nn.Module) -> None:
        """Start to copy the stage that works after `stage`, in parallel with it."""
        stages = list(self.stages())
        if self._stream is None or stage not in stages[:-1]:
            return
        upcoming = stages[stages.index(stage) + 1]
        # Memory is allocated on the stream that will use it; the copy waits until it is free there.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            self._bring(upcoming, self._stream)
        except torch.OutOfMemoryError:  # no room for two stages: it is copied when it is needed
            self._send_home(upcoming)
            return
        event = torch.cuda.Event()
        event.record(self._stream)
        self._coming = (upcoming, event)

    def _bring(self, stage: nn.Module, stream: torch.cuda.Stream | None = None) -> None:
        for tensor in _tensors(stage):
            home = self._homes.get(tensor)
            # Weights may have been replaced in main memory since, by ones of another dtype for example.
            if home is None or home.copy.data_ptr() != tensor.data_ptr():
                copy = tensor.data.to("cpu")
                home = self._homes[tensor] = _Home(copy if self._stream is None else copy.pin_memory(), 0)
            on_device = torch.empty_like(home.copy, device=self.device)
            if stream is None:
                on_device.copy_(home.copy, non_blocking=True)
            else:
                with torch.cuda.stream(stream):
                    on_device.copy_(home.copy, non_blocking=True)
            tensor.data = on_device
            home.version = tensor._version

    def _send_home(self, stage: nn.Module) -> None:
        changed = any(stage is other for other in self._changed)
        self._changed = [other for other in self._changed if other is not stage]
        for tensor in _tensors(stage):
            home = self._homes.get(tensor)
            if home is None:  # added while the stage was on the device
                tensor.data = tensor.data.to("cpu")
                continue
            if tensor.data_ptr() == home.copy.data_ptr():
                continue  # it never left
            if changed or tensor._version != home.version:
                home.copy.copy_(tensor.data)
            tensor.data = home.copy


def _tensors(stage: nn.Module) -> list[Tensor]:
    return [*stage.parameters(), *stage.buffers()]
