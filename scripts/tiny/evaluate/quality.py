"""The quality of presets: what each loses against the reference, on the tiny checkpoint.

Each setting generates the same prompts from the same noise, for each of several seeds:

  right      the share of prompts that `criteria.matches` finds obeyed
  frechet    Fréchet distance of CLAP's embeddings from one synthesized sound of each prompt
  clap       CLAP score of the prompts
  distance   of the latents from those of 200 steps, in percent of their root mean square
  log_mel    distance of the spectrograms from those of 200 steps, in dB

All prompts count in the first. The others are measured on every fourth prompt. The spread over the seeds says
which differences mean something; the last two are measured with the first seed alone, since they compare each
sound with the one that it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev

import numpy as np
import torch

from audioldm2 import AudioLDM2Pipeline, Quality
from audioldm2.metrics import embed_sounds, embed_texts, frechet_distance, log_mel_distance
from scripts.tiny.data.sounds import SAMPLING_RATE
from scripts.tiny.evaluate.evaluation import judge, share_right
from scripts.tiny.evaluate.generation import generate_once, latent_distance
from scripts.tiny.evaluate.prompts import Prompt

LIMIT = Quality("dpmsolver++", 200)  # stands for the converged result; 200 DDIM steps are 3.4 % away from it
EVERY = 4  # every fourth prompt is embedded, and compared with LIMIT


@dataclass(frozen=True)
class Setting:
    """How sounds are generated.

    Attributes:
        name: in tables.
        quality: sampler, steps, and what is saved.
        dtype: of all stages.
    """

    name: str
    quality: Quality
    dtype: str = "float32"

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}"


@dataclass(frozen=True)
class QualityScore:
    """What a setting's sounds are worth; tuples have one value for each seed."""

    right: tuple[float, ...]
    frechet: tuple[float, ...]
    clap: tuple[float, ...]
    distance: float
    log_mel: float


def measure_quality(
    load: Callable[[torch.dtype], AudioLDM2Pipeline],
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    *,
    guidance: float,
    batch: int,
    seeds: int,
) -> Iterator[tuple[Setting, QualityScore]]:
    """Measure settings, and yield each as soon as it is measured.

    Args:
        load: gives a pipeline in a dtype.
        prompts: what to generate.
        settings: what to measure.
        guidance: its scale.
        batch: sounds generated at once, at most.
        seeds: of the noise, for each prompt.
    """
    pipe = load(torch.float32)
    some = [*prompts[::EVERY]]
    generate = partial(generate_once, guidance=guidance, batch=batch)
    limit = generate(pipe, some, LIMIT, title="200 steps")
    real = embed_sounds(pipe, np.stack([prompt.real() for prompt in some]), SAMPLING_RATE)
    texts = embed_texts(pipe, [prompt.text for prompt in some])
    for setting in settings:
        contender = load(getattr(torch, setting.dtype))
        runs = [
            generate(contender, prompts, setting.quality, title=f"{setting.title}, seed {seed}", seed=seed)
            for seed in range(seeds)
        ]
        first, sounds = runs[0], [run.sounds[::EVERY] for run in runs]
        # The judges are the same for all dtypes.
        embeddings = [embed_sounds(pipe, one, SAMPLING_RATE) for one in sounds]
        yield (
            setting,
            QualityScore(
                right=tuple(share_right(judge(prompts, run.sounds, "Judging")) for run in runs),
                frechet=tuple(frechet_distance(real, rows) for rows in embeddings),
                clap=tuple(float(torch.cosine_similarity(rows, texts).mean()) for rows in embeddings),
                distance=latent_distance(first.latents[::EVERY], limit.latents),
                log_mel=float(log_mel_distance(sounds[0], limit.sounds, SAMPLING_RATE).mean()),
            ),
        )


def measure_distances(
    load: Callable[[torch.dtype], AudioLDM2Pipeline],
    prompts: Sequence[Prompt],
    qualities: Sequence[Quality],
    *,
    guidance: float,
    batch: int,
) -> Iterator[tuple[Quality, float]]:
    """Measure only the log-mel distance from 200 steps in dB, in float32, on every fourth prompt."""
    pipe, some = load(torch.float32), [*prompts[::EVERY]]
    limit = generate_once(pipe, some, LIMIT, guidance=guidance, batch=batch, title="200 steps")
    for quality in qualities:
        title = f"{quality.sampler}, {quality.steps} steps"
        found = generate_once(pipe, some, quality, guidance=guidance, batch=batch, title=title)
        yield quality, float(log_mel_distance(found.sounds, limit.sounds, SAMPLING_RATE).mean())


def with_spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """The mean and the standard deviation, as text."""
    scaled = [factor * value for value in values]
    text = f"{mean(scaled):.{digits}f}"
    return f"{text} ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else text
