"""What a sampler's `step` returns: an object, a mapping and a tuple at once, as in diffusers."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, ClassVar

from torch import Tensor


class SchedulerOutput(tuple[Any, ...]):
    """The tensors that a step returns.

    Attributes:
        names: their names, in order.

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

    def __getitem__(self, key: Any) -> Any:
        return self._mapping()[key] if isinstance(key, str) else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def keys(self) -> KeysView[str]:
        """The names of the tensors."""
        return self._mapping().keys()

    def values(self) -> ValuesView[Tensor]:
        """The tensors."""
        return self._mapping().values()

    def items(self) -> ItemsView[str, Tensor]:
        """The tensors with their names."""
        return self._mapping().items()

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The tensors as a plain tuple."""
        return tuple(self)

    def _mapping(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self, strict=True))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={x!r}' for name, x in self.items())})"
