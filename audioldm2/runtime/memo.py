"""Results that are kept between calls, for as long as what made them has not changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from torch import nn

Value = TypeVar("Value")


class Memo(Generic[Value]):
    """The last `size` results, by key."""

    def __init__(self, size: int):
        self.size = size
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: Hashable, value: Value) -> Value:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return value

    def clear(self) -> None:
        self._kept.clear()


def marks(stages: Iterable[nn.Module]) -> tuple[Hashable, ...]:
    """What changes when a stage does: another stage or parameter, a parameter that was written to (a training
    step, a loaded state dict) or turned into another dtype, a hook that was put on or taken off.

    A stage that is changed by other means (a method that is replaced, `parameter.data` that is written to)
    cannot be told from the one it was.
    """
    found: list[Hashable] = []
    for stage in stages:
        for module in stage.modules():
            found.append((id(module), *module._forward_hooks, *module._forward_pre_hooks))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    # One that was made in inference mode does not tell: nothing is equal to what it was.
                    version = object() if tensor.is_inference() else tensor._version
                    found.append((id(tensor), version, tensor.dtype))
    return tuple(found)
