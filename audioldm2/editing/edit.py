"""What a caller asks for in sound-to-sound generation, checked, and how a sampling run begins with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from audioldm2.arguments import MAX_LENGTH_IN_S
from audioldm2.audio.log_mel import LogMelConfig
from audioldm2.editing.checks import check_edit, strength_of
from audioldm2.editing.inpainting import keeping, mixed
from audioldm2.editing.regions import Regions, check_bands, check_inside, regions
from audioldm2.editing.sound import Recording, at_rate, recordings
from audioldm2.editing.variation import first_step, noisy
from audioldm2.sampling import Around


@dataclass(frozen=True)
class Edit:
    """A caller's sounds and what to do with them.

    Attributes:
        sounds: one, or one for each prompt.
        strength: from 0 (the sounds) to 1 (only the prompt).
        regions: what is replaced; None if nothing is kept.
        spans: the spans in seconds as they were given, with their argument's name; None if there are none.
        extend: seconds to add at the end; None if the length stays.
        loop: whether the result is to repeat without a seam.
    """

    sounds: Sequence[Recording]
    strength: float
    regions: Regions | None
    spans: tuple[str, Any] | None
    extend: float | None = None
    loop: bool = False

    def waveforms(self, log_mel: LogMelConfig, seconds: float | None, shortest: float) -> Tensor:
        """The sounds at the checkpoint's rate, (B, samples).

        Args:
            log_mel: of the checkpoint.
            seconds: to cut or pad them to; None is their own length.
            shortest: the length in seconds that a sound must have.

        Raises:
            ValueError: a sound is too short or too long, lengths differ, or a region lies outside.
        """
        rate = log_mel.sampling_rate
        if self.extend is None:
            waveforms = at_rate(self.sounds, rate, seconds, shortest)
        else:
            waveforms = at_rate(self.sounds, rate, None, shortest, "extend them one by one")
        if self.spans is not None:
            check_inside(*self.spans, waveforms.shape[1] / rate)
        if self.regions is not None:
            check_bands(self.regions.bands, log_mel)
        return waveforms

    def samples(self, known: int, samples_per_row: int, sampling_rate: int) -> int:
        """The length of the result in samples; a loop's is a whole number of latents.

        Args:
            known: the length of the sounds, in samples.
            samples_per_row: hop length times the VAE's factor.
            sampling_rate: in Hz.

        Raises:
            ValueError: `extend` makes it too long.
        """
        if self.extend is None:
            return known // samples_per_row * samples_per_row if self.loop else known
        samples = known + max(int(self.extend * sampling_rate), 1)
        if samples > MAX_LENGTH_IN_S * sampling_rate:
            raise ValueError(
                f"extend = {self.extend:g} makes a sound of {samples / sampling_rate:.5g} s; the limit is "
                f"{MAX_LENGTH_IN_S:g} s"
            )
        return -(-samples // samples_per_row) * samples_per_row if self.loop else samples

    def replaced_latents(self, clean: Tensor, samples_per_row: int, log_mel: LogMelConfig) -> Tensor | None:
        """Which latents are generated, (T/4, F/4), bool; None if all are.

        Args:
            clean: the sounds' latents, (B, channels, T/4, F/4).
            samples_per_row: hop length times the VAE's factor.
            log_mel: of the checkpoint.
        """
        if self.regions is None:
            return None
        return self.regions.latents(clean.shape[2], samples_per_row, log_mel, clean.shape[3]).to(clean.device)

    def mix(self, originals: Tensor, generated: Tensor, sampling_rate: int) -> Tensor:
        """Put the originals back where they are kept.

        Args:
            originals: (B, samples), without what is added at the end.
            generated: (B, samples), with it.
            sampling_rate: of both, in Hz.
        """
        known, regions = originals.shape[1], self.regions
        if self.extend is not None:
            regions = Regions(((known / sampling_rate, math.inf),))
            originals = F.pad(originals, (0, generated.shape[1] - known))
        if regions is None:
            return generated
        return mixed(originals, generated, regions, sampling_rate, self.loop)


class Start(NamedTuple):
    """How a sampling run begins.

    Attributes:
        latents: (B, channels, T/4, F/4), at the noise level of the first step.
        begin: the first step.
        after_update: see `denoise`; None if nothing is kept.
        around: see `denoise`.
        scheduler: the sampler of this run, if it is not the generation's.
    """

    latents: Tensor
    begin: int = 0
    after_update: Callable[[int, Tensor], Tensor] | None = None
    around: Around | None = None
    scheduler: Any = None


def edit_of(
    audio: Any,
    sampling_rate: Any,
    strength: Any,
    keep: Any,
    replace: Any,
    replace_band: Any,
    extend: Any = None,
    loop: bool = False,
    audio_length_in_s: Any = None,
    latents: Any = None,
) -> Edit | None:
    """Check the arguments of the pipeline that go with a sound; None if there is no sound.

    Raises:
        ImportError: a file needs soundfile, which cannot be imported.
        OSError: a file cannot be read.
        TypeError, ValueError: an argument that cannot be used; the message names it.
    """
    others = {
        "sampling_rate": sampling_rate,
        "strength": strength,
        "keep": keep,
        "replace": replace,
        "replace_band": replace_band,
        "extend": extend,
    }
    check_edit(
        audio is not None, {**others, "audio_length_in_s": audio_length_in_s, "latents": latents}, loop
    )
    if audio is None:
        return None
    asked = regions(keep, replace, replace_band)
    spans = next(((name, others[name]) for name in ("keep", "replace") if others[name] is not None), None)
    extend = None if extend is None else float(extend)
    return Edit(recordings(audio, sampling_rate), strength_of(others), asked, spans, extend, loop)


def for_each_waveform(sounds: Tensor, batch: int, waveforms: int) -> Tensor:
    """A caller's sounds, one or one for each prompt, as one for each waveform that is generated.

    Args:
        sounds: (1, ...) or (prompts, ...).
        batch: prompts times `waveforms`.
        waveforms: candidates per prompt.

    Raises:
        ValueError: there are as many sounds as neither.
    """
    prompts = batch // waveforms
    if len(sounds) not in (1, prompts):
        raise ValueError(f"audio has {len(sounds)} sounds for {prompts} prompts; pass one, or one per prompt")
    return sounds.repeat_interleave(batch // len(sounds), dim=0)


def begin_with(
    scheduler: Any,
    num_inference_steps: int,
    clean: Tensor,
    noise: Tensor,
    strength: float,
    replaced: Tensor | None,
) -> Start:
    """Begin a sampling run with a sound.

    Args:
        scheduler: the sampler, after `set_timesteps`.
        num_inference_steps: what `set_timesteps` was called with.
        clean: the sound's latents, (B, channels, T/4, F/4).
        noise: of the same shape.
        strength: see `first_step`.
        replaced: which latents are not kept, (T/4, F/4), bool; None if all are generated.

    Raises:
        ValueError: the sampler has no method `add_noise`.
    """
    if not callable(getattr(scheduler, "add_noise", None)):
        raise ValueError(f"audio needs a scheduler with add_noise, which {type(scheduler).__name__} has not")
    begin = first_step(num_inference_steps, strength)
    index = begin * getattr(scheduler, "order", 1)
    if begin == num_inference_steps:
        return Start(clean, begin)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    latents = noise * scheduler.init_noise_sigma if begin == 0 else noisy(scheduler, clean, noise, index)
    return Start(latents, begin, None if replaced is None else keeping(scheduler, clean, noise, replaced))
