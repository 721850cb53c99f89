"""Generating the sounds of prompts, so that each depends only on its prompt and seed, not on its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline
from scripts.tiny.data.sounds import CLIP_SAMPLES, CLIP_SECONDS
from scripts.tiny.evaluate.prompts import Prompt


def seeded_noise(pipe: AudioLDM2Pipeline, seed: int, count: int = 1) -> Tensor:
    """The initial latents of `count` clips, (count, C, T, F) float32; they depend on the seed alone."""
    scale, mels = pipe.vae.downsampling, pipe.vocoder.config.model_in_dim
    frames = CLIP_SAMPLES // pipe.vocoder.hop_length
    shape = (count, pipe.unet.config.in_channels, frames // scale, mels // scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal_length_batches(
    pipe: AudioLDM2Pipeline, prompts: Sequence[Prompt], size: int
) -> Iterator[list[int]]:
    """The prompts' indices in batches of texts with equally many tokens, which need no padding.

    Padding would change what the UNet attends to, and so the sound.
    """
    lengths = [len(pipe.tokenizer_2(prompt.text, verbose=False).input_ids) for prompt in prompts]
    for length in sorted({*lengths}):
        indices = [i for i, other in enumerate(lengths) if other == length]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def generate(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float,
    batch: int,
    candidates: int = 1,
    title: str = "Generating",
) -> np.ndarray:
    """Generate the sounds of prompts.

    Args:
        pipe: the pipeline, with its sampler.
        prompts: what to generate.
        steps: of the sampler.
        guidance: its scale.
        batch: sounds generated at once, at most.
        candidates: sounds per prompt, ranked by CLAP, best first.
        title: of the progress bar.

    Returns:
        Waveforms, (prompts, candidates, samples).
    """
    sounds: dict[int, np.ndarray] = {}
    with tqdm(total=len(prompts), desc=title, disable=None) as bar:
        for indices in equal_length_batches(pipe, prompts, max(1, batch // candidates)):
            audios = pipe(
                [prompts[i].text for i in indices],
                audio_length_in_s=CLIP_SECONDS,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_waveforms_per_prompt=candidates,
                latents=torch.cat([seeded_noise(pipe, prompts[i].seed, candidates) for i in indices]),
            ).audios
            ranked = rearrange(audios, "(b n) t -> b n t", n=candidates)
            sounds.update(zip(indices, ranked, strict=True))
            bar.update(len(indices))
    return np.stack([sounds[i] for i in range(len(prompts))])
