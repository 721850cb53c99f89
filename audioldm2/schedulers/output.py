"""What a sampler's `step` returns: an object, a mapping and a tuple at once, as in diffusers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from audioldm2.output import Output


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
