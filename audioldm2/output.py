"""What a generation returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from audioldm2.schedulers.output import Output


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

    def _repr_html_(self) -> str:
        """Players and plots of the sounds, in a notebook."""
        from audioldm2.notebook import output_html  # only now, as it imports all of plots

        return output_html(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.audios, self.sampling_rate, self.scores)


Mapping.register(AudioPipelineOutput)
