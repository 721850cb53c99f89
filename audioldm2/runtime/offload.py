"""Running a pipeline whose stages do not all fit on the device: each is there only while it works.

On a GPU the weights wait in page-locked ("pinned") main memory. While one stage works, the next one is copied
to the GPU. Weights are copied back only if they changed on the device. A change is noticed by the weight's
version counter; writes through `.data` are not counted, so all weights on the device are copied back after a
caller's code ran (`may_have_changed`).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Home:
    """A tensor's copy in main memory, and the tensor's version when it was last copied to the device."""

    copy: Tensor
    version: int | None


class Offload:
    """Moves stages to the device, one after the other.

    A stage stays until another one is needed, so one that is called many times (the UNet) moves once. Stages
    are not held here: one that the caller replaces is freed.

    Args:
        device: where stages work.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._working: nn.Module | None = None
        self._coming: tuple[nn.Module, torch.cuda.Event] | None = None
        self._homes: MutableMapping[Tensor, _Home] = WeakTensorKeyDictionary()
        self._changed: set[nn.Module] = set()  # stages on the device whose weights may have changed
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def take(self, stage: nn.Module, upcoming: nn.Module | None = None) -> None:
        """Move `stage` to the device and the one before it back to main memory.

        Args:
            stage: the stage that works now.
            upcoming: the stage that works after it, which a GPU copies in the meantime.
        """
        if self._working is stage:
            return
        if self._working is not None:
            self._send_home(self._working)
            self._working = None
        coming, self._coming = self._coming, None
        if coming is not None:
            torch.cuda.current_stream(self.device).wait_event(coming[1])
            if coming[0] is not stage:
                self._send_home(coming[0])
        if coming is None or coming[0] is not stage:
            self._bring(stage)
        self._working = stage
        if upcoming is not None and upcoming is not stage and self._stream is not None:
            with suppress(torch.OutOfMemoryError):  # without room for two stages it is copied when needed
                self._coming = (upcoming, self._prefetch(upcoming, self._stream))

    def release(self) -> None:
        """Move everything that is on the device back to main memory."""
        if self._coming is not None:
            (stage, event), self._coming = self._coming, None
            torch.cuda.current_stream(self.device).wait_event(event)
            self._send_home(stage)
        if self._working is not None:
            self._send_home(self._working)
            self._working = None

    def may_have_changed(self) -> None:
        """Have all weights that are on the device now copied back when they leave it."""
        if self._working is not None:
            self._changed.add(self._working)
        if self._coming is not None:
            self._changed.add(self._coming[0])

    def _prefetch(self, stage: nn.Module, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Start to copy a stage to the device; the event says when it is there."""
        # Memory is allocated on the stream that will use it; the copy waits until it is free there.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._bring(stage, stream)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def _bring(self, stage: nn.Module, stream: torch.cuda.Stream | None = None) -> None:
        """Copy a stage to the device; if that fails, for lack of memory say, none of it stays there."""
        brought = []
        try:
            for tensor in _tensors(stage):
                home = self._homes.get(tensor)
                # Weights may have been replaced in main memory since, for example by ones of another dtype.
                if home is None or not _same_memory(home.copy, tensor):
                    home = self._homes[tensor] = _Home(self._in_main_memory(tensor), None)
                on_device = torch.empty_like(home.copy, device=self.device)
                if stream is None:
                    on_device.copy_(home.copy, non_blocking=True)
                else:
                    with torch.cuda.stream(stream):
                        on_device.copy_(home.copy, non_blocking=True)
                tensor.data = on_device
                home.version = _version(tensor)
                brought.append(tensor)
        except BaseException:
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
            for tensor in brought:
                tensor.data = self._homes[tensor].copy
            raise

    def _send_home(self, stage: nn.Module) -> None:
        changed = stage in self._changed
        self._changed.discard(stage)
        for tensor in _tensors(stage):
            home = self._homes.get(tensor)
            if home is None:  # added while the stage was on the device
                tensor.data = tensor.data.to("cpu")
                continue
            if (home.copy.shape, home.copy.dtype) != (tensor.shape, tensor.dtype):
                home.copy = self._in_main_memory(tensor)
            elif changed or home.version is None or _version(tensor) != home.version:
                with torch.inference_mode():  # in which alone copies made in this mode can be written
                    home.copy.copy_(tensor.data)
            tensor.data = home.copy

    def _in_main_memory(self, tensor: Tensor) -> Tensor:
        copy = tensor.data.to("cpu")
        return copy if self._stream is None else copy.pin_memory()


def _tensors(stage: nn.Module) -> list[Tensor]:
    return [*stage.parameters(), *stage.buffers()]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    layouts = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (one, other)]
    return layouts[0] == layouts[1]


def _version(tensor: Tensor) -> int | None:
    """A tensor's version counter; None if it was made in inference mode and does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None
