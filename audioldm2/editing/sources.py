"""What a generation begins with: noise, sounds, the end of sounds that are continued, or inverted sounds.

`AudioLDM2Pipeline.__call__` asks each of them the same: how long the result is, how the sampling run begins,
and what of the result is put back from the original.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from audioldm2.audio.log_mel import LogMelConfig
from audioldm2.decoding import frames_and_samples
from audioldm2.editing.edit import Edit, Start, begin_with, edit_of, for_each_waveform
from audioldm2.editing.extending import Extension
from audioldm2.editing.inversion import Inverted, check_inverted
from audioldm2.noise import Generators, check_generators
from audioldm2.sampling import Around, initial_noise, set_timesteps
from audioldm2.tensors import check_tensor
from audioldm2.windows import around_predictor, window_rows

Denoise = Callable[[Start], Tensor]


class Encoder(Protocol):
    """What sources need from a pipeline."""

    unet: Any

    @property
    def device(self) -> torch.device: ...

    def part(self, name: str) -> Any: ...

    def encode_audio(self, audio: Tensor, sampling_rate: int, loop: bool = False) -> Tensor: ...

    def log_mel_config(self) -> LogMelConfig: ...


@dataclass(frozen=True)
class Sampling:
    """What the sampling runs of a generation share.

    Attributes:
        scheduler: the sampler, after `set_timesteps`.
        steps: the number of sampling steps.
        timesteps: chosen by the caller; None for the sampler's own.
        batch: B, the number of waveforms.
        waveforms: how many of them belong to each prompt.
        generator: draws the noise.
        device: of the latents.
        encoder_dtype: of the encoded prompts.
    """

    scheduler: Any
    steps: int
    timesteps: Sequence[int] | None
    batch: int
    waveforms: int
    generator: Generators
    device: torch.device
    encoder_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents between the steps, at least float32."""
        return torch.promote_types(self.encoder_dtype, torch.float32)

    def noise(self, shape: Sequence[int], latents: Tensor | None = None) -> Tensor:
        """Draw noise of a shape, or take `latents` for it.

        It is drawn in the encoders' dtype, as in diffusers; in half precision, a seed has other numbers.
        """
        dtype = self.encoder_dtype if latents is None else self.dtype
        return initial_noise(shape, self.generator, self.device, dtype, latents).to(self.dtype)


def latent_samples(pipe: Encoder) -> int:
    """The samples of a row of latents."""
    samples: int = pipe.part("vae").downsampling * pipe.part("vocoder").hop_length
    return samples


def window_of(pipe: Encoder, window: float | None) -> int | None:
    """A caller's window, in seconds, as rows of latents; None is none.

    Raises:
        ValueError: it cannot be used.
    """
    rate = pipe.part("vocoder").config.sampling_rate
    return None if window is None else window_rows(pipe.unet, window, latent_samples(pipe) / rate)


def prompts_for(sounds: int, prompt: Any) -> Any:
    """The caller's prompts; a single one is for each of several sounds."""
    return [prompt] * sounds if isinstance(prompt, str) else prompt


def encoded_for_each(
    pipe: Encoder, waveforms: Tensor, batch: int, count: int, loop: bool = False
) -> tuple[Tensor, Tensor]:
    """Sounds and their latents for each waveform that is generated. Each sound is encoded once.

    Args:
        pipe: encodes them.
        waveforms: one, or one for each prompt, (B, samples), at the checkpoint's rate.
        batch: prompts times `count`.
        count: candidates per prompt.
        loop: see `encode_audio`.

    Returns:
        (batch, samples) and (batch, channels, T/4, F/4).

    Raises:
        ValueError: the number of sounds is neither 1 nor that of the prompts.
    """
    each = for_each_waveform(waveforms, batch, count)
    clean = pipe.encode_audio(waveforms, pipe.part("vocoder").config.sampling_rate, loop)
    return each, for_each_waveform(clean, batch, count)


class Source(ABC):
    """What a generation begins with.

    Attributes:
        samples: the length of the result.
        around: what wraps the predictor; see `denoise`.
    """

    samples: int
    around: Around | None

    def prompts(self, prompt: Any) -> Any:
        """The caller's prompts; a single one is for each of several sounds."""
        return prompt

    def steps(self, asked: int | None, scheduler: Any) -> int:
        """The number of steps: what was asked for, or what the sampler needs."""
        return int(getattr(scheduler, "default_num_inference_steps", 200) if asked is None else asked)

    def total(self, start: Start, steps: int) -> int:
        """The number of steps in all sampling runs."""
        return steps - start.begin

    @abstractmethod
    def begin(self, run: Sampling) -> Start:
        """How the sampling run begins."""

    def generate(self, run: Sampling, start: Start, denoise: Denoise, stopped: Callable[[], bool]) -> Tensor:
        """The latents of the result, (B, channels, T/4, F/4).

        Args:
            run: what the sampling runs share.
            start: from `begin`.
            denoise: takes a sampling run.
            stopped: whether a callback ended it.
        """
        return denoise(start)

    def finish(self, audio: Tensor) -> Tensor:
        """The result with what is kept of the original, both (B, samples)."""
        return audio


class Noise(Source):
    """Text alone: the run begins with noise, or with the caller's `latents`."""

    def __init__(
        self, pipe: Encoder, latents: Tensor | None, seconds: float | None, window: int | None, loop: bool
    ):
        vae, vocoder = pipe.part("vae"), pipe.part("vocoder")
        given = None if latents is None else latents.shape[2]
        frames, samples = frames_and_samples(pipe.unet, vae, vocoder, seconds, given)
        self.samples = frames * vocoder.hop_length if loop else samples
        self.around = around_predictor(window, loop)
        self._latents = latents
        self._shape = (
            vae.config.latent_channels,
            frames // vae.downsampling,
            vocoder.config.model_in_dim // vae.downsampling,
        )

    def begin(self, run: Sampling) -> Start:
        noise = run.noise((run.batch, *self._shape), self._latents)
        return Start(noise * run.scheduler.init_noise_sigma, around=self.around)


