"""What calls return: `Output`, which is an object, a mapping and a tuple at once, and the pipeline's."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any, ClassVar

import numpy as np
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


class AudioPipelineOutput(Output):
    """The result of a generation: the output `(audios,)`, and attributes that describe it.

    Args:
        audios: B waveforms, (B, samples) in [-1, 1], or latents if those were asked for.
        sampling_rate: of the waveforms, in Hz.
        scores: CLAP's scores of the waveforms, (B,); None if they were not ranked.

    Example:
        >>> output = pipe("A dog barks")
        >>> output.audios is output["audios"] is output[0]
        True
        >>> write_wav("dog.wav", output.audios[0], output.sampling_rate)
    """

    names: ClassVar[tuple[str, ...]] = ("audios",)
    sampling_rate: int
    scores: Tensor | np.ndarray[Any, Any] | None

    def __new__(
        cls, audios: Any, sampling_rate: int = 16000, scores: Tensor | np.ndarray[Any, Any] | None = None
    ) -> AudioPipelineOutput:
        output = super().__new__(cls, (audios,))
        output.sampling_rate = sampling_rate
        output.scores = scores
        return output

    @property
    def audios(self) -> Any:
        """The waveforms, (B, samples), or latents."""
        return self[0]

    def __repr__(self) -> str:
        audios = self.audios
        what = (
            f"{type(audios).__name__} of shape {tuple(audios.shape)}" if hasattr(audios, "shape") else audios
        )
        return (
            f"{type(self).__name__}(audios={what}, sampling_rate={self.sampling_rate}, scores={self.scores})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.audios, self.sampling_rate, self.scores)


Mapping.register(AudioPipelineOutput)
