"""Generating the sounds of prompts, so that each depends only on its prompt and seed, not on its batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, Quality
from scripts.tiny.data.sounds import CLIP_SAMPLES, CLIP_SECONDS
from scripts.tiny.evaluate.prompts import Prompt

SEED_STRIDE = 1_000_000  # further apart than the seeds of prompts


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


class Generated(NamedTuple):
    """What `generate_once` returns, in the order of the prompts.

    Attributes:
        sounds: (n, samples).
        latents: (n, C, T, F) float32.
        seconds: in all, not counting a first batch as warm-up.
    """

    sounds: np.ndarray
    latents: Tensor
    seconds: float


def generate_once(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    quality: Quality,
    *,
    guidance: float,
    batch: int,
    title: str,
    seed: int = 0,
) -> Generated:
    """Generate one sound of each prompt, and time it.

    Args:
        pipe: the pipeline.
        prompts: what to generate.
        quality: how.
        guidance: its scale.
        batch: sounds generated at once, at most.
        title: of the progress bar.
        seed: another one gives each prompt other noise.
    """
    sounds: dict[int, np.ndarray] = {}
    latents: dict[int, Tensor] = {}

    def make(indices: list[int], quality: Quality) -> tuple[np.ndarray, Tensor]:
        seen: list[Tensor] = []
        audios = pipe(
            [prompts[i].text for i in indices],
            audio_length_in_s=CLIP_SECONDS,
            quality=quality,
            guidance_scale=guidance,
            latents=torch.cat([seeded_noise(pipe, prompts[i].seed + SEED_STRIDE * seed) for i in indices]),
            callback=lambda step, t, latents: seen.append(latents),
        ).audios
        return audios, seen[-1].float().cpu()

    batches = [*equal_length_batches(pipe, prompts, batch)]
    make(batches[0], Quality(quality.sampler, 2))
    seconds = 0.0
    with tqdm(total=len(prompts), desc=title, disable=None) as bar:
        for indices in batches:
            start = time.perf_counter()
            audios, rows = make(indices, quality)
            seconds += time.perf_counter() - start
            sounds.update(zip(indices, audios, strict=True))
            latents.update(zip(indices, rows, strict=True))
            bar.update(len(indices))
    order = range(len(prompts))
    return Generated(np.stack([sounds[i] for i in order]), torch.stack([latents[i] for i in order]), seconds)


def latent_distance(latents: Tensor, reference: Tensor) -> float:
    """The root mean square of the difference over that of the reference, in percent."""
    return 100 * ((latents - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()).item()
