"""What a generation returns."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import numpy as np
from torch import Tensor


class AudioPipelineOutput(tuple[Any]):
    """The result of a generation, which can be read as an object, a mapping and a tuple, as in diffusers.

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

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._mapping()[key]
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key in self._mapping()

    def keys(self) -> KeysView[str]:
        """The names of the entries."""
        return self._mapping().keys()

    def values(self) -> ValuesView[Any]:
        """The entries."""
        return self._mapping().values()

    def items(self) -> ItemsView[str, Any]:
        """The entries with their names."""
        return self._mapping().items()

    def get(self, key: str, default: Any = None) -> Any:
        """The entry of that name, or `default`."""
        return self._mapping().get(key, default)

    def to_tuple(self) -> tuple[Any]:
        """The entries as a plain tuple: `(audios,)`."""
        return (self[0],)

    def _mapping(self) -> dict[str, Any]:
        return {"audios": self[0]}

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
