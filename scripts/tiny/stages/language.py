"""Train the projection and GPT-2: from a caption, as both encoders read it, to the "language of audio".

GPT-2 generates eight vectors, each fed back as in the pipeline. Each is trained to describe one eighth of
the sound's time: the mean of the VAE's latents there, standardized over the library. AudioLDM 2 regresses
pooled features of an AudioMAE (Liu et al. 2023, section III); there is no AudioMAE here, and the latents are
what the UNet has to produce. The loss is the squared error, back-propagated through the whole generation,
and each channel of the latents is weighted by how audible it is (`latents.channel_weights`).

Frequencies are averaged in pairs, so the target fills only half of a vector. The other half is free: GPT-2's
last layer norm gives every vector the same length, and without free channels it could not express both
silence and noise.

A caption leaves things open (the start, the exact pitch), so the best prediction is the mean of all sounds
that fit, and part of the variance stays unexplained. The empty prompt, which guidance steers away from, is
to give the mean of all sounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models import GPT2, VAE, ClapModel, ProjectionModel, T5Encoder
from audioldm2.models.gpt2 import GPT2Config
from audioldm2.models.projection import ProjectionConfig
from audioldm2.training.language import generate_vectors, pool_latents, weighted_squared_error
from audioldm2.training.loop import train
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import SAMPLING_RATE, draw_scene, render
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, vary_caption
from scripts.tiny.run import Run
from scripts.tiny.sizes import HOP_LENGTH, TINY
from scripts.tiny.stages.latents import channel_weights, library_latents

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 64, 2e-3
EMPTY_PROMPT_PROBABILITY = 0.05
UNSEEN_SOUNDS = 200  # that the result is measured on


def train_language(library: Library, run: Run) -> None:
    """Train with the run's CLAP, T5 and VAE; write `projection_model` and `language_model`."""
    torch.manual_seed(run.seed)
    projection = ProjectionModel(ProjectionConfig.from_dict(TINY["projection_model"])).to(run.device)
    gpt2 = GPT2(GPT2Config.from_dict(TINY["language_model"])).to(run.device)
    encoders = (
        ClapModel.from_pretrained(run.checkpoint, "text_encoder", device=run.device),
        T5Encoder.from_pretrained(run.checkpoint, "text_encoder_2", device=run.device),
    )
    tokenizers = read_tokenizers(run)
    vectors = pool_latents(library_latents(library, run), gpt2.config.max_new_tokens)
    mean, scale = vectors.mean(dim=(0, 1)), vectors.std(dim=(0, 1))
    targets = (vectors - mean) / scale
    vae = VAE.from_pretrained(run.checkpoint, "vae", device=run.device)
    weights = channel_weights(vae, library, run).flatten()  # (C,)
    weights = weights.repeat_interleave(targets.shape[-1] // len(weights))  # (C · F/2,)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = library.draw(run.batch_or(BATCH_SIZE), generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        texts = [
            ""
            if rng.random() < EMPTY_PROMPT_PROBABILITY
            else vary_caption(caption(library.scenes[i], rng), rng)
            for i in batch
        ]
        predicted = generate_vectors(projection, gpt2, *encode(encoders, tokenizers, texts, run.device))
        return {"loss": weighted_squared_error(predicted, targets[batch].to(run.device), weights)}

    parts = nn.ModuleDict({"projection_model": projection, "language_model": gpt2})
    train("language", parts, loss, run, steps=TRAINING_STEPS, rate=LEARNING_RATE, average=0.995)
    projection.save_pretrained(run.checkpoint / "projection_model")
    gpt2.save_pretrained(run.checkpoint / "language_model")

    with torch.no_grad():
        rng = np.random.default_rng([1, 3])
        scenes = [draw_scene(rng) for _ in range(UNSEEN_SOUNDS)]
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes]))
        mels = LogMel(LogMelConfig(hop_length=HOP_LENGTH))(waveforms, SAMPLING_RATE)
        latents = vae.encode(mels.to(run.device)).mode().cpu()
        unseen = (pool_latents(latents, gpt2.config.max_new_tokens) - mean) / scale
        texts = [caption(scene, rng, held_out=True) for scene in scenes]
        predicted = generate_vectors(projection, gpt2, *encode(encoders, tokenizers, texts, run.device)).cpu()
        weights = weights.cpu()
        error = weighted_squared_error(predicted, unseen, weights)
        explained = 1 - error / weighted_squared_error(torch.zeros_like(predicted), unseen, weights)
    print(f"language: held-out captions explain {explained:.1%} of the variance of unseen sounds")


@torch.no_grad()
def encode(
    encoders: tuple[ClapModel, T5Encoder], tokenizers: tuple[Any, Any], texts: list[str], device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The projection's inputs for texts: CLAP's features (B, 1, P), T5's states (B, M, C) and their mask."""
    clap, t5 = encoders
    ids, mask = tokenize(tokenizers[1], texts, device)
    return clap.text_features(*tokenize(tokenizers[0], texts, device))[:, None], t5(ids, mask), mask