class Sounds(Source):
    """Sounds that are varied, or of which parts are replaced."""

    def __init__(
        self,
        pipe: Encoder,
        edit: Edit,
        latents: Tensor | None,
        seconds: float | None,
        window: int | None,
    ):
        self._pipe, self._edit, self._latents = pipe, edit, latents
        self._rate, self._row = pipe.part("vocoder").config.sampling_rate, latent_samples(pipe)
        self._log_mel = pipe.log_mel_config()
        originals = edit.waveforms(self._log_mel, seconds, shortest=self._row / self._rate)
        self.samples = edit.samples(originals.shape[1], self._row, self._rate)
        self._originals = originals[:, : self.samples]
        self.around = around_predictor(window, edit.loop)

    def prompts(self, prompt: Any) -> Any:
        return prompts_for(len(self._originals), prompt)

    def encoded(self, run: Sampling, loop: bool) -> Tensor:
        """The sounds' latents for each waveform, (B, channels, T/4, F/4)."""
        self._originals, clean = encoded_for_each(self._pipe, self._originals, run.batch, run.waveforms, loop)
        return clean.to(run.device, run.dtype)

    def begin(self, run: Sampling) -> Start:
        clean = self.encoded(run, self._edit.loop)
        noise = run.noise(clean.shape, self._latents)
        replaced = self._edit.replaced_latents(clean, self._row, self._log_mel)
        start = begin_with(run.scheduler, run.steps, clean, noise, self._edit.strength, replaced)
        return start._replace(around=self.around)

    def finish(self, audio: Tensor) -> Tensor:
        return self._edit.mix(self._originals, audio, self._rate)


class Continued(Sounds):
    """Sounds that are continued past their end, with a sampling run for each window."""

    def __init__(self, pipe: Encoder, edit: Edit, window: int | None):
        super().__init__(pipe, edit, None, None, None)
        window = window or window_rows(pipe.unet, None, self._row / self._rate)
        rows = -(-self.samples // self._row)
        self._extension = Extension(self._originals.shape[1] // self._row, rows, window, edit.loop)
        self.around = self._extension.around()

    def total(self, start: Start, steps: int) -> int:
        return steps * len(self._extension.windows)

    def begin(self, run: Sampling) -> Start:
        return Start(self.encoded(run, loop=False)[:, :, : self._extension.known])

    def generate(self, run: Sampling, start: Start, denoise: Denoise, stopped: Callable[[], bool]) -> Tensor:
        def window(clean: Tensor, replaced: Tensor) -> Tensor:
            set_timesteps(run.scheduler, run.steps, run.timesteps, run.device)
            begin = begin_with(run.scheduler, run.steps, clean, run.noise(clean.shape), 1.0, replaced)
            return denoise(begin._replace(around=self.around))

        return self._extension.run(start.latents, window, stopped)


class InvertedSounds(Source):
    """Sounds that `pipe.invert` has inverted."""

    def __init__(self, pipe: Encoder, inverted: Inverted, skip: float, window: int | None):
        self._unet, self._inverted, self._skip = pipe.unet, inverted, skip
        self.samples = inverted.samples
        self.around = around_predictor(window, loop=False)

    def prompts(self, prompt: Any) -> Any:
        return prompts_for(self._inverted.sounds, prompt)

    def steps(self, asked: int | None, scheduler: Any) -> int:
        return len(self._inverted.timesteps)

    def begin(self, run: Sampling) -> Start:
        self._inverted.check_batch(run.batch, self._unet)
        check_generators(run.generator, run.batch)
        sampler, start = self._inverted.run(run.scheduler, self._skip, run.device)
        return start._replace(scheduler=sampler, around=self.around)


def source_of(
    pipe: Encoder,
    *,
    latents: Tensor | None,
    audio_length_in_s: float | None,
    window: float | None,
    loop: bool,
    inverted: Any,
    skip: Any,
    num_waveforms_per_prompt: int,
    audio: Any,
    sampling_rate: Any,
    strength: Any,
    keep: Any,
    replace: Any,
    replace_band: Any,
    extend: Any,
    **others: Any,
) -> Source:
    """What a generation begins with, by the arguments of `AudioLDM2Pipeline.__call__`.

    Args:
        pipe: the pipeline.
        others: arguments that an inversion settles; they must be None if there is one.

    Raises:
        ImportError: a sound file needs soundfile, which cannot be imported.
        OSError: a sound file cannot be read.
        TypeError, ValueError: an argument that cannot be used; the message names it.
    """
    if latents is not None:
        check_tensor("latents", latents, "(B, channels, T/4, F/4)")
    lengths: dict[str, Any] = {"audio_length_in_s": audio_length_in_s, "latents": latents}
    edits = {
        "audio": audio,
        "sampling_rate": sampling_rate,
        "strength": strength,
        "keep": keep,
        "replace": replace,
        "replace_band": replace_band,
        "extend": extend,
    }
    settled = {**edits, **lengths, **others, "loop": loop or None}
    share = check_inverted(inverted, skip, num_waveforms_per_prompt, settled)
    rows = window_of(pipe, window)
    if share is not None:
        return InvertedSounds(pipe, inverted, share, rows)
    edit = edit_of(**edits, **lengths, loop=loop)
    if edit is None:
        return Noise(pipe, latents, audio_length_in_s, rows, loop)
    if edit.extend is None:
        return Sounds(pipe, edit, latents, audio_length_in_s, rows)
    return Continued(pipe, edit, rows)
