"""Scoring sounds with CLAP, and ordering the candidates of each prompt by score.

CLAP maps text and sound into a shared space (Wu et al. 2023). The score of a sound is the cosine similarity
of its embedding and the prompt's. diffusers ranks over the whole batch, where a prompt can be handed another
prompt's sound; here candidates stay with their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audioldm2.audio.resample import resample
from audioldm2.noise import Generators
from audioldm2.runtime.foreign import setting
from audioldm2.runtime.precision import stage_device, stage_dtype
from audioldm2.tensors import check_finite


def score(
    text_encoder: Any,
    feature_extractor: Any,
    text_embeddings: Tensor,
    audio: Tensor,
    sampling_rate: int,
    generator: Generators = None,
) -> Tensor:
    """Score how well sounds match their prompts.

    Args:
        text_encoder: CLAP.
        feature_extractor: its log-mel front end.
        text_embeddings: CLAP's embeddings of the prompts, (prompts, P), of unit length.
        audio: n candidates per prompt, those of one prompt together, (prompts * n, samples).
        sampling_rate: of `audio`, in Hz.
        generator: draws the excerpt of sounds longer than CLAP's window; of a list with one for each sound,
            that of a prompt's first one draws for all of the prompt's.

    Returns:
        Cosine similarities, (prompts, n).
    """
    rate = clap_rate(feature_extractor)
    resampled = resample(audio.to(stage_device(text_encoder)), sampling_rate, rate)
    if isinstance(generator, Sequence) and len(generator) > 1:
        count = len(audio) // len(text_embeddings)
        of_prompts = zip(resampled.split(count), generator[::count], strict=True)
        features = torch.cat([feature_extractor(sounds, rate, one) for sounds, one in of_prompts])
    else:
        one = generator[0] if isinstance(generator, Sequence) else generator
        features = feature_extractor(resampled, rate, one)
    sound_embeddings = embed_features(text_encoder, features)
    sound_embeddings = rearrange(sound_embeddings, "(b n) p -> b n p", b=len(text_embeddings))
    return torch.einsum("bnp,bp->bn", sound_embeddings, text_embeddings.to(sound_embeddings))


def clap_rate(feature_extractor: Any) -> int:
    """The sampling rate in Hz of the sounds that a log-mel front end of CLAP takes."""
    rate: int = setting(feature_extractor, "sampling_rate") or feature_extractor.sampling_rate
    return rate


def embed_features(text_encoder: Any, features: Tensor) -> Tensor:
    """Embed sounds with CLAP.

    Args:
        text_encoder: CLAP.
        features: from its front end, (B, 1, frames, mels).

    Returns:
        (B, P), of unit length.

    Raises:
        NonFiniteError: CLAP returned numbers that are not finite.
    """
    embeddings: Tensor = text_encoder.audio_features(input_features=features.to(stage_dtype(text_encoder)))
    check_finite("text_encoder", embeddings)
    return embeddings


def best_first(audio: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Order the candidates of each prompt by their scores, best first.

    Args:
        audio: n candidates per prompt, those of one prompt together, (prompts * n, samples).
        scores: (prompts, n).

    Returns:
        audio: in the new order.
        scores: in the same order, (prompts * n,).
    """
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    rows = rearrange(torch.arange(len(audio), device=audio.device), "(b n) -> b n", b=len(scores))
    return audio[rows.gather(1, order.to(audio.device)).flatten()], scores.flatten()
