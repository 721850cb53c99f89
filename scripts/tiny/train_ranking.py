"""Train CLAP's audio tower on, for what the pipeline asks of it: to rank sounds that were generated.

Candidates for one prompt are nearly all of the right kind. What differs is how clean they are: a siren loses
its way, an engine swells, a struck bar rings on. `train_clap` teaches to hear past that. Here the library's
sounds come as the VAE and the vocoder give them back, and beside each two more with their latents spoilt by
slow noise, as a UNet leaves them. A caption is to fit the clean one better: a preference between two, by how
much better (Bradley and Terry 1952), next to the contrastive loss of before.

The text tower stays as it is. GPT-2 and the UNet have learnt from what it says.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2.audio.log_mel import ClapFeatureExtractor, ClapFeatureExtractorConfig
from audioldm2.models import VAE, ClapModel, HifiGan
from scripts.tiny.captions import caption
from scripts.tiny.data import Library, make_library
from scripts.tiny.sizes import FEATURES
from scripts.tiny.sounds import KINDS, SAMPLES, SAMPLING_RATE
from scripts.tiny.tokenizers import read_tokenizers, tokenize, varied
from scripts.tiny.train_clap import ROUNDS, contrastive_loss, retrieval, scene_numbers, twins
from scripts.tiny.training import Run, train

STEPS, BATCH, RATE = 800, 32, 3e-4
SOUNDS = 1000  # of the library, that are learnt from
UNSEEN = 34  # sounds that are measured on
SPOILT = (0.05, 0.4)  # of the latents' spread
SLOW = ((1, 2, 4, 8), (1, 2, 4))  # cells of time and frequency over which that noise may be one


def train_ranking(library: Library, run: Run) -> None:
    """Train with the run's VAE and vocoder, and write CLAP, `text_encoder`, into its checkpoint again."""
    torch.manual_seed(run.seed)
    clap = ClapModel.from_pretrained(run.checkpoint, "text_encoder", device=run.device)
    tower = clap.audio_tower()
    tokenizer = read_tokenizers(run)[0]
    pictures = heard(library, SOUNDS, run)

    def fit(texts: list[str], pictures: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            text = clap.text_features(*tokenize(tokenizer, texts, run.device))
        return text, clap.audio_features(rearrange(pictures.float(), "b t m -> b 1 t m").to(run.device))

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = torch.randint(len(pictures), (run.size(BATCH),), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [library.scenes[i] for i in batch]
        said = scenes + [twin for scene in scenes for twin in twins(scene, rng)]
        spoilt = pictures[batch, torch.randint(1, 3, (len(batch),), generator=generator)]
        texts = [varied(caption(scene, rng), rng) for scene in said]
        text, sound = fit(texts, torch.cat([pictures[batch, 0], spoilt]))
        clean, spoiled = sound.chunk(2)
        numbers = scene_numbers(said)
        same = numbers[:, None] == numbers[None, : len(scenes)]
        contrast = contrastive_loss(clap, text, clean, same.to(run.device))
        better = (text[: len(scenes)] * (clean - spoiled)).sum(1)
        preference = F.softplus(-clap.logit_scale_a.exp() * better).mean()
        return {"loss": contrast + preference, "contrast": contrast, "preference": preference}

    train("ranking", tower, loss, run, steps=STEPS, rate=RATE, average=0.99)
    clap.eval().save_pretrained(run.checkpoint / "text_encoder")

    unseen = make_library(UNSEEN, run.seed + 1)
    rng = np.random.default_rng([run.seed, 4])
    with torch.no_grad():
        sides = heard(unseen, UNSEEN, run)
        texts = [caption(scene, rng, held_out=True) for scene in unseen.scenes]
        text, sound = fit(texts, torch.cat([sides[:, 0], sides[:, 1]]))
        clean, spoiled = sound.chunk(2)
        better = ((text * (clean - spoiled)).sum(1) > 0).float().mean()
    found, _ = retrieval(clap, tokenizer, ROUNDS)
    print(f"ranking: {better:.1%} of unseen sounds fit their captions better than with spoilt latents;")
    print(f"         {found:.1%} of captions still find their sound among {len(KINDS)} kinds")


@torch.no_grad()
def heard(library: Library, count: int, run: Run) -> Tensor:
    """CLAP's pictures of the first sounds after VAE and vocoder, dB: (count, 3, frames, mels) float16.

    The first of the three as it is, the others spoilt.
    """
    vae = VAE.from_pretrained(run.checkpoint, "vae", device=run.device)
    vocoder = HifiGan.from_pretrained(run.checkpoint, "vocoder", device=run.device)
    extract = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURES))
    generator = run.generator(0)
    pictures = []
    batches = torch.arange(min(count, len(library))).split(4)
    for rows in tqdm(batches, desc="Spoiling sounds", disable=None):
        latents = vae.encode(library.mels(rows).to(run.device)).mode()
        noise = [slow_noise(latents.shape, generator).to(run.device) for _ in range(2)]
        sides = torch.cat([latents, *(latents + n for n in noise)])
        waveforms = vocoder(vae.decode(sides)[:, 0])[:, :SAMPLES].cpu()
        pictures.append(rearrange(extract(waveforms, SAMPLING_RATE), "(s b) 1 t m -> b s t m", s=3).half())
    return torch.cat(pictures)


def slow_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Noise for latents (B, C, T, F), of another strength and slowness for each."""
    batch, channels, frames, mels = shape
    noise = []
    for _ in range(batch):
        cells = [steps[int(torch.randint(len(steps), (), generator=generator))] for steps in SLOW]
        size = (frames // cells[0] + 2, mels // cells[1] + 2)
        coarse = torch.randn(1, channels, *size, generator=generator)
        fine = F.interpolate(coarse, scale_factor=tuple(map(float, cells)), mode="bilinear")
        fine = fine[:, :, cells[0] : cells[0] + frames, cells[1] : cells[1] + mels]
        low, high = SPOILT
        strength = low + (high - low) * torch.rand((), generator=generator)
        noise.append(strength * fine / fine.std())
    return torch.cat(noise)
