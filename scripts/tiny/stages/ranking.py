"""Train CLAP's audio tower further, for what the pipeline asks of it: ranking generated sounds.

Candidates for one prompt are nearly all of the right kind and differ in quality: an engine swells, a struck
bar rings on, the rain behind a bell is missing. The clap stage teaches CLAP to ignore such flaws. Here it
learns from pairs: what the trained UNet generates for a caption of the library, and the library's own sound,
passed through the VAE and the vocoder like the generated one. The caption should fit the library's sound
better; the loss is that of a preference between two (Bradley and Terry 1952), added to the contrastive loss.
Candidates are thus ranked by how little they can be told from the library's sounds (discriminator rejection
sampling: Azadi et al. 2019, arXiv 1810.06758). The pairs get no noise, because 3 dB of it would hide a level
that swells by 2 dB. They are shifted slightly in time and level instead, so that fewer are learned by heart.

The text tower stays as it is: GPT-2 and the UNet were trained on its output.
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from audioldm2.training.cache import cached
from audioldm2.training.clap import contrastive_loss
from audioldm2.training.loop import train
from scripts.tiny.assemble import pipeline
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import CLIP_SAMPLES, KINDS, SAMPLING_RATE
from scripts.tiny.data.tokenizers import tokenize
from scripts.tiny.evaluate.generation import generate
from scripts.tiny.evaluate.prompts import Prompt
from scripts.tiny.run import Run
from scripts.tiny.stages.clap import (
    RETRIEVAL_ROUNDS,
    captions_with_negatives,
    corrupt,
    retrieval_accuracy,
)
from scripts.tiny.stages.unet import sampling_weights

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 32, 3e-4
RANKING_SOUNDS = 2400  # of the library, to train on
MAX_SHIFT = (8, 2.0)  # frames and dB, the most that a spectrogram is shifted either way
UNSEEN_SOUNDS = 102  # that the result is measured on, at most
SAMPLER_STEPS, GUIDANCE, GENERATION_BATCH = 20, 2.0, 16  # of DPM-Solver++


def train_ranking(library: Library, run: Run) -> None:
    """Train with what the run's pipeline generates, and write CLAP, `text_encoder`, again."""
    torch.manual_seed(run.seed)
    pipe = pipeline(run)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    clap, tokenizer = pipe.text_encoder, pipe.tokenizer
    count = min(RANKING_SOUNDS, len(library))
    rows = torch.multinomial(sampling_weights(library), count, generator=run.generator(0))
    sources = [path.read_bytes() for path in sorted(run.checkpoint.glob("*/*.safetensors"))]
    sources.append(json.dumps([library.captions[i] for i in rows]).encode())
    pairs = cached(
        run.folder / "ranking_sounds.safetensors", sources, partial(make_pairs, pipe, library, rows, run)
    )
    real, generated = pairs["real"], pairs["generated"]

    def encode(texts: list[str], spectrograms: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            text = clap.text_features(*tokenize(tokenizer, texts, run.device))
        return text, clap.audio_features(rearrange(spectrograms, "b t m -> b 1 t m").to(run.device))

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = torch.randint(count, (run.batch_or(BATCH_SIZE),), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [library.scenes[i] for i in rows[batch]]
        texts, positives = captions_with_negatives(scenes, rng)
        contrasted, compared = real[batch].float(), torch.cat([real[batch], generated[batch]]).float()
        corrupt(contrasted, generator)
        shift(compared, generator)
        corrupt(compared, generator, noise=0)
        text, sound = encode(texts, torch.cat([contrasted, compared]))
        contrasted, better, worse = sound.chunk(3)
        contrast = contrastive_loss(clap, text, contrasted, positives.to(run.device))
        margin = clap.logit_scale_a.exp() * (text[: len(scenes)] * (better - worse)).sum(1)
        preference = F.softplus(-margin).mean()
        return {"loss": contrast + preference, "contrast": contrast, "preference": preference}

    train("ranking", clap.audio, loss, run, steps=TRAINING_STEPS, rate=LEARNING_RATE, average=0.99)
    clap.eval().save_pretrained(run.checkpoint / "text_encoder")

    unseen = make_library(min(UNSEEN_SOUNDS, len(library)), run.seed + 1)
    rng = np.random.default_rng([run.seed, 4])
    texts = [caption(scene, rng, held_out=True) for scene in unseen.scenes]
    with torch.no_grad():
        pairs = make_pairs(pipe, unseen, torch.arange(len(unseen)), run)
        text, sound = encode(texts, torch.cat([pairs["real"], pairs["generated"]]).float())
        better, worse = sound.chunk(2)
        preferred = ((text * (better - worse)).sum(1) > 0).float().mean()
    found, _ = retrieval_accuracy(clap, tokenizer, RETRIEVAL_ROUNDS)
    print(f"ranking: {preferred:.1%} of unseen sounds fit their captions better than generated ones do;")
    print(f"         {found:.1%} of captions still find their sound among {len(KINDS)} kinds")


def shift(spectrograms: Tensor, generator: torch.Generator) -> None:
    """Shift spectrograms (B, T, M) in dB, in place, by up to MAX_SHIFT: circularly in time, and in level."""
    frames, decibels = MAX_SHIFT
    shifts = torch.randint(-frames, frames + 1, (len(spectrograms),), generator=generator)
    for spectrogram, by in zip(spectrograms, shifts.tolist(), strict=True):
        spectrogram.copy_(spectrogram.roll(by, 0))
    spectrograms += decibels * (2 * torch.rand(len(spectrograms), 1, 1, generator=generator) - 1)


@torch.no_grad()
def make_pairs(pipe: AudioLDM2Pipeline, library: Library, rows: Tensor, run: Run) -> dict[str, Tensor]:
    """CLAP's spectrograms in dB of some sounds of the library and of what is generated for their captions.

    Returns:
        "real", the library's sounds after VAE and vocoder, and "generated"; each (rows, frames, mels)
        float16.
    """
    prompts = [Prompt(library.scenes[i], library.captions[i][0], i) for i in rows.tolist()]
    sounds = generate(
        pipe,
        prompts,
        steps=SAMPLER_STEPS,
        guidance=GUIDANCE,
        batch=GENERATION_BATCH,
        title="Generating sounds to rank",
    )
    of_captions = torch.from_numpy(sounds[:, 0])
    real, generated = [], []
    for some in tqdm(torch.arange(len(rows)).split(8), desc="Computing spectrograms", disable=None):
        mels = pipe.vae.decode(pipe.vae.encode(library.mels(rows[some]).to(run.device)).mode())
        decoded = pipe.vocoder(mels[:, 0])[:, :CLIP_SAMPLES].cpu()
        real.append(pipe.feature_extractor(decoded, SAMPLING_RATE)[:, 0].half())
        generated.append(pipe.feature_extractor(of_captions[some], SAMPLING_RATE)[:, 0].half())
    return {"real": torch.cat(real), "generated": torch.cat(generated)}
