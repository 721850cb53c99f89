"""`EditingMethods`, the base class with which a pipeline inverts sounds and blends prompts."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2.arguments import check_choice, check_count, check_number
from audioldm2.audio.log_mel import LogMelConfig
from audioldm2.blending import Blend, as_blends, blended, blended_tokens, padded
from audioldm2.compatibility import DiffusersMethods
from audioldm2.conditioning import PromptInputs, Text, condition, speaks
from audioldm2.editing.inversion import (
    DDIM_EVALUATIONS,
    METHODS,
    Inverted,
    guided_predictor,
    inversion_sampler,
    invert,
)
from audioldm2.editing.sound import Audio, at_rate, recordings
from audioldm2.editing.sources import encoded_for_each, latent_samples, prompts_for, window_of
from audioldm2.noise import Generators, check_generators
from audioldm2.quoting import quoted
from audioldm2.tensors import check_finite
from audioldm2.windows import around_predictor


class EditingMethods(DiffusersMethods):
    """Inversion of sounds, and blends of prompts."""

    unet: Any

    @abstractmethod
    def encode_audio(
        self, audio: Tensor | np.ndarray[Any, Any], sampling_rate: int, loop: bool = False
    ) -> Tensor:
        """Encode sounds into latents."""

    @abstractmethod
    def log_mel_config(self) -> LogMelConfig:
        """The settings of the spectrograms that fit the vocoder."""

    @abstractmethod
    def _adapters_of_call(
        self, weights: Mapping[str, float] | None, cross_attention_kwargs: Mapping[str, Any] | None
    ) -> AbstractContextManager[None]:
        """Have the adapters of one generation active in the block."""

    @torch.no_grad()
    def blend(
        self, prompts: Blend | Sequence[Blend], *, max_new_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """Mix prompts, of any lengths: `pipe(**pipe.blend([("rain", 0.7), ("a bell", 0.3)]))`.

        Args:
            prompts: (prompt, weight) of each, or a list of such lists for several sounds. The weights are
                positive, and are divided by their sum.
            max_new_tokens: how many vectors GPT-2 generates; its config's number (8) by default.

        Returns:
            Arguments for a generation: `prompt_embeds`, `generated_prompt_embeds` and `attention_mask`, which
            replace the prompt, and `clap_embeds`, which ranks candidates. `audioldm2.blending` has the
            equations.

        Raises:
            ValueError, TypeError: prompts or weights that cannot be used; the message names them.
        """
        blends = as_blends(prompts)
        if speaks(self):
            raise ValueError("blend is not for speech checkpoints, which read a transcription")
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        for texts, _ in blends:
            blended_tokens(self, texts)
        found = []
        none = PromptInputs("negative_prompt", None)
        with self.generation():
            for texts, weights in blends:
                each = [
                    condition(self, PromptInputs("prompts", text), none, False, max_new_tokens=max_new_tokens)
                    for text in texts
                ]
                found.append(blended(each, weights))
        states, masks, vectors, claps = zip(*found, strict=True)
        return {
            "prompt_embeds": padded(states),
            "generated_prompt_embeds": torch.cat(vectors),
            "attention_mask": padded(masks),
            "clap_embeds": torch.cat(claps),
        }

    @torch.no_grad()
    def invert(
        self,
        audio: Audio,
        sampling_rate: int | None = None,
        prompt: Text = "",
        *,
        transcription: Text | None = None,
        negative_prompt: Text | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        method: str = "ddpm",
        num_waveforms_per_prompt: int = 1,
        generator: Generators = None,
        audio_length_in_s: float | None = None,
        window: float | None = None,
        adapters: Mapping[str, float] | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> Inverted:
        """Find the run of the sampler that generates a sound, to edit the sound with another prompt.

        `pipe(prompt, inverted=inverted)` edits it. With the prompt, negative prompt and guidance scale of the
        inversion and `skip=0` it gives the sound back, encoded and decoded: exactly with "ddpm", nearly with
        "ddim" (see `audioldm2.editing.inversion`).

        Args:
            audio: as in a generation: a waveform, the path of a sound file, or a list of these.
            sampling_rate: of the waveforms in `audio`, in Hz; files say their own.
            prompt: what the sound is; one for all sounds, or one for each. It may be empty. Several prompts
                for one sound invert it with each of them.
            transcription: the words that are spoken, for the speech checkpoints.
            negative_prompt: as in a generation; without guidance it has no effect, and a warning says so.
            guidance_scale: the weight of guidance; 1 or less disables it.
            num_inference_steps: of the inversion; an edit takes those that `skip` leaves. 200 by default.
            method: "ddpm" (Huberman-Spiegelglas et al. 2024), which draws the noise of each step and is
                exact; or "ddim" (Song et al. 2021), which draws none, takes three times as long, and reports
                its error.
            num_waveforms_per_prompt: how many candidates an edit of each sound has. Each has noise of its
                own, so "ddim" has only one.
            generator: draws the noise of "ddpm"; a list has one for each sound and candidate.
            audio_length_in_s: seconds to which the sounds are cut, or padded with silence; their own length
                by default, which must be the same for all.
            window: seconds; as in a generation, longer sounds are inverted in windows of this length. Edits
                need it, too.
            adapters: as in a generation, weights of adapters by name for this call.
            callback: called as callback(step, steps) after each evaluation of the UNet, of which there are
                `steps`; step counts from 1.

        Returns:
            What edits need; `inverted.error` is the error of "ddim".

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
            ImportError, OSError: a sound file cannot be read.
            NonFiniteError: a stage returned NaN or infinity; the message names the stage.

        Example:
            >>> inverted = pipe.invert("dog.wav", prompt="A dog barks")
            >>> cat = pipe("A cat meows", inverted=inverted, skip=0.4, guidance_scale=12).audios[0]
        """
        check_choice("method", method, METHODS)
        check_number("guidance_scale", guidance_scale)
        check_count("num_waveforms_per_prompt", num_waveforms_per_prompt)
        if num_inference_steps is not None:
            check_count("num_inference_steps", num_inference_steps)
        waveforms = int(num_waveforms_per_prompt)
        if method == "ddim" and waveforms > 1:
            raise ValueError(
                f"num_waveforms_per_prompt = {waveforms} needs method 'ddpm': candidates of 'ddim' are equal"
            )
        if method == "ddim" and generator is not None:
            raise ValueError("generator goes with method 'ddpm'; 'ddim' draws no noise")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function, got {quoted(callback)}")
        sounds = recordings(audio, sampling_rate)
        with self.generation(), self._adapters_of_call(adapters, None):
            self.check_stages()
            rate = self.part("vocoder").config.sampling_rate
            width = window_of(self, window)
            sampler = inversion_sampler(self.scheduler, num_inference_steps, self.device)
            wave = at_rate(sounds, rate, audio_length_in_s, latent_samples(self) / rate)
            conditioning = condition(
                self,
                PromptInputs("prompt", prompts_for(len(sounds), prompt)),
                PromptInputs("negative_prompt", negative_prompt),
                guidance_scale > 1,
                transcription,
                waveforms=waveforms,
            )
            check_generators(generator, conditioning.batch)
            wave, clean = encoded_for_each(self, wave, conditioning.batch, waveforms)
            steps = len(sampler.timesteps) * (DDIM_EVALUATIONS if method == "ddim" else 1)
            done = itertools.count(1)
            after_step = self.refreshing(callback)
            with (
                self.running("unet") as unet,
                self.progress("Inverting", steps, main=True) as bar,
            ):

                def progress() -> None:
                    bar.update()
                    if after_step is not None:
                        after_step(next(done), steps)

                predict = guided_predictor(
                    unet, conditioning, float(guidance_scale), around_predictor(width, False)
                )
                latents, residuals, error = invert(
                    predict, sampler, clean.to(self.device).float(), method, generator, progress
                )
            check_finite("unet", latents if residuals is None else residuals)
        timesteps = tuple(sampler.timesteps.tolist())
        return Inverted(latents, residuals, timesteps, dict(sampler.config), wave.shape[1], waveforms, error)
