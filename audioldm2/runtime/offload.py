"""Model offload: running a pipeline whose stages do not all fit on the device, each there only while it runs.

With a GPU, the weights wait in pinned CPU memory, and the next stage is copied to the GPU while the current
one runs. Weights are copied back only if they changed on the device. Changes are noticed by the weights'
version counters. Writes through `.data` are not counted, so after a caller's code has run, all weights on the
device are copied back (`may_have_changed`).
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
    """A tensor's copy in CPU memory, and the tensor's version when it was last copied to the device."""

    copy: Tensor
    version: int | None


class Offload:
    """Moves stages to the device, one after the other.

    A stage stays until another one is needed, so one that is called many times (the UNet) moves once. Weights
    are referenced weakly, so those of a stage that the caller replaces are freed.

    Args:
        device: where stages run.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._working: nn.Module | None = None
        self._coming: tuple[nn.Module, torch.cuda.Event] | None = None
        self._homes: MutableMapping[Tensor, _Home] = WeakTensorKeyDictionary()
        self._changed: set[nn.Module] = set()  # stages on the device whose weights may have changed
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def take(self, stage: nn.Module, upcoming: nn.Module | None = None) -> None:
        """Move `stage` to the device, and the previous one back to the CPU.

        Args:
            stage: the stage that runs now.
            upcoming: the stage that runs next, which is prefetched if the device is a GPU.
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
        """Move everything that is on the device back to the CPU."""
        if self._coming is not None:
            (stage, event), self._coming = self._coming, None
            torch.cuda.current_stream(self.device).wait_event(event)
            self._send_home(stage)
        if self._working is not None:
            self._send_home(self._working)
            self._working = None

    def may_have_changed(self) -> None:
        """Mark all weights that are on the device to be copied back when they leave it."""
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
        """Copy a stage to the device. If that fails, such as for lack of memory, none of it stays there."""
        brought = []
        try:
            for tensor in _tensors(stage):
                home = self._homes.get(tensor)
                # The weights may have been replaced since then, for example with ones of another dtype.
                if home is None or not _same_memory(home.copy, tensor):
                    home = self._homes[tensor] = _Home(self._on_cpu(tensor), None)
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
                home.copy = self._on_cpu(tensor)
            elif changed or home.version is None or _version(tensor) != home.version:
                with torch.inference_mode():  # copies made in this mode can only be written in it
                    home.copy.copy_(tensor.data)
            tensor.data = home.copy

    def _on_cpu(self, tensor: Tensor) -> Tensor:
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
