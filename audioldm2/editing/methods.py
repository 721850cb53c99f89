"""`EditingMethods`, the base class with which a pipeline inverts sounds and blends prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2.arguments import check_choice, check_count, check_number
from audioldm2.blending import Blend, as_blends, blended, padded
from audioldm2.compatibility import DiffusersMethods
from audioldm2.conditioning import PromptInputs, Text, condition, speaks, token_limit
from audioldm2.editing.inversion import (
    DDIM_EVALUATIONS,
    METHODS,
    Inverted,
    guided_predictor,
    inversion_sampler,
    invert,
)
from audioldm2.editing.sound import Audio, at_rate, recordings
from audioldm2.noise import Generators, check_generators
from audioldm2.quoting import quoted
from audioldm2.tensors import check_finite
from audioldm2.windows import around_predictor, window_rows


class EditingMethods(DiffusersMethods):
    """Inversion of sounds, and blends of prompts."""

    unet: Any

    @abstractmethod
    def encode_audio(
        self, audio: Tensor | np.ndarray[Any, Any], sampling_rate: int, loop: bool = False
    ) -> Tensor:
        """Encode sounds into latents."""

    @torch.no_grad()
    def blend(self, prompts: Blend | Sequence[Blend]) -> dict[str, Tensor]:
        """Mix prompts, of any lengths: `pipe(**pipe.blend([("rain", 0.7), ("a bell", 0.3)]))`.

        Args:
            prompts: (prompt, weight) of each, or a list of such lists for several sounds. The weights are
                positive, and are divided by their sum.

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
        found = []
        with self.generation():
            for texts, weights in blends:
                each = [
                    condition(
                        self, PromptInputs("prompts", text), PromptInputs("negative_prompt", None), False
                    )
                    for text in texts
                ]
                found.append(blended(each, weights))
            limit = token_limit(self, self.tokenizer_2)
        states, masks, vectors, claps = zip(*found, strict=True)
        for (texts, _), mask in zip(blends, masks, strict=True):
            if mask.shape[1] > limit:
                raise ValueError(
                    f"the prompts {quoted(texts)} have {mask.shape[1]} tokens together; {limit} are read"
                )
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
    ) -> Inverted:
        """Find the run of the sampler that generates a sound, to edit the sound with another prompt.

        `pipe(prompt, inverted=inverted)` edits it. With the prompt, negative prompt and guidance scale of the
        inversion and `skip=0` it gives the sound back, encoded and decoded: exactly with "ddpm", nearly with
        "ddim" (see `audioldm2.editing.inversion`).

        Args:
            audio: as in a generation: a waveform, the path of a sound file, or a list of these.
            sampling_rate: of the waveforms in `audio`, in Hz; files say their own.
            prompt: what the sound is; one for all sounds, or one for each. It may be empty.
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
        sounds = recordings(audio, sampling_rate)
        prompts = [prompt] * len(sounds) if isinstance(prompt, str) else prompt
        with self.generation():
            self.check_stages()
            vae, vocoder = self.part("vae"), self.part("vocoder")
            rate = vocoder.config.sampling_rate
            latent = vae.downsampling * vocoder.hop_length  # samples
            width = None if window is None else window_rows(self.unet, window, latent / rate)
            sampler = inversion_sampler(self.scheduler, num_inference_steps, self.device)
            wave = at_rate(sounds, rate, audio_length_in_s, latent / rate)
            conditioning = condition(
                self,
                PromptInputs("prompt", prompts),
                PromptInputs("negative_prompt", negative_prompt),
                guidance_scale > 1,
                transcription,
                waveforms=waveforms,
            )
            if conditioning.batch != len(sounds) * waveforms:
                raise ValueError(
                    f"{conditioning.batch // waveforms} prompts for {len(sounds)} sounds; pass one, or one "
                    "per sound"
                )
            check_generators(generator, conditioning.batch)
            clean = self.encode_audio(wave, rate).to(self.device).repeat_interleave(waveforms, dim=0)
            steps = len(sampler.timesteps) * (DDIM_EVALUATIONS if method == "ddim" else 1)
            with (
                self.running("unet") as unet,
                self.progress("Inverting", steps, main=True) as bar,
            ):
                predict = guided_predictor(
                    unet, conditioning, float(guidance_scale), around_predictor(width, False)
                )
                latents, residuals, error = invert(
                    predict, sampler, clean.float(), method, generator, bar.update
                )
            check_finite("unet", latents if residuals is None else residuals)
        timesteps = tuple(sampler.timesteps.tolist())
        return Inverted(latents, residuals, timesteps, dict(sampler.config), wave.shape[1], waveforms, error)
