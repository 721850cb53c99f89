"""AudioLDM2Pipeline: a prompt walks in, sound walks out (Liu et al. 2023, "AudioLDM 2", figure 1).

    text --CLAP--> one vector -------+
         --Flan-T5--> states --------+--projection--> sequence --GPT-2--> 8 vectors, the "language of audio"
                                                                               |
    noise --UNet, again and again, attending to GPT-2's vectors and T5's states--> latents
    latents --VAE decoder--> log-mel spectrogram --HiFi-GAN--> waveform, 16 kHz

Names and arguments are diffusers', so that a script changes only its import; the same seed gives the same
sound.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm.auto import tqdm

from audioldm2.arguments import as_negatives, as_texts, check_choice, check_count, check_length
from audioldm2.audio.log_mel import ClapFeatureExtractor
from audioldm2.audio.resample import resample
from audioldm2.checkpoints.folder import check_dtype, load_parts, save_parts
from audioldm2.checkpoints.formats import PARTS, TOKENIZERS, part_classes
from audioldm2.models.clap import ClapModel
from audioldm2.models.gpt2 import GPT2
from audioldm2.models.hifigan import HifiGan
from audioldm2.models.projection import ProjectionModel
from audioldm2.models.t5 import T5Encoder
from audioldm2.models.unet import UNet
from audioldm2.models.vae import VAE
from audioldm2.models.vits import VitsTextEncoder
from audioldm2.runtime.compile import BUCKET, check_stages, compile_stage, default_mode, rounded_up
from audioldm2.runtime.cpu import tune
from audioldm2.runtime.device import available_device
from audioldm2.runtime.memo import Memo, marks
from audioldm2.runtime.offload import Offload
from audioldm2.runtime.precision import cast, stage_device, stage_dtype
from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.schedulers.noise_schedule import randn

StageT = TypeVar("StageT", bound=nn.Module)
Generator = torch.Generator | Sequence[torch.Generator] | None
Text = str | Sequence[str]
Encoded = tuple[Tensor, Tensor, Tensor]  # T5's states, their mask, GPT-2's vectors

# The parts that turn text into conditions, in the order in which they work.
ENCODING = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
# Frames (10 ms each) that are decoded at once: of one long sound, or of several short ones.
CHUNK = 4096
# VITS's tokenizer writes no end of sequence; the speech checkpoints were trained with this token there.
VITS_END_TOKEN = 182


class _Tokens(NamedTuple):
    """Texts as both encoders read them, (B, N) and (B, M); there are no second ids where nothing is said."""

    ids: Tensor
    mask: Tensor
    ids_2: Tensor | None
    mask_2: Tensor


class AudioPipelineOutput(NamedTuple):
    """What a pipeline returns: `audios`, (B, samples) in [-1, 1], or latents where those were asked for."""

    audios: Any


class AudioLDM2Pipeline:
    """The seven stages and what joins them. Every part can be replaced: `pipe.unet = mine`.

    Args:
        vae: mel <-> latent.
        text_encoder: CLAP; its text tower encodes the prompt, both towers rank candidates.
        text_encoder_2: Flan-T5's encoder, or VITS's in the speech checkpoints.
        projection_model: joins what the two encoders say into one sequence.
        language_model: GPT-2, which generates the conditioning vectors.
        tokenizer: RoBERTa's, for `text_encoder` (transformers).
        tokenizer_2: T5's or VITS's, for `text_encoder_2` (transformers).
        feature_extractor: the log-mel front end of CLAP's audio tower.
        unet: the denoiser.
        scheduler: DDIM or DPM-Solver++.
        vocoder: mel -> waveform.
    """

    def __init__(
        self,
        vae: VAE,
        text_encoder: ClapModel,
        text_encoder_2: T5Encoder | VitsTextEncoder,
        projection_model: ProjectionModel,
        language_model: GPT2,
        tokenizer: Any,
        tokenizer_2: Any,
        feature_extractor: ClapFeatureExtractor,
        unet: UNet,
        scheduler: DDIMScheduler | DPMSolverMultistepScheduler,
        vocoder: HifiGan,
    ):
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
        self._offload: Offload | None = None
        self._progress: dict[str, Any] = {}
        self._compiled: set[str] = set()
        # What the encoders said of negative prompts, which are mostly the same from call to call.
        self._negatives: Memo[Encoded] = Memo(size=8)

    # --- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> AudioLDM2Pipeline:
        """Load a checkpoint in the Hub's layout: a subfolder a part, and model_index.json.

        Args:
            repo_or_folder: a folder, "tiny" for the checkpoint in this package, or "owner/name" on the Hub,
                of which only what is needed is downloaded. A local folder wins, if it holds a checkpoint even
                over "tiny".
            torch_dtype: None keeps the checkpoint's own; for "tiny", whose weights are float16 only to be
                small, it is float32.
            device: where the parts go; None is the CPU.
            variant: weights of a variant, such as "fp16".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept; None is the Hub client's own place.
            token: for private repositories; None uses the stored login.
            local_files_only: use what was downloaded before, without asking the Hub.

        Raises:
            CheckpointError: the checkpoint cannot be found, read, trusted or fitted; the message says which
                file.
        """
        parts = load_parts(
            repo_or_folder,
            dtype=torch_dtype,
            device=device,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return cls(**parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts into `folder`, such that diffusers and this package load them.

        Raises:
            TypeError: a part was replaced by something that this package does not know how to write.
        """
        save_parts({name: getattr(self, name) for name in part_classes()}, folder)

    # --- where and how it runs

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The parts that have weights, by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def device(self) -> torch.device:
        """Where the stages work."""
        return self._offload.device if self._offload else stage_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the UNet works in."""
        return stage_dtype(self.unet)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> AudioLDM2Pipeline:
        """Move every stage to a device, turn it into a dtype, or both; `to("cuda")`, `to(torch.float16)`.

        Parameters that lose in float16 stay float32 (see `runtime.precision`).

        Raises:
            ValueError: the device is not there, the dtype is no floating-point one, or
                `enable_model_cpu_offload` decides where stages are.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None and self._offload is not None:
            raise ValueError(
                "the parts move by themselves after enable_model_cpu_offload(); do not call to()"
            )
        check_dtype(dtype)
        if device is not None:
            device = available_device(device)
        for stage in self.stages.values():
            if dtype is not None:
                cast(stage, dtype)
            if device is not None:
                stage.to(device)
                tune(stage)
        return self

    def enable_model_cpu_offload(self, gpu_id: int = 0, device: torch.device | str = "cuda") -> None:
        """Keep the stages in main memory, and each on the device only while it works.

        On a GPU the next stage is copied while the one before it works.

        Args:
            gpu_id: which GPU, where `device` does not say.
            device: where stages work.

        Raises:
            ValueError: the device is not there.
        """
        device = available_device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", gpu_id)
        self.to("cpu")
        self._offload = Offload(device, [*self.stages.values()])

    def compile(self, mode: str | None = None, stages: Sequence[str] | None = None) -> None:
        """Compile stages, each as one graph. The first call after it is slow, minutes on a small machine.

        It compiles once for each duration, batch and number of candidates; a new prompt does not compile anew
        (texts are padded to a multiple of 16 tokens, which changes no number). What was compiled is kept on
        disk for the next process: see TORCHINDUCTOR_CACHE_DIR in PyTorch's documentation.

        Args:
            mode: as torch.compile's: "default", "reduce-overhead" or "max-autotune". None records CUDA graphs
                ("reduce-overhead") on a GPU, where weights stay where they are.
            stages: names of parts, such as ["unet"]; None is all of them.

        Raises:
            ValueError: there is no stage of that name.
        """
        mode = mode or ("default" if self._offload else default_mode(self.device))
        for name in check_stages(stages):
            compile_stage(name, getattr(self, name), mode)
            self._compiled.add(name)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for the progress bars, as tqdm takes them: `disable=True` for none."""
        self._progress = options

    def _bar(self, what: str, total: int) -> tqdm:
        return tqdm(**{"desc": what, "total": total, **self._progress})

    def _ready(self, stage: StageT) -> StageT:
        """The stage, on the device where it works."""
        if self._offload is not None:
            self._offload.take(stage)
        return stage

    # --- text to conditions

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
    ) -> Encoded:
        """Encode prompts into what the UNet attends to.

        B is prompts times waveforms a prompt, doubled by guidance.

        Args:
            prompt: one or several; None where the embeddings are given.
            device: where the results are wanted; None is the pipeline's.
            num_waveforms_per_prompt: each prompt's rows are repeated so often.
            do_classifier_free_guidance: put the negative prompts' rows before the prompts'.
            transcription: what is to be said, for the speech checkpoints.
            negative_prompt: what to steer away from: one for all, or one a prompt; None is "". Like
                diffusers, it is padded or cut to the length of the prompt.
            prompt_embeds, attention_mask, generated_prompt_embeds: instead of a prompt, what this method
                returned for it without guidance.
            negative_prompt_embeds, negative_attention_mask, negative_generated_prompt_embeds: instead of a
                negative prompt, likewise.
            max_new_tokens: vectors that GPT-2 generates; None is what its config says (8).

        Returns:
            prompt_embeds: the second encoder's states, (B, tokens, width).
            attention_mask: (B, tokens), 0 for padding.
            generated_prompt_embeds: GPT-2's vectors, (B, max_new_tokens, width).

        Raises:
            ValueError, TypeError: prompts that are empty, no text, of differing number, or given twice.
        """
        device = torch.device(device) if device is not None else self.device
        guided = do_classifier_free_guidance
        with self._bar("Encoding text", len(ENCODING)) as bar:
            positive = _given(
                "prompt", prompt, prompt_embeds, generated_prompt_embeds, attention_mask, self.text_encoder_2
            )
            negative = None
            if guided:
                negative = _given(
                    "negative_prompt",
                    negative_prompt,
                    negative_prompt_embeds,
                    negative_generated_prompt_embeds,
                    negative_attention_mask,
                    self.text_encoder_2,
                )
            sides: list[_Tokens] = []
            if positive is None:
                texts = as_texts("prompt", prompt)
                spoken = _spoken(transcription, len(texts), self.text_encoder_2)
                sides.append(self._tokens(texts, spoken))
            if guided and negative is None:
                batch, length = (positive[1] if positive is not None else sides[0].mask_2).shape
                negatives = as_negatives(negative_prompt, batch)
                tokenizers = [id(getattr(self, name)) for name in TOKENIZERS]
                encoders = marks(getattr(self, name) for name in ENCODING)
                key = (*negatives, length, max_new_tokens, *encoders, *tokenizers)
                negative = self._negatives.get(key)
                if negative is None:
                    sides.append(self._tokens(negatives, None, length))
            encoded = self._encode(sides, max_new_tokens, bar)
            if positive is None:
                positive = encoded.pop(0)
            if encoded:
                negative = self._negatives.put(key, encoded.pop(0))
        conditions = [positive] if negative is None else _aligned(negative, positive)
        rows = [
            [repeat(x.to(device), "b ... -> (b n) ...", n=num_waveforms_per_prompt) for x in condition]
            for condition in conditions
        ]
        prompt_embeds, attention_mask, generated_prompt_embeds = (
            torch.cat(parts) for parts in zip(*rows, strict=True)
        )
        return (
            prompt_embeds.to(stage_dtype(self.text_encoder_2)),
            attention_mask,
            generated_prompt_embeds.to(stage_dtype(self.language_model)),
        )

    def _tokens(self, texts: list[str], spoken: list[str] | None, length: int | None = None) -> _Tokens:
        """Texts as both encoders read them; `length` makes the negative side as long as that."""
        ids, mask = self._tokenize(self.tokenizer, texts)
        if isinstance(self.text_encoder_2, T5Encoder):
            return _Tokens(ids, mask, *self._tokenize(self.tokenizer_2, texts, length))
        if spoken is not None:
            ids_2, mask_2 = self._tokenize(self.tokenizer_2, spoken, pad_to_limit=True)
            return _Tokens(ids, mask, *_end_of_speech(ids_2, mask_2))
        # The speech checkpoints' unconditional side: nothing is said.
        silence = torch.zeros(len(texts), self.tokenizer_2.model_max_length, dtype=torch.long)
        return _Tokens(ids, mask, None, silence.to(self.device))

    def _encode(self, sides: list[_Tokens], max_new_tokens: int | None, bar: tqdm) -> list[Encoded]:
        """Both encoders, the projection and GPT-2, for each side of guidance.

        A stage works for all sides before the next one does, so that each moves but once where stages move.
        The sides are not joined into one batch: one that is remembered has to be the same to the last bit.
        """
        clap = []
        for side in sides:
            ids, mask = self._bucketed("text_encoder", side.ids, side.mask)
            features = self._ready(self.text_encoder).text_features(ids, mask)
            clap.append(self._kept("text_encoder", features))  # (B, 512)
        bar.update()
        states = []
        for side, heard in zip(sides, clap, strict=True):
            if side.ids_2 is None:
                width = self.projection_model.config.text_encoder_1_dim
                states.append(heard.new_zeros(*side.mask_2.shape, width))
                continue
            ids, mask = self._bucketed("text_encoder_2", side.ids_2, side.mask_2)
            state = self._ready(self.text_encoder_2)(ids, mask)[:, : side.ids_2.shape[1]]
            states.append(self._kept("text_encoder_2", state))  # (B, N, 1024)
        bar.update()
        joined = []
        for side, heard, state in zip(sides, clap, states, strict=True):
            projection = self._ready(self.projection_model)
            dtype = stage_dtype(projection)
            one = side.mask_2.new_ones(len(heard), 1)
            joined.append(projection(heard[:, None].to(dtype), state.to(dtype), one, side.mask_2))
        bar.update()
        encoded = []
        for side, state, (sequence, seen) in zip(sides, states, joined, strict=True):
            gpt2 = self._ready(self.language_model)
            length = state.shape[1]
            spare = rounded_up(length, BUCKET) - length if "language_model" in self._compiled else 0
            vectors = gpt2.generate(sequence.to(stage_dtype(gpt2)), seen, max_new_tokens, spare)
            encoded.append((state, side.mask_2, vectors))  # vectors (B, 8, 768)
        bar.update()
        return encoded

    def _bucketed(self, name: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, N) with N rounded up where the stage is compiled; what is added is masked."""
        if name not in self._compiled:
            return ids, mask
        first = name == "text_encoder"
        padding = self.text_encoder.config.text_config.pad_token_id if first else 0
        limit = self._token_limit(self.tokenizer if first else self.tokenizer_2)
        length = ids.shape[1]
        added = (0, min(rounded_up(length, BUCKET), max(limit, length)) - length)
        return F.pad(ids, added, value=padding), F.pad(mask, added)

    def _kept(self, name: str, result: Tensor) -> Tensor:
        """A stage's result, safe from its next run: a recorded graph writes into the same memory again."""
        return result.clone() if name in self._compiled else result

    def _tokenize(
        self, tokenizer: Any, texts: list[str], length: int | None = None, pad_to_limit: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Texts as ids and mask, (B, N), padded to the longest or to `length`; warns of what does not fit."""
        limit = length or self._token_limit(tokenizer)
        for text in texts:
            ids = tokenizer(text, verbose=False).input_ids
            if len(ids) > limit:
                kept = tokenizer(text, max_length=limit, truncation=True).input_ids
                # The end token stays, where there is one: what was cut lies before it.
                start = next((i for i, (a, b) in enumerate(zip(ids, kept, strict=False)) if a != b), limit)
                removed = tokenizer.decode(ids[start : len(ids) - (limit - start)])
                most = f"the prompt's {limit} tokens" if length else f"the {limit} tokens that are read"
                warnings.warn(f"{text!r} is longer than {most}; cut off: {removed!r}", stacklevel=2)
        tokens = tokenizer(
            texts,
            padding="max_length" if length or pad_to_limit else True,
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)

    def _token_limit(self, tokenizer: Any) -> int:
        """The most tokens a text may have: what the tokenizer says, and no more than there are positions."""
        limit: int = tokenizer.model_max_length
        if tokenizer is self.tokenizer:
            text = self.text_encoder.config.text_config
            limit = min(limit, text.max_position_embeddings - text.pad_token_id - 1)
        elif isinstance(self.text_encoder_2, T5Encoder):
            # T5 has no last position, but GPT-2 has: CLAP's vector, the four learned ones and those that it
            # generates, but for the last, go there too.
            gpt2 = self.language_model.config
            limit = min(limit, gpt2.n_positions - 5 - (gpt2.max_new_tokens - 1))
        return limit

    # --- conditions to sound

    @torch.no_grad()
    def __call__(
        self,
        prompt: Text | None = None,
        transcription: Text | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.5,
        negative_prompt: Text | None = None,
        num_waveforms_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        generated_prompt_embeds: Tensor | None = None,
        negative_generated_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        output_type: str = "np",
    ) -> AudioPipelineOutput | tuple[Any]:
        """Make sound from text.

        Args:
            prompt: one or several descriptions; None where embeddings are given (see `encode_prompt`).
            transcription: what is to be said, for the speech checkpoints.
            audio_length_in_s: seconds; None is what the checkpoint was trained on (10.24).
            num_inference_steps: None is what the scheduler needs: 200 for DDIM, 20 for DPM-Solver++.
            guidance_scale: the weight w of classifier-free guidance (Ho and Salimans 2021): the noise is
                e(nothing) + w (e(prompt) - e(nothing)); 1 or less is no guidance, at half the cost.
            negative_prompt: what to steer away from, in place of "nothing": one for all, or one a prompt.
            num_waveforms_per_prompt: candidates a prompt; CLAP puts the one that fits best first.
            eta: how much noise a DDIM step adds (Song et al. 2021, eq. 16); other samplers take no notice.
            generator: where random numbers come from; a list has one for each of the B waveforms.
            latents: the starting noise, (B, channels, frames/4, mels/4), in place of drawing it.
            prompt_embeds, negative_prompt_embeds, generated_prompt_embeds, negative_generated_prompt_embeds,
                attention_mask, negative_attention_mask: see `encode_prompt`.
            max_new_tokens: vectors that GPT-2 generates; None is what its config says (8).
            return_dict: False returns a plain tuple.
            callback: called as callback(step, timestep, latents) after every `callback_steps`-th step.
            callback_steps: see `callback`.
            output_type: "np" or "pt" for waveforms, (B, samples), 16 kHz, float32, in main memory; "latent"
                for the latents before decoding.

        Returns:
            `.audios`: B waveforms, those of one prompt together, the best candidate of each first.

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
        """
        frames, samples = self._lengths(audio_length_in_s)
        steps = getattr(self.scheduler, "default_num_inference_steps", 200)
        steps = steps if num_inference_steps is None else num_inference_steps
        check_choice("output_type", output_type, ("np", "pt", "latent"))
        check_count("num_waveforms_per_prompt", num_waveforms_per_prompt)
        check_count("callback_steps", callback_steps)
        device, guided = self.device, guidance_scale > 1
        self.scheduler.set_timesteps(steps, device=device)

        prompt_embeds, attention_mask, generated_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_waveforms_per_prompt,
            guided,
            transcription,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            generated_prompt_embeds,
            negative_generated_prompt_embeds,
            attention_mask,
            negative_attention_mask,
            max_new_tokens,
        )
        batch = len(prompt_embeds) // (2 if guided else 1)
        latents = self.prepare_latents(batch, frames, prompt_embeds.dtype, generator, latents)
        conditions = (generated_prompt_embeds, prompt_embeds, attention_mask)
        latents = self._denoise(latents, conditions, guidance_scale, eta, generator, callback, callback_steps)
        if output_type == "latent":
            audio = latents
        else:
            mel = self._decode(latents)
            audio = self._vocode(mel)[:, :samples]
            if num_waveforms_per_prompt > 1 and prompt is not None:
                audio = self._rank(as_texts("prompt", prompt), audio, num_waveforms_per_prompt, generator)
        if self._offload is not None:
            self._offload.release()
        result = audio.numpy() if output_type == "np" else audio
        return AudioPipelineOutput(result) if return_dict else (result,)

    def prepare_latents(
        self,
        batch: int,
        frames: int,
        dtype: torch.dtype,
        generator: Generator = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise that denoising starts from, (batch, channels, frames/4, mels/4): drawn, or `latents`
        checked.

        Raises:
            ValueError: a list of generators or given latents that do not match the batch; latents of another
                number of channels or mel bands. Their length is free.
        """
        scale = self.vae.downsampling
        shape = (
            batch,
            self.unet.config.in_channels,
            frames // scale,
            self.vocoder.config.model_in_dim // scale,
        )
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators for {batch} waveforms; give one, or one a waveform"
            )
        if latents is None:
            latents = randn(shape, generator, self.device, dtype)
        elif latents.dim() != 4 or (*latents.shape[:2], latents.shape[3]) != (*shape[:2], shape[3]):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}; ({batch}, {shape[1]}, any, {shape[3]}) is needed"
            )
        return latents.to(self.device, dtype) * self.scheduler.init_noise_sigma

    def _denoise(
        self,
        latents: Tensor,
        conditions: Encoded,
        guidance_scale: float,
        eta: float,
        generator: Generator,
        callback: Callable[[int, Tensor, Tensor], None] | None,
        callback_steps: int,
    ) -> Tensor:
        """From noise to latents, one step of the scheduler after the other."""
        # Any sampler with this interface will do. Not every one adds noise, and takes these.
        scheduler: Any = self.scheduler
        takes = inspect.signature(scheduler.step).parameters
        options = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in takes}
        timesteps = scheduler.timesteps
        predict = self._predictor(conditions, timesteps, rows=len(latents))
        with self._bar("Denoising", len(timesteps)) as bar:
            for step, t in enumerate(timesteps):
                noise = predict(step, scheduler.scale_model_input(latents, t))
                if len(noise) > len(latents):
                    nothing, prompted = noise.chunk(2)
                    noise = nothing + guidance_scale * (prompted - nothing)
                latents = scheduler.step(noise, t, latents, **options).prev_sample
                if callback is not None and step % callback_steps == 0:
                    callback(step, t, latents)
                bar.update()
        return latents

    def _predictor(
        self, conditions: Encoded, timesteps: Tensor, rows: int
    ) -> Callable[[int, Tensor], Tensor]:
        """The UNet's part of a step, from the step's number and scaled latents (`rows`, ...) to the noise.

        The noise has as many rows as the conditions. What is the same at every step is computed here: the
        keys and values of all cross-attentions, and the embedded times.
        """
        unet = self._ready(self.unet)
        dtype = stage_dtype(unet)
        vectors, states, mask = (x.to(dtype) if x.is_floating_point() else x for x in conditions)
        watched = unet._forward_hooks or unet._forward_pre_hooks or unet._compiled_call_impl
        if type(unet).forward is not UNet.forward or watched:
            # Somebody's own, or somebody waits for its calls: it is called as a whole.
            sides = len(vectors) // rows
            return lambda step, x: unet(
                x.repeat(sides, 1, 1, 1).to(dtype), timesteps[step], vectors, states, mask
            )
        if "unet" in self._compiled:
            added = rounded_up(states.shape[1], BUCKET) - states.shape[1]
            states, mask = F.pad(states, (0, 0, 0, added)), F.pad(mask, (0, added))
        contexts = unet.contexts(vectors, states, mask)
        times = unet.time_embedding(timesteps)
        return lambda step, x: self._kept("unet", unet.denoise(x.to(dtype), times[step : step + 1], contexts))

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 8, T/4, F/4) -> log-mel spectrogram (B, 1, T, F)."""
        vae = self._ready(self.vae)
        latents = (latents / vae.config.scaling_factor).to(stage_dtype(vae))
        frames = CHUNK // vae.downsampling
        groups = _groups(latents, frames)
        with self._bar("Decoding", len(groups)) as bar:
            mels = []
            for group in groups:
                long = group.shape[2] > frames
                mel = vae.decode_in_chunks(group, frames) if long else vae.decode(group)
                mels.append(self._kept("vae", mel))
                bar.update()
        return torch.cat(mels)

    def _vocode(self, mel: Tensor) -> Tensor:
        """Log-mel spectrogram (B, 1, T, F) -> waveform (B, samples), float32, in main memory."""
        vocoder = self._ready(self.vocoder)
        mel = rearrange(mel, "b 1 t f -> b t f").to(stage_dtype(vocoder))
        groups = _groups(mel, CHUNK, axis=1)
        with self._bar("Vocoding", len(groups)) as bar:
            waveforms = []
            for group in groups:
                vocode = vocoder.in_chunks if group.shape[1] > CHUNK else vocoder
                waveforms.append(vocode(group).float().cpu())
                bar.update()
        return torch.cat(waveforms)

    def _rank(self, texts: list[str], audio: Tensor, candidates: int, generator: Generator) -> Tensor:
        """Sort each prompt's candidates by how well CLAP thinks they fit, best first; (B, samples) in and
        out.

        diffusers sorts over the whole batch, which can hand a prompt another prompt's waveform; here
        candidates stay with their prompt.
        """
        with self._bar("Ranking", 1) as bar:
            clap = self._ready(self.text_encoder)
            heard = resample(
                audio.to(self.device),
                self.vocoder.config.sampling_rate,
                self.feature_extractor.config.sampling_rate,
            )
            first = generator[0] if isinstance(generator, Sequence) else generator
            features = self.feature_extractor(heard, self.feature_extractor.config.sampling_rate, first)
            sound = clap.audio_features(features.to(stage_dtype(clap)))  # (prompts · candidates, P)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what was cut from the prompt was said when it was encoded
                ids, mask = self._bucketed("text_encoder", *self._tokenize(self.tokenizer, texts))
                text = clap.text_features(ids, mask)  # (prompts, P)
            sound = rearrange(sound, "(b n) p -> b n p", n=candidates)
            fit = torch.einsum("bnp,bp->bn", sound, text)
            order = fit.argsort(dim=1, descending=True, stable=True).cpu()
            bar.update()
        rows = rearrange(torch.arange(len(audio)), "(b n) -> b n", n=candidates).gather(1, order)
        return audio[rows.flatten()]

    def _lengths(self, audio_length_in_s: float | None) -> tuple[int, int]:
        """Seconds -> mel frames, a multiple of the VAE's factor, and samples kept of what they give."""
        vocoder, scale = self.vocoder.config, self.vae.downsampling
        seconds_a_frame = math.prod(vocoder.upsample_rates) / vocoder.sampling_rate
        if audio_length_in_s is None:
            size = self.unet.config.sample_size
            size = size[0] if isinstance(size, tuple) else size
            if size is None:
                raise ValueError(
                    "pass audio_length_in_s: this checkpoint does not say how long its sounds are"
                )
            audio_length_in_s = size * scale * seconds_a_frame
        check_length(audio_length_in_s, shortest=scale * seconds_a_frame)
        frames = math.ceil(int(audio_length_in_s / seconds_a_frame) / scale) * scale
        return frames, int(audio_length_in_s * vocoder.sampling_rate)


