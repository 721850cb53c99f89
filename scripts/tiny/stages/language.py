"""Train the projection and GPT-2: from a caption, as both encoders read it, to the "language of audio".

GPT-2 generates eight vectors, each fed back as in the pipeline, and each is to be what the sound is like in
one eighth of its time: the mean of the latents of the VAE there, standardised over the library. AudioLDM 2
regresses pooled features of an AudioMAE so (Liu et al. 2023, section III); there is none here, and latents
are what the UNet has to make. The loss is the squared error, through the whole generation; each channel of
the latents counts as much as it is heard.

Frequencies are taken in pairs, so that this fills half of a vector only. The other half is GPT-2's to choose:
its last layer norm gives all vectors one length, and with no channel to spare it could not say both silence
and noise.

A caption does not say everything of its sound (when it begins, its exact pitch), so the best guess is the
mean of all sounds that fit, and a part of the variance stays unexplained. An empty prompt, which guidance
turns away from, is to give the mean of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models import GPT2, VAE, ClapModel, ProjectionModel, T5Encoder
from audioldm2.models.gpt2 import GPT2Config
from audioldm2.models.projection import ProjectionConfig
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import SAMPLING_RATE, draw_scene, render
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, varied
from scripts.tiny.loop import Run, train
from scripts.tiny.sizes import HOP, SIZES
from scripts.tiny.stages.vae import importance, library_latents

STEPS, BATCH, RATE = 4000, 64, 2e-3
EMPTY = 0.05  # the part of the captions that is left empty
UNSEEN = 200  # sounds that are measured on


def train_language(library: Library, run: Run) -> None:
    """Train with the run's CLAP, T5 and VAE; write `projection_model` and `language_model`."""
    torch.manual_seed(run.seed)
    projection = ProjectionModel(ProjectionConfig.from_dict(SIZES["projection_model"])).to(run.device)
    gpt2 = GPT2(GPT2Config.from_dict(SIZES["language_model"])).to(run.device)
    encoders = (
        ClapModel.from_pretrained(run.checkpoint, "text_encoder", device=run.device),
        T5Encoder.from_pretrained(run.checkpoint, "text_encoder_2", device=run.device),
    )
    tokenizers = read_tokenizers(run)
    heard = language_of_audio(library_latents(library, run), gpt2.config.max_new_tokens)
    mean, scale = heard.mean(dim=(0, 1)), heard.std(dim=(0, 1))
    targets = (heard - mean) / scale
    vae = VAE.from_pretrained(run.checkpoint, "vae", device=run.device)
    channels = importance(vae, library, run)  # (C, 1, 1)
    weights = channels.flatten().repeat_interleave(targets.shape[-1] // len(channels))  # (C · F/2,)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = library.draw(run.size(BATCH), generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        texts = ["" if rng.random() < EMPTY else varied(caption(library.scenes[i], rng), rng) for i in batch]
        vectors = generate(projection, gpt2, *conditions(encoders, tokenizers, texts, run.device))
        return {"loss": error(vectors, targets[batch].to(run.device), weights)}

    parts = nn.ModuleDict({"projection_model": projection, "language_model": gpt2})
    train("language", parts, loss, run, steps=STEPS, rate=RATE, average=0.995)
    for name, part in parts.items():
        part.save_pretrained(run.checkpoint / name)

    with torch.no_grad():
        rng = np.random.default_rng([1, 3])
        scenes = [draw_scene(rng) for _ in range(UNSEEN)]
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes]))
        mels = LogMel(LogMelConfig(hop_length=HOP))(waveforms, SAMPLING_RATE)
        latents = vae.encode(mels.to(run.device)).mode().cpu()
        wanted = (language_of_audio(latents, gpt2.config.max_new_tokens) - mean) / scale
        texts = [caption(scene, rng, held_out=True) for scene in scenes]
        vectors = generate(projection, gpt2, *conditions(encoders, tokenizers, texts, run.device)).cpu()
        weights = weights.cpu()
        explained = 1 - error(vectors, wanted, weights) / error(torch.zeros_like(vectors), wanted, weights)
    print(f"language: captions in unseen wordings explain {explained:.1%} of the variance of unseen sounds")


def language_of_audio(latents: Tensor, count: int) -> Tensor:
    """What GPT-2 is to say of sounds: their latents (B, C, T, F) -> (B, count, C · F/2), not standardised.

    The latents' means over `count` equal parts of the time and pairs of frequencies.
    """
    return rearrange(F.adaptive_avg_pool2d(latents, (count, latents.shape[3] // 2)), "b c n f -> b n (c f)")


def error(vectors: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """The squared error of vectors (B, count, C) whose first channels are to be `wanted` (B, count, D).

    Each of those counts as `weights` (D,) say.
    """
    return (weights * (vectors[..., : wanted.shape[-1]] - wanted).square()).mean()


@torch.no_grad()
def conditions(
    encoders: tuple[ClapModel, T5Encoder], tokenizers: tuple[Any, Any], texts: list[str], device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What the projection gets of texts: CLAP's features (B, 1, P), T5's states (B, M, C) and their mask."""
    clap, t5 = encoders
    ids, mask = tokenize(tokenizers[1], texts, device)
    return clap.text_features(*tokenize(tokenizers[0], texts, device))[:, None], t5(ids, mask), mask


def generate(projection: ProjectionModel, gpt2: GPT2, clap: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The vectors that the pipeline would have GPT-2 generate, (B, 8, C)."""
    return gpt2.generate(*projection(clap, states, mask.new_ones(len(clap), 1), mask))
