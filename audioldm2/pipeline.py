"""AudioLDM2Pipeline: text in, sound out (Liu et al. 2023, "AudioLDM 2", figure 1).

    text --CLAP--> one vector -------+
         --Flan-T5--> states --------+--projection--> sequence --GPT-2--> 8 vectors, the "language of audio"
                                                                               |
    noise --UNet, step by step, attending to GPT-2's vectors and T5's states--> latents
    latents --VAE decoder--> log-mel spectrogram --HiFi-GAN--> waveform, 16 kHz

`AudioLDM2Pipeline.__call__` is this figure; its steps are in `conditioning`, `sampling`, `decoding` and
`ranking`. Names, arguments and the order of random numbers are those of diffusers: a script changes only its
import, and the same seed gives the same sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from audioldm2.adapters.methods import AdapterMethods
from audioldm2.arguments import (
    GUIDANCE,
    check_choice,
    check_count,
    check_flag,
    check_number,
    naming_unknown,
)
from audioldm2.audio.clap_features import ClapFeatureExtractor
from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.checkpoints.folder import load_checkpoint, save_parts
from audioldm2.checkpoints.formats import part_classes
from audioldm2.checkpoints.options import (
    MAX_SHARD_SIZE,
    DeviceArgument,
    DtypeArgument,
    load_options,
    save_options,
)
from audioldm2.checkpoints.recommended import RECOMMENDED, check_recommended
from audioldm2.conditioning import PromptInputs, Text, condition
from audioldm2.decoding import decode, vocode
from audioldm2.editing.edit import Start
from audioldm2.editing.inversion import Inverted
from audioldm2.editing.methods import EditingMethods
from audioldm2.editing.regions import Spans
from audioldm2.editing.sound import Audio, as_waveforms, encode
from audioldm2.editing.sources import Sampling, source_of
from audioldm2.feature_cache import FeatureCacheMethods, FeatureCaching, as_feature_caching
from audioldm2.frozen import FrozenMapping
from audioldm2.guidance import UNCONDITIONAL, guidance_of
from audioldm2.models.clap import ClapModel
from audioldm2.models.gpt2 import GPT2
from audioldm2.models.hifigan import HifiGan
from audioldm2.models.projection import ProjectionModel
from audioldm2.models.t5 import T5Encoder
from audioldm2.models.unet import UNet
from audioldm2.models.vae import VAE
from audioldm2.models.vits import VitsTextEncoder
from audioldm2.noise import Generators
from audioldm2.output import AudioPipelineOutput
from audioldm2.quality import Quality, quality_of
from audioldm2.ranking import best_first, score
from audioldm2.runtime.device import named_device
from audioldm2.runtime.profiling import recorded
from audioldm2.sampling import (
    Callback,
    StepCallback,
    callbacks,
    check_callbacks,
    denoise,
    exclusive,
    set_timesteps,
)
from audioldm2.schedulers.base import Scheduler
from audioldm2.tensors import check_finite, check_tensor
from audioldm2.words import WordWeights


class AudioLDM2Pipeline(AdapterMethods, EditingMethods, FeatureCacheMethods):
    """The seven stages of AudioLDM 2 and what joins them.

    Any part can be replaced, as in `pipe.unet = mine`: with one of this package's interface, or with one of
    diffusers or transformers, also in a wrapper such as torch.compile's. docs/replacing-parts.md lists what
    each part must provide.

    Args:
        vae: log-mel spectrogram <-> latents.
        text_encoder: CLAP; its text tower encodes the prompt, both towers rank candidates.
        text_encoder_2: Flan-T5's encoder, or VITS's in the speech checkpoints.
        projection_model: joins the two encoders' outputs into one sequence.
        language_model: GPT-2, which generates the conditioning vectors.
        tokenizer: RoBERTa's, for `text_encoder` (transformers).
        tokenizer_2: T5's or VITS's, for `text_encoder_2` (transformers).
        feature_extractor: the log-mel front end of CLAP's audio tower.
        unet: the denoiser.
        scheduler: the sampler.
        vocoder: log-mel spectrogram -> waveform.

    Example:
        >>> pipe = AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2")
        >>> audio = pipe("A hammer hits a wooden surface").audios[0]  # numpy, (samples,), 16 kHz
    """

    # In the order in which they run.
    stage_names: ClassVar[tuple[str, ...]] = (
        "text_encoder",
        "text_encoder_2",
        "projection_model",
        "language_model",
        "unet",
        "vae",
        "vocoder",
    )
    main_stage: ClassVar[str] = "unet"
    other_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "feature_extractor", "scheduler")

    def __init__(
        self,
        vae: VAE | Any,
        text_encoder: ClapModel | Any,
        text_encoder_2: T5Encoder | VitsTextEncoder | Any,
        projection_model: ProjectionModel | Any,
        language_model: GPT2 | Any,
        tokenizer: Any,
        tokenizer_2: Any,
        feature_extractor: ClapFeatureExtractor | Any,
        unet: UNet | Any,
        scheduler: Scheduler | Any,
        vocoder: HifiGan | Any,
    ):
        super().__init__()
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.projection_model = projection_model
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.feature_extractor = feature_extractor
        self.unet = unet
        self.scheduler = scheduler
        self.vocoder = vocoder
        self.recommended: Mapping[str, Any] = FrozenMapping({})
        self._name_or_path = ""
        self._revision: str | None = None
        self._variant: str | None = None
        self._settings: dict[str, Any] = {}  # all of the checkpoint's audioldm2.json

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path | None = None,
        *,
        pretrained_model_name_or_path: str | Path | None = None,
        torch_dtype: DtypeArgument = None,
        dtype: DtypeArgument = None,
        device: DeviceArgument = None,
        device_map: DeviceArgument | Mapping[str, Any] = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        low_cpu_mem_usage: bool = True,
        **parts: Any,
    ) -> AudioLDM2Pipeline:
        """Load a checkpoint in the Hub's layout: model_index.json and one subfolder per part.

        Args:
            repo_or_folder: a folder, "tiny" for the checkpoint in this package, or "owner/name" on the Hub,
                of which only the needed files are downloaded. An existing folder takes precedence; one named
                "tiny" only if it holds a checkpoint.
            pretrained_model_name_or_path: the same, under the name that it has in diffusers.
            torch_dtype: a dtype, or its name as text. By default the checkpoint's own, but float32 for
                "tiny", whose weights are stored in float16 only to save space. "auto" is that of the stored
                weights, but bfloat16 on a machine without an accelerator whose CPU multiplies bfloat16 in
                hardware (AVX512_BF16, AMX_BF16). A dict has a dtype for each part, such as `{"unet":
                torch.float16, "default": torch.float32}`; parts that it leaves out are loaded in float32.
            dtype: the same, under the name that it has in newer releases of diffusers.
            device: where the stages go, such as "cuda" or the number of a CUDA device; the CPU by default.
            device_map: the same; "balanced" and "auto" are this machine's accelerator, or its CPU if there is
                none. The stages are not spread over several devices.
            variant: weights of a variant, such as "fp16".
            use_safetensors: True reads safetensors files only, False `.bin` files only; by default
                safetensors are preferred.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; the Hub client's default if None.
            token: for private repositories; None uses the stored login.
            local_files_only: use an earlier download, without asking the Hub.
            force_download: download again what was downloaded earlier.
            low_cpu_mem_usage: has no effect, as loading never needs more memory than the weights.
            **parts: parts that replace the checkpoint's, such as `unet=mine`. They are used as they are, not
                moved or converted, and the checkpoint's files for them are not needed.

        Returns:
            The pipeline. Its `recommended` has the arguments with which the checkpoint and its scheduler give
            good results, if the checkpoint says so: `pipe("a bell", **pipe.recommended)`.

        Raises:
            CheckpointError: the checkpoint cannot be found or read, is not safe to read, or does not fit;
                the message names the file.
            TypeError: an argument is not known.
            ValueError: an argument has a value that is not supported, such as a device that is not available.

        Example:
            >>> import torch
            >>> from audioldm2 import AudioLDM2Pipeline
            >>> pipe = AudioLDM2Pipeline.from_pretrained("tiny", dtype=torch.float32, device_map="auto")
            >>> dict(pipe.recommended)
            {'guidance_scale': 2.0, 'num_inference_steps': 20}
        """
        options = load_options(
            repo_or_folder,
            pretrained_model_name_or_path,
            torch_dtype=torch_dtype,
            dtype=dtype,
            device=device,
            device_map=device_map,
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            low_cpu_mem_usage=low_cpu_mem_usage,
            others=parts,
            part_names=part_classes().keys(),
        )
        found = load_checkpoint(options.source, options.dtype, options.device, options.parts)
        pipe = cls(**found.parts)
        if options.parts:
            pipe.check_parts()
        pipe._name_or_path = options.source.name
        pipe._revision = found.revision
        pipe._variant = variant
        pipe._settings = found.settings
        pipe.recommended = FrozenMapping(found.settings.get(RECOMMENDED, {}))
        return pipe

    def save_pretrained(
        self,
        folder: str | Path | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = MAX_SHARD_SIZE,
        *,
        save_directory: str | Path | None = None,
        **others: Any,
    ) -> None:
        """Write all parts into `folder`, in a format that diffusers and this package can load.

        Parts of diffusers and transformers are written too if the pipeline's checkpoints can hold their
        class: a T5EncoderModel, for example, and any scheduler of diffusers. A stage in the wrapper of
        torch.compile or DataParallel is written without it.

        Args:
            folder: created if it does not exist. Files of an earlier save are replaced; its weights of the
                same variant are removed, also those in the other format.
            safe_serialization: False writes `.bin` files instead of safetensors.
            variant: goes into the names of the weight files: "fp16" writes model.fp16.safetensors. It does
                not change the dtype, which is that of the stages.
            max_shard_size: larger weights are split into several files; bytes, or text such as "5GB".
            save_directory: `folder`, under the name that it has in diffusers.

        Raises:
            TypeError: a part cannot be written, or an argument is not known. In that case nothing is written.
            ValueError: an argument has a value that is not supported.
        """
        path, options = save_options(
            folder,
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **others,
        )
        with self.generation(), self._without_adapters():
            save_parts(
                vars(self),
                path,
                options,
                {**self._settings, RECOMMENDED: check_recommended(self.recommended)},
            )

    # --- the steps of a generation

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Text | None,
        device: torch.device | str | None = None,
        num_waveforms_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        transcription: Text | None = None,
        negative_prompt: Text | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        generated_prompt_embeds: Tensor | None = None,
        negative_generated_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        *,
        word_weights: WordWeights | None = None,
        unconditional: str = UNCONDITIONAL[0],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode prompts into what the UNet attends to.

        B is the number of prompts times `num_waveforms_per_prompt`, doubled by guidance.

        Args:
            prompt: one or several; None if embeddings are given.
            device: where the results go; the pipeline's by default.
            num_waveforms_per_prompt: number of times that each prompt's rows are repeated.
            do_classifier_free_guidance: put the negative prompts' rows before the prompts'.
            transcription: the words to speak, for the speech checkpoints.
            negative_prompt: what to steer away from, one for all prompts or one for each; "" by default. It
                is padded or cut to the prompt's length, as in diffusers.
            prompt_embeds: with `generated_prompt_embeds` and `attention_mask`, instead of a prompt: what this
                method returned without guidance and with `num_waveforms_per_prompt=1`.
            negative_prompt_embeds: the same instead of a negative prompt.
            generated_prompt_embeds: see `prompt_embeds`.
            negative_generated_prompt_embeds: see `negative_prompt_embeds`.
            attention_mask: see `prompt_embeds`.
            negative_attention_mask: see `negative_prompt_embeds`.
            max_new_tokens: how many vectors GPT-2 generates; its config's number (8) by default.
            word_weights: how much the UNet attends to words or phrases of the prompt, as in {"rain": 1.5}:
                their T5 states are multiplied by the weight, 1 by default (see `audioldm2.words`). They
                match whole words, in any case; a list has a dict for each prompt.
            unconditional: without a negative prompt, "text" puts the empty text before the prompts; "zeros"
                has zeros in place of its GPT-2 vectors, as in the original repository.

        Returns:
            prompt_embeds: the second encoder's states, (B, tokens, width).
            attention_mask: (B, tokens), 0 for padding.
            generated_prompt_embeds: GPT-2's vectors, (B, max_new_tokens, width).

        Raises:
            ValueError, TypeError: a prompt or an embedding that cannot be used; the message names it.
        """
        check_count("num_waveforms_per_prompt", num_waveforms_per_prompt)
        guided = check_flag("do_classifier_free_guidance", do_classifier_free_guidance)
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        device = self.device if device is None else named_device(device)
        with self.generation():
            found = condition(
                self,
                PromptInputs(
                    "prompt",
                    prompt,
                    prompt_embeds,
                    generated_prompt_embeds,
                    attention_mask,
                    word_weights=word_weights,
                ),
                PromptInputs(
                    "negative_prompt",
                    negative_prompt,
                    negative_prompt_embeds,
                    negative_generated_prompt_embeds,
                    negative_attention_mask,
                ),
                guided,
                transcription,
                max_new_tokens,
                int(num_waveforms_per_prompt),
                unconditional,
            )
        return found.t5_states.to(device), found.t5_mask.to(device), found.gpt2_vectors.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor, exact: bool = True, loop: bool = False) -> Tensor:
        """Decode latents into log-mel spectrograms, long ones in chunks.

        Args:
            latents: as a generation with `output_type="latent"` returns them, (B, 8, T/4, F/4).
            exact: False decodes long latents in windows, in less memory (see `exact_decoding`).
            loop: whether the first row follows the last one.

        Returns:
            (B, 1, T, F), for T frames and F mel bands.

        Raises:
            ValueError, TypeError: `latents` has another shape, or numbers that are not finite.
        """
        check_tensor("latents", latents, "(B, channels, T/4, F/4)")
        with self.generation(), self.running("vae") as vae:
            return decode(vae, latents, self.progress, exact, loop)

    @torch.no_grad()
    def vocode(self, mel: Tensor, loop: bool = False) -> Tensor:
        """Turn log-mel spectrograms into waveforms, long ones in chunks.

        Args:
            mel: as `decode` returns them, (B, 1, T, F).
            loop: whether the first frame follows the last one.

        Returns:
            (B, samples) in [-1, 1], float32, on the CPU.

        Raises:
            ValueError, TypeError: `mel` has another number of mel bands, or numbers that are not finite.
        """
        check_tensor("mel", mel, "(B, 1, T, F)")
        with self.generation(), self.running("vocoder") as vocoder:
            return vocode(vocoder, mel, self.progress, loop)

    @torch.no_grad()
    def encode_audio(
        self, audio: Tensor | np.ndarray[Any, Any], sampling_rate: int, loop: bool = False
    ) -> Tensor:
        """Encode sounds into latents, as a generation with `output_type="latent"` returns them.

        The VAE was trained on clips that were centered and scaled to a peak of 0.5; it works best on sounds
        prepared in the same way (see `LogMel`).

        Args:
            audio: (samples,) or (B, samples) in [-1, 1], a tensor or an array.
            sampling_rate: of `audio`, in Hz; sounds are resampled to the checkpoint's rate.
            loop: whether the first sample follows the last one. At the checkpoint's rate, a loop's length
                must be a whole number of latents.

        Returns:
            (B, 8, T/4, F/4), on the VAE's device. The end of a sound is padded with silence to a whole number
            of latents (T mel frames).

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.

        Example:
            >>> waveform, rate = read_wav("dog.wav")
            >>> latents = pipe.encode_audio(waveform, rate)
            >>> again = pipe.decode_latents(latents)[:, : waveform.shape[-1]]  # if the rates are equal
        """
        waveforms = as_waveforms(audio)
        check_count("sampling_rate", sampling_rate)
        with self.generation(), self.running("vae") as vae:
            return encode(vae, LogMel(self.log_mel_config()), waveforms, sampling_rate, loop)

    def log_mel_config(self) -> LogMelConfig:
        """The settings of the spectrograms that fit the vocoder."""
        vocoder = self.part("vocoder")
        settings = {"hop_length": vocoder.hop_length, **self._settings.get("log_mel", {})}
        return LogMelConfig.for_vocoder(vocoder.config, **settings)

    def decode_latents(self, latents: Tensor, exact: bool = True, loop: bool = False) -> Tensor:
        """Decode latents into waveforms: `decode`, then `vocode`.

        Args:
            latents: as a generation with `output_type="latent"` or `encode_audio` returns them, (B, 8, T/4,
                F/4).
            exact: see `decode`.
            loop: whether the sound repeats.

        Returns:
            (B, samples) in [-1, 1], float32, on the CPU.

        Raises:
            ValueError, TypeError: latents that cannot be used.
        """
        with self.generation():
            return self.vocode(self.decode(latents, exact, loop), loop)

    @torch.no_grad()
    def rank(
        self, audio: Tensor, text_embeddings: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Order the candidates of each prompt by CLAP's score, best first.

        Args:
            audio: n candidates per prompt, those of one prompt together, (prompts * n, samples).
            text_embeddings: CLAP's embeddings of the prompts, (prompts, 512), of unit length.
            generator: draws the excerpt of sounds longer than CLAP's window; of a list with one for each
                sound, that of a prompt's first one draws for all of the prompt's.

        Returns:
            audio: the same in the new order.
            scores: their cosine similarities to the prompts, (prompts * n,).
        """
        with (
            self.generation(),
            recorded("ranking"),
            self.progress("Ranking", 1) as bar,
            self.running("text_encoder") as clap,
        ):
            rate = self.part("vocoder").config.sampling_rate
            scores = score(clap, self.part("feature_extractor"), text_embeddings, audio, rate, generator)
            bar.update()
        return best_first(audio, scores)

    @naming_unknown("the pipeline", {"seed": "generator=torch.Generator().manual_seed(3)"})
    @torch.no_grad()
    def __call__(
        self,
        prompt: Text | None = None,
        transcription: Text | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE,
        negative_prompt: Text | None = None,
        num_waveforms_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        generated_prompt_embeds: Tensor | None = None,
        negative_generated_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        return_dict: bool = True,
        callback: Callback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        audio: Audio | None = None,
        sampling_rate: int | None = None,
        strength: float | None = None,
        keep: Spans | None = None,
        replace: Spans | None = None,
        replace_band: Spans | None = None,
        extend: float | None = None,
        loop: bool = False,
        window: float | None = None,
        exact_decoding: bool = True,
        adapters: Mapping[str, float] | None = None,
        inverted: Inverted | None = None,
        skip: float | None = None,
        word_weights: WordWeights | None = None,
        clap_embeds: Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        unconditional: str = UNCONDITIONAL[0],
        feature_cache: int | FeatureCaching | bool | None = None,
        timesteps: Sequence[int] | None = None,
        quality: str | Quality | None = None,
    ) -> AudioPipelineOutput:
        """Generate sound from text, or from text and sound.

        Args:
            prompt: one or several descriptions, which may be empty; None if embeddings are given (see
                `encode_prompt`).
            transcription: the words to speak, for the speech checkpoints.
            audio_length_in_s: seconds; by default the length of `latents`, or of the clips that the
                checkpoint was trained on (10.24). As in diffusers it is rounded down to whole mel frames, so
                the sound can be some milliseconds shorter: 5 s with "tiny" are 79,872 samples, not 80,000.
            num_inference_steps: by default what the scheduler needs: 20 for this package's DPM-Solver++ and
                UniPC, 200 for any other.
            guidance_scale: the weight w of classifier-free guidance (Ho and Salimans 2021), in noise =
                uncond + w (cond - uncond); 1 or less disables guidance, which halves the time.
            negative_prompt: what to steer away from, one for all prompts or one for each; "" by default.
                Without guidance it has no effect, and a warning says so.
            num_waveforms_per_prompt: candidates per prompt. Unless `prompt` and `clap_embeds` are None or
                `output_type` is "latent", they are ordered by CLAP's score, best first.
            eta: how much noise a DDIM step adds (Song et al. 2021, eq. 16). With other samplers it has no
                effect, and a warning says so.
            generator: the source of random numbers; a list has one for each of the B waveforms.
            latents: the initial noise, (B, channels, frames/4, mels/4), instead of drawing it.
            prompt_embeds: see `encode_prompt`.
            negative_prompt_embeds: see `encode_prompt`.
            generated_prompt_embeds: see `encode_prompt`.
            negative_generated_prompt_embeds: see `encode_prompt`.
            attention_mask: see `encode_prompt`.
            negative_attention_mask: see `encode_prompt`.
            max_new_tokens: how many vectors GPT-2 generates; its config's number (8) by default.
            return_dict: accepted for diffusers; the output is a tuple, `(audios,)`, in either case.
            callback: called as callback(step, timestep, latents) after steps 0, `callback_steps`,
                2 `callback_steps` and so on.
            callback_steps: see `callback`.
            cross_attention_kwargs: {"scale": 0.5}, as in diffusers: a factor for the adapters that are on.
                Nothing else, as there are no attention processors to pass it to.
            output_type: "np" or "pt" for waveforms, (B, samples), 16 kHz, float32, on the CPU; "latent" for
                the latents before decoding, which are float32 in half precision, too.
            callback_on_step_end: called as callback_on_step_end(pipe, step, timestep, tensors) after every
                step; the tensors that it returns replace those of the run. As in diffusers, it may set
                `pipe._guidance_scale`, and `pipe._interrupt = True` to decode what there is.
            callback_on_step_end_tensor_inputs: the names of its tensors: "latents", "prompt_embeds",
                "generated_prompt_embeds" or "attention_mask".
            audio: a sound to begin with, which is resampled, and mixed if it has several channels: a waveform
                in [-1, 1], (samples,) or (channels, samples); the path of a sound file; or a list with one
                for each prompt. The result is as long, unless `audio_length_in_s` says otherwise: then the
                sound is cut, or padded with silence.
            sampling_rate: of the waveforms in `audio`, in Hz; files say their own.
            strength: how much of `audio` is changed (Meng et al. 2022): 0 only encodes and decodes it, 1 is
                the prompt alone. Of the steps, only this share is taken. By default 0.5, or 1 if a part is
                replaced.
            keep: spans of `audio` in seconds that are kept, as in [(0.0, 2.5)]; the rest is generated to fit
                (see `audioldm2.editing.inpainting`). An end of None is the end of the sound.
            replace: the opposite, spans that are generated.
            replace_band: a band in Hz, as in (4000, 8000), or several; only these frequencies are generated,
                in all of the sound or in the spans. The prompt says what is generated in them.
            extend: seconds to add to the end of `audio`, which is kept. They are generated in windows of
                `window` seconds, each of which begins with the end of what there is (see
                `audioldm2.editing.extending`). The steps that callbacks see begin anew in each window.
            loop: make a sound that repeats without a seam, in twice the time. Its length is a whole number of
                latents, of 0.04 s in AudioLDM 2 and 0.13 s in "tiny": rounded up, or `audio` is cut.
                With `extend`, what is added leads back to the beginning of `audio`.
            window: seconds; longer latents are denoised in windows of this length, which overlap by half (see
                `audioldm2.windows`), in memory that does not grow with the length. By default they are
                denoised at once, and with `extend` in windows as long as the sounds of the training.
            exact_decoding: False decodes latents that are longer than 10.24 s (in AudioLDM 2) in windows,
                which needs less memory but is not quite the same (see docs/long-sounds.md).
            adapters: weights of adapters by name, such as {"dog": 0.8}, for this call in place of those of
                `set_adapters`; {} is the base.
            inverted: sounds to edit, from `invert`. It settles their length, the sampler (DDIM's steps) and
                the number of steps. One prompt, or one for each sound.
            skip: the share of the steps that is left out, from 0 (all steps: the prompt has the most effect)
                to 1 (none: the sound, encoded and decoded); 0.4 by default, or 0.2 with "ddim".
            word_weights: see `encode_prompt`.
            clap_embeds: CLAP's embeddings, (prompts, 512), by which candidates are ranked where
                `prompt_embeds` replaces the prompt; see `blend`.
            guidance_interval: the steps with guidance, as fractions of all steps: (0, 0.75) leaves it out of
                the last quarter, whose steps then take half of the time (Kynkäänniemi et al. 2024).
            guidance_rescale: from 0 to 1, how far the standard deviation of the guided prediction is brought
                back to that of the prompt's (Lin et al. 2024).
            unconditional: what guidance steers away from without a negative prompt: "text", the empty text,
                as in diffusers; or "zeros", which has zeros in place of GPT-2's vectors, as in the original
                repository.
            feature_cache: an interval such as 3, or a `FeatureCaching`: only every third step runs the whole
                UNet. False runs it at every step, as the named presets do. By default what
                `enable_feature_cache` says.
            timesteps: the timesteps of the sampling run, decreasing, instead of a number of steps.
            quality: "draft", "normal" or "best", or a `Quality`: a preset of sampler, steps, guidance
                interval and feature caching, in which the arguments above take precedence (see
                docs/speed.md). Its sampler is made from the settings of `pipe.scheduler`, and takes the steps
                in place of it.

        Returns:
            `.audios`: B waveforms, those of one prompt together, the best of ranked candidates first.
            `.scores`: CLAP's scores of ranked candidates. `.sampling_rate`: in Hz.

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
            ImportError, OSError: a sound file cannot be read.
            NonFiniteError: a stage returned NaN or infinity; the message names the stage.

        Example:
            >>> keyboard = pipe("A piano", audio="guitar.wav", strength=0.6).audios[0]
            >>> quiet = pipe("Rain", audio="rain.wav", replace=[(2.5, 4.0)]).audios[0]  # instead of a cough
            >>> endless = pipe("Rain", audio="rain.wav", extend=20.0, loop=True).audios[0]
        """
        check_choice("output_type", output_type, ("np", "pt", "latent"))
        for name, count in (
            ("num_waveforms_per_prompt", num_waveforms_per_prompt),
            ("callback_steps", callback_steps),
            ("num_inference_steps", num_inference_steps),
            ("max_new_tokens", max_new_tokens),
        ):
            if count is not None or name in ("num_waveforms_per_prompt", "callback_steps"):
                check_count(name, count)
        plan = quality_of(quality).with_arguments(num_inference_steps, timesteps, feature_cache)
        guidance = guidance_of(guidance_scale, guidance_interval, guidance_rescale, plan.guidance_interval)
        check_choice("unconditional", unconditional, UNCONDITIONAL)
        caching = self._feature_caching
        if plan.feature_cache is not None:
            caching = as_feature_caching(plan.feature_cache)
        check_number("eta", eta)
        check_callbacks(callback, callback_on_step_end, callback_on_step_end_tensor_inputs)
        loop, exact = check_flag("loop", loop), check_flag("exact_decoding", exact_decoding)
        uncond = PromptInputs(
            "negative_prompt",
            negative_prompt,
            negative_prompt_embeds,
            negative_generated_prompt_embeds,
            negative_attention_mask,
        )
        with (
            self.generation(),
            self._adapters_of_call(adapters, cross_attention_kwargs),
            exclusive(plan.make_scheduler(self.scheduler)) as scheduler,
        ):
            self.check_stages()
            waveforms = int(num_waveforms_per_prompt)
            source = source_of(
                self,
                audio=audio,
                sampling_rate=sampling_rate,
                strength=strength,
                keep=keep,
                replace=replace,
                replace_band=replace_band,
                extend=extend,
                loop=loop,
                window=window,
                inverted=inverted,
                skip=skip,
                latents=latents,
                audio_length_in_s=audio_length_in_s,
                num_waveforms_per_prompt=waveforms,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                quality=quality,
                eta=eta or None,
            )
            cond = PromptInputs(
                "prompt",
                source.prompts(prompt),
                prompt_embeds,
                generated_prompt_embeds,
                attention_mask,
                clap_embeds,
                word_weights,
            )
            steps = source.steps(plan.steps, scheduler)
            set_timesteps(scheduler, steps, plan.timesteps, self.device)
            conditioning = condition(
                self,
                cond,
                uncond,
                guidance_scale > 1,
                transcription,
                max_new_tokens,
                waveforms,
                unconditional,
            )
            run = Sampling(
                scheduler,
                steps,
                plan.timesteps,
                conditioning.batch,
                waveforms,
                generator,
                self.device,
                conditioning.t5_states.dtype,
            )
            start = source.begin(run)
            with (
                self._run_of(len((start.scheduler or scheduler).timesteps), guidance.scale),
                self.running("unet") as unet,
                self.progress("Denoising", source.total(start, steps), main=True) as bar,
            ):
                after_step = callbacks(
                    self,
                    self.refreshing(callback),
                    callback_steps,
                    self.refreshing(callback_on_step_end),
                    callback_on_step_end_tensor_inputs,
                )

                def denoise_from(start: Start) -> Tensor:
                    # A callback may have changed it in the window before this one.
                    self._guidance_scale = guidance.scale
                    return denoise(
                        unet,
                        start.scheduler or scheduler,
                        start.latents,
                        conditioning,
                        guidance,
                        steps,
                        generator=generator,
                        eta=float(eta),
                        after_step=after_step,
                        progress=bar.update,
                        begin=start.begin,
                        around=start.around,
                        after_update=start.after_update,
                        caching=caching,
                    )

                latents = source.generate(
                    run,
                    start,
                    denoise_from,
                    stopped=lambda: self._interrupt,
                )
            check_finite("unet", latents, f"weights and guidance_scale = {guidance_scale:g}")
            result: Any = latents
            scores: Any = None
            if output_type != "latent":
                mel = self.decode(latents, exact, loop)
                result = source.finish(self.vocode(mel, loop)[:, : source.samples])
                if waveforms > 1 and conditioning.clap is not None:
                    result, scores = self.rank(result, conditioning.clap, generator)
                    scores = scores.float().cpu()
        if output_type == "np":
            result, scores = result.numpy(), None if scores is None else scores.numpy()
        return AudioPipelineOutput(result, self.part("vocoder").config.sampling_rate, scores)