def _groups(x: Tensor, longest: int, axis: int = 2) -> tuple[Tensor, ...]:
    """The rows of a batch in groups of one size, each no longer in all than `longest` where it is several."""
    most = max(1, longest // x.shape[axis])
    size = max(n for n in range(1, min(most, len(x)) + 1) if len(x) % n == 0)
    return x.split(size)


# --- arguments


def _spoken(value: Any, batch: int, encoder: nn.Module) -> list[str] | None:
    """The transcriptions, checked against what the checkpoint can do."""
    if not isinstance(encoder, VitsTextEncoder):
        if value is not None:
            raise ValueError("transcription is for the speech checkpoints; this one only takes a prompt")
        return None
    if value is None:
        raise ValueError("this checkpoint speaks: pass transcription, the words to say")
    texts = as_texts("transcription", value)
    if len(texts) != batch:
        raise ValueError(f"{len(texts)} transcriptions for {batch} prompts; give one a prompt")
    return texts


def _given(
    name: str,
    text: Any,
    states: Tensor | None,
    vectors: Tensor | None,
    mask: Tensor | None,
    encoder: nn.Module,
) -> Encoded | None:
    """Embeddings that were passed in place of a text, checked; None where there are none."""
    prefix = name.removesuffix("prompt")
    names = [f"{prefix}prompt_embeds", f"{prefix}generated_prompt_embeds", f"{prefix}attention_mask"]
    if states is None and vectors is None and mask is None:
        if text is None and name == "prompt":
            raise ValueError("pass prompt, or prompt_embeds and generated_prompt_embeds")
        return None
    if text is not None:
        raise ValueError(f"pass {name} or its embeddings ({', '.join(names)}), not both")
    if states is None or vectors is None:
        raise ValueError(f"{names[0]} and {names[1]} go together; one is missing")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    if (
        states.dim() != 3
        or vectors.dim() != 3
        or len(states) != len(vectors)
        or mask.shape != states.shape[:2]
    ):
        raise ValueError(
            f"{names[0]} {tuple(states.shape)}, {names[1]} {tuple(vectors.shape)} and {names[2]} "
            f"{tuple(mask.shape)} do not match; (B, N, width), (B, 8, width) and (B, N) do"
        )
    return states, mask, vectors


def _aligned(negative: Encoded, positive: Encoded) -> list[Encoded]:
    """Both sides of guidance of one length, as one batch needs them: padded where the mask hides it."""
    if len(negative[0]) != len(positive[0]) or negative[2].shape != positive[2].shape:
        raise ValueError(
            f"negative embeddings {tuple(negative[0].shape)} and {tuple(negative[2].shape)} do not go "
            f"with the prompt's, {tuple(positive[0].shape)} and {tuple(positive[2].shape)}"
        )
    length = max(negative[0].shape[1], positive[0].shape[1])

    def padded(side: Encoded) -> Encoded:
        states, mask, vectors = side
        missing = length - mask.shape[1]
        return nn.functional.pad(states, (0, 0, 0, missing)), nn.functional.pad(mask, (0, missing)), vectors

    return [padded(negative), padded(positive)]


def _end_of_speech(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put VITS's end token in the place of each row's first padding, which is 0; (B, N) both."""
    padding = ids == 0
    first = padding & (padding.cumsum(dim=1) == 1)
    return ids.masked_fill(first, VITS_END_TOKEN), mask.masked_fill(first, 1)
