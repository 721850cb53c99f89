"""What a sampler's `step` returns: an object, a mapping and a tuple at once, as in diffusers.

The pipeline's output (`audioldm2.output`) has the same base class.
"""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, ClassVar

from torch import Tensor


class Output(tuple[Any, ...]):
    """Named values that can be read as attributes, as a mapping and as a tuple, as in diffusers.

    A subclass adds a property for each name.

    Attributes:
        names: the names of the values, in order.
    """

    names: ClassVar[tuple[str, ...]]

    def __getitem__(self, key: Any) -> Any:
        return self._mapping()[key] if isinstance(key, str) else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self.names

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._mapping().keys()

    def values(self) -> ValuesView[Any]:
        """The values."""
        return self._mapping().values()

    def items(self) -> ItemsView[str, Any]:
        """The names with their values."""
        return self._mapping().items()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of that name, or `default`."""
        return self._mapping().get(key, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values as a plain tuple."""
        return tuple(self)

    def _mapping(self) -> dict[str, Any]:
        return dict(zip(self.names, self, strict=True))


class SchedulerOutput(Output):
    """The tensors that a step returns.

    Example:
        >>> output = scheduler.step(noise, t, sample)
        >>> output.prev_sample is output["prev_sample"] is output[0]
        True
    """

    names: ClassVar[tuple[str, ...]] = ("prev_sample",)

    def __new__(cls, *tensors: Tensor) -> SchedulerOutput:
        if len(tensors) != len(cls.names):
            raise TypeError(f"{cls.__name__} takes {', '.join(cls.names)}, got {len(tensors)} tensors")
        return super().__new__(cls, tensors)

    @property
    def prev_sample(self) -> Tensor:
        """The sample at the next noise level, (B, C, ...)."""
        tensor: Tensor = self[0]
        return tensor

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in self.items())})"
