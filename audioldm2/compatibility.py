"""The methods of diffusers' pipeline that scripts use and that are not steps of our own `__call__`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from audioldm2.arguments import GUIDANCE, as_texts, check_count
from audioldm2.checkpoints.formats import pipeline_config
from audioldm2.conditioning import Text, clap_embeddings
from audioldm2.noise import Generators
from audioldm2.runtime.device import named_device
from audioldm2.runtime.precision import check_dtype, stage_device, stage_dtype
from audioldm2.runtime.progress import notebook_screen, progress_bar, tqdm
from audioldm2.runtime.stages import StageRunner
from audioldm2.sampling import CALLBACK_TENSORS, initial_noise
from audioldm2.tensors import check_finite, check_tensor


class DiffusersMethods(StageRunner, ABC):
    """Base class of this package's pipeline: what diffusers' has besides `__call__`."""

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    projection_model: Any
    language_model: Any
    feature_extractor: Any
    scheduler: Any
    other_parts: ClassVar[tuple[str, ...]]  # besides the stages: tokenizers, feature extractor and scheduler
    _name_or_path: str
    _revision: str | None
    _variant: str | None

    @abstractmethod
    def vocode(self, mel: Tensor, loop: bool = False) -> Tensor:
        """Turn log-mel spectrograms into waveforms."""

    @abstractmethod
    def rank(
        self, audio: Tensor, text_embeddings: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """Order the candidates of each prompt by CLAP's score, best first."""

    @property
    def components(self) -> dict[str, Any]:
        """All parts by name, as another pipeline takes them: `AudioLDM2Pipeline(**pipe.components)`."""
        return {name: getattr(self, name) for name in (*self.stage_names, *self.other_parts)}

    @property
    def config(self) -> Mapping[str, Any]:
        """What model_index.json would contain (the library and class of each part), and `_name_or_path`."""
        return pipeline_config(self.components, self._name_or_path)

    @property
    def name_or_path(self) -> str:
        """What the pipeline was loaded from; "" if it was made from parts."""
        return self._name_or_path

    @property
    def revision(self) -> str | None:
        """Which version of `name_or_path` was loaded; None if the pipeline was made from parts.

        A commit for a repository on the Hub, this package's version for "tiny", and a digest of the names,
        sizes and times of its files for another folder.
        """
        return self._revision

    @property
    def variant(self) -> str | None:
        """The variant of the weights that was loaded, such as "fp16"; None for the main one."""
        return self._variant

    def __repr__(self) -> str:
        sizes = {name: sum(p.numel() for p in stage.parameters()) for name, stage in self.stages.items()}
        source = f" {self.name_or_path!r}" if self.name_or_path else ""
        dtype = _dtype_name(self.dtype)
        lines = [f"{type(self).__name__}{source} on {self.device}, {dtype}, {_count(sum(sizes.values()))}"]
        for name, part in self.components.items():
            details = ""
            if name in sizes:
                details = f", {_count(sizes[name])}"
                if stage_dtype(part) != self.dtype:
                    details += f", {_dtype_name(stage_dtype(part))}"
                if stage_device(part) != stage_device(getattr(self, self.main_stage)):
                    details += f", on {stage_device(part)}"
            lines.append(f"  {name}: {type(part).__name__}{details}")
        return "\n".join(lines)

    @property
    def vae_scale_factor(self) -> int:
        """Mel frames, and mel bands, per latent: 4 in AudioLDM 2."""
        factor: int = self.part("vae").downsampling
        return factor

    # --- what a callback can read; it can also change the scale

    _callback_tensor_inputs: ClassVar[Sequence[str]] = CALLBACK_TENSORS
    _guidance_scale: float = GUIDANCE
    _num_timesteps: int = 0
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """The scale of the current or last generation; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of the scheduler's timesteps in the current or last generation."""
        return self._num_timesteps

    @contextmanager
    def _run_of(self, num_timesteps: int, guidance_scale: float) -> Iterator[None]:
        """Set what callbacks can read; a generation that a callback starts restores it at its end."""
        outer = self._num_timesteps, self._guidance_scale
        self._num_timesteps, self._guidance_scale = num_timesteps, guidance_scale
        self._interrupt = False
        try:
            yield
        finally:
            if self._depth > 1:
                self._num_timesteps, self._guidance_scale = outer
                self._interrupt = False

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    # --- steps of a generation

    @torch.no_grad()
    def generate_language_model(
        self,
        inputs_embeds: Tensor,
        max_new_tokens: int | None = 8,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue a sequence with GPT-2.

        Args:
            inputs_embeds: the projection model's output, (B, N, C).
            max_new_tokens: how many vectors; None is the number in GPT-2's config.
            attention_mask: (B, N), 1 for tokens and 0 for padding; all ones by default.

        Returns:
            The new vectors, (B, max_new_tokens, C).

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
        """
        check_tensor("inputs_embeds", inputs_embeds, "(B, N, C)")
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, "(B, N)", floating=False)
        with self.generation(), self.running("language_model") as gpt2:
            inputs_embeds = inputs_embeds.to(stage_dtype(gpt2))
            vectors: Tensor = gpt2.generate(inputs_embeds, attention_mask, max_new_tokens)
        check_finite("language_model", vectors)
        return vectors

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise that denoising starts from, at the scheduler's first noise level.

        Args:
            batch_size: number of sounds, B.
            num_channels_latents: channels of the latents, as in the VAE's config (8).
            height: mel frames T, a multiple of `vae_scale_factor`.
            dtype: of the result.
            device: of the result; the pipeline's by default.
            generator: draws the noise; a list has one for each sound.
            latents: noise to use instead, of the shape of the result.

        Returns:
            (B, channels, T/4, F/4), for F mel bands.

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
        """
        for name, count in (("batch_size", batch_size), ("num_channels_latents", num_channels_latents)):
            check_count(name, count)
        check_count("height", height, lowest=self.vae_scale_factor)
        bands = self.part("vocoder").config.model_in_dim // self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, bands)
        check_dtype(dtype)
        device = self.device if device is None else named_device(device)
        noise = initial_noise(shape, generator, device, dtype, latents)
        scaled: Tensor = noise * self.scheduler.init_noise_sigma
        return scaled

    def mel_spectrogram_to_waveform(self, mel_spectrogram: Tensor) -> Tensor:
        """Turn log-mel spectrograms into waveforms; `vocode` under the name that it has in diffusers.

        Args:
            mel_spectrogram: (B, 1, T, F) or (B, T, F).

        Returns:
            (B, samples) in [-1, 1], float32, on the CPU.
        """
        with_channel = not isinstance(mel_spectrogram, Tensor) or mel_spectrogram.dim() == 4
        shape = "(B, 1, T, F)" if with_channel else "(B, T, F)"
        check_tensor("mel_spectrogram", mel_spectrogram, shape)
        mel = mel_spectrogram if with_channel else mel_spectrogram[:, None]
        return self.vocode(mel)

    @torch.no_grad()
    def score_waveforms(
        self,
        text: Text,
        audio: Tensor,
        num_waveforms_per_prompt: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Order the candidates of each prompt by CLAP's score, best first.

        Args:
            text: one prompt or several.
            audio: (prompts * num_waveforms_per_prompt, samples), the candidates of one prompt together.
            num_waveforms_per_prompt: candidates per prompt.
            device: where the result goes; that of `audio` by default. CLAP runs where it is.
            dtype: CLAP's is used, so another one is refused.

        Returns:
            `audio` in the new order.

        Raises:
            ValueError, TypeError: an argument that cannot be used; the message names it.
        """
        texts = as_texts("text", text, empty=True)
        check_count("num_waveforms_per_prompt", num_waveforms_per_prompt)
        check_tensor("audio", audio, "(B, samples)")
        if len(audio) != len(texts) * num_waveforms_per_prompt:
            raise ValueError(
                f"audio has {len(audio)} sounds; {len(texts)} prompts of {num_waveforms_per_prompt} "
                f"candidates are {len(texts) * num_waveforms_per_prompt}"
            )
        if dtype is not None and dtype != stage_dtype(self.text_encoder):
            raise ValueError(f"dtype = {dtype}, but CLAP is in {stage_dtype(self.text_encoder)}")
        with self.generation():
            ranked, _ = self.rank(audio, clap_embeddings(self, texts))
        return ranked.to(audio.device if device is None else named_device(device))

    # --- switches

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """A progress bar with the options of `set_progress_bar_config`.

        Args:
            iterable: what to iterate over.
            total: number of steps, if there is no iterable.

        Raises:
            ValueError: both are given, or neither.
        """
        if (iterable is None) == (total is None):
            raise ValueError("progress_bar takes either an iterable or a total")
        return progress_bar(iterable, notebook_screen(), {"total": total, **self._progress})

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """The same as `enable_model_cpu_offload`: whole stages are moved, so the largest one must fit.

        Args:
            gpu_id: index of the GPU.
            device: where stages run.
        """
        self.enable_model_cpu_offload(gpu_id, device)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Accepted for diffusers: `scaled_dot_product_attention` works in blocks, so no slicing is needed.

        Args:
            slice_size: diffusers' "auto", "max", a number, or None; has no effect.
        """

    def disable_attention_slicing(self) -> None:
        """Accepted for diffusers; see `enable_attention_slicing`."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Accepted for diffusers; see `enable_attention_slicing`.

        Args:
            attention_op: has no effect.
        """

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Accepted for diffusers; see `enable_attention_slicing`."""

    def enable_vae_slicing(self) -> None:
        """Accepted for diffusers: batches are always decoded in groups that bound the memory.

        Long sounds are decoded in chunks as well (see `decoding`), so nothing has to be enabled.
        """

    def disable_vae_slicing(self) -> None:
        """Accepted for diffusers; see `enable_vae_slicing`."""

    def maybe_free_model_hooks(self) -> None:
        """Accepted for diffusers: a generation frees the offload device at its end by itself."""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(parameters: int) -> str:
    """A number of parameters in millions, or in thousands below a tenth of a million."""
    size = f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"
    return f"{size} parameters"
