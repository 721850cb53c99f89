"""GPT-2's loss: from what the text encoders say to the "language of audio", a few vectors for each sound.

The targets describe the sound: AudioLDM 2 pools the features of an AudioMAE (`pool_features`); without one,
the VAE's latents serve (`pool_latents`). There are two ways to train (Liu et al. 2023, section III):

* Teacher-forced (`next_vectors`): GPT-2 sees the true vectors before the one that it predicts. One pass
  trains all positions.
* Through the generation (`generate_vectors`): GPT-2 sees its own vectors, as in the pipeline, and errors are
  propagated back through all of them. The UNet's loss can be, too, when both are trained together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.models.gpt2 import GPT2
from audioldm2.models.projection import ProjectionModel


def pool_features(features: Tensor, time: int = 8, frequency: int = 8) -> Tensor:
    """GPT-2's targets from an AudioMAE's features: means of average and maximum over patches.

    Args:
        features: (B, C, T, F), of a spectrogram's patches: (B, 768, 64, 8) for ten seconds.
        time: patches that are pooled along the time; 8 in AudioLDM 2.
        frequency: patches that are pooled along the frequency; 8 in AudioLDM 2.

    Returns:
        (B, T / time · F / frequency, C), frequencies of the first stretch of time first.
    """
    size = (time, frequency)
    pooled = (F.avg_pool2d(features, size) + F.max_pool2d(features, size)) / 2
    return rearrange(pooled, "b c t f -> b (t f) c")


def pool_latents(latents: Tensor, count: int) -> Tensor:
    """GPT-2's targets from the VAE's latents: means over equal parts of the time and pairs of frequencies.

    Args:
        latents: (B, C, T, F).
        count: the number of vectors, GPT-2's `max_new_tokens`.

    Returns:
        (B, count, C · F / 2), not standardized.
    """
    return rearrange(F.adaptive_avg_pool2d(latents, (count, latents.shape[3] // 2)), "b c n f -> b n (c f)")


def generate_vectors(
    projection: ProjectionModel, gpt2: GPT2, clap: Tensor, states: Tensor, mask: Tensor
) -> Tensor:
    """The vectors that the pipeline would have GPT-2 generate.

    Args:
        projection: the projection model.
        gpt2: the language model.
        clap: CLAP's features, (B, 1, P).
        states: T5's states, (B, M, D).
        mask: of the states, (B, M), 1 for tokens and 0 for padding.

    Returns:
        (B, max_new_tokens, C), with gradients for both models.
    """
    return gpt2.generate(*projection(clap, states, mask.new_ones(len(clap), 1), mask))


def next_vectors(
    projection: ProjectionModel, gpt2: GPT2, clap: Tensor, states: Tensor, mask: Tensor, targets: Tensor
) -> Tensor:
    """What GPT-2 predicts for each target from the targets before it (teacher forcing).

    Args:
        projection: the projection model.
        gpt2: the language model.
        clap: CLAP's features, (B, 1, P).
        states: T5's states, (B, M, D).
        mask: of the states, (B, M), 1 for tokens and 0 for padding.
        targets: (B, N, C), of GPT-2's width.

    Returns:
        (B, N, C): vector n depends on the text and on targets 0 to n - 1.

    Raises:
        ValueError: the targets are not as wide as GPT-2's vectors.
    """
    if targets.shape[-1] != gpt2.config.n_embd:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; GPT-2 can only read vectors of its own width, "
            f"{gpt2.config.n_embd}: train through generate_vectors instead"
        )
    sequence, sequence_mask = projection(clap, states, mask.new_ones(len(clap), 1), mask)
    before = targets[:, :-1]
    sequence_mask = torch.cat([sequence_mask, sequence_mask.new_ones(before.shape[:2])], dim=1)
    out: Tensor = gpt2(torch.cat([sequence, before], dim=1), sequence_mask)
    return out[:, -targets.shape[1] :]


def weighted_squared_error(vectors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean squared error of the first D channels of `vectors`.

    Args:
        vectors: (B, N, C).
        targets: (B, N, D) with D at most C; the other channels of the vectors are free.
        weights: of the D channels, (D,).
    """
    return (weights * (vectors[..., : targets.shape[-1]] - targets).square()).mean()
