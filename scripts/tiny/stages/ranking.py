"""Train CLAP's audio tower on, for what the pipeline asks of it: to rank sounds that were generated.

Candidates for one prompt are nearly all of the right kind. What differs is how well they are made: an engine
swells, a struck bar rings on, the rain behind a bell is missing. `train_clap` teaches to hear past that. Here
CLAP hears what the trained UNet makes of the library's captions, beside the library's own sounds, which went
through VAE and vocoder like those. A caption is to fit the latter better: a preference between two, by how
much better (Bradley and Terry 1952), next to the contrastive loss of before. Of several generated sounds,
those are then put first that are least told from the library's (discriminator rejection sampling: Azadi et
al. 2019, arXiv 1810.06758). No noise is added to the two: 3 dB of it hide a level that swells by 2 dB. They
are moved a little in time and level, so that fewer of them are learnt by heart.

The text tower stays as it is. GPT-2 and the UNet have learnt from what it says.
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
from scripts.tiny.assemble import pipeline
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import KINDS, SAMPLES, SAMPLING_RATE
from scripts.tiny.data.tokenizers import tokenize
from scripts.tiny.evaluate.evaluation import Prompt, generate
from scripts.tiny.loop import Run, kept, train
from scripts.tiny.stages.clap import ROUNDS, captions_to_tell_apart, contrastive_loss, disturb, retrieval
from scripts.tiny.stages.unet import shares

STEPS, BATCH, RATE = 4000, 32, 3e-4
SOUNDS = 2400  # of the library, that are learnt from
MOVED = (8, 2.0)  # frames and dB, the most by which a picture is moved, either way
UNSEEN = 102  # sounds that are measured on, at most
SAMPLING = {"steps": 20, "guidance": 2.0, "batch": 16}  # of DPM-Solver++


def train_ranking(library: Library, run: Run) -> None:
    """Train with what the run's pipeline generates, and write CLAP, `text_encoder`, again."""
    torch.manual_seed(run.seed)
    pipe = pipeline(run)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    clap, tokenizer = pipe.text_encoder, pipe.tokenizer
    count = min(SOUNDS, len(library))
    rows = torch.multinomial(shares(library), count, generator=run.generator(0))
    of = [path.read_bytes() for path in sorted(run.checkpoint.glob("*/*.safetensors"))]
    of.append(json.dumps([library.captions[i] for i in rows]).encode())
    sides = kept(run.folder / "ranking_sounds.pt", of, partial(both_sides, pipe, library, rows, run))
    own, generated = sides["own"], sides["generated"]

    def fit(texts: list[str], pictures: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            text = clap.text_features(*tokenize(tokenizer, texts, run.device))
        return text, clap.audio_features(rearrange(pictures, "b t m -> b 1 t m").to(run.device))

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = torch.randint(count, (run.size(BATCH),), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [library.scenes[i] for i in rows[batch]]
        texts, same = captions_to_tell_apart(scenes, rng)
        alone, two = own[batch].float(), torch.cat([own[batch], generated[batch]]).float()
        disturb(alone, generator)
        move(two, generator)
        disturb(two, generator, noise=0)
        text, sound = fit(texts, torch.cat([alone, two]))
        heard, better, worse = sound.chunk(3)
        contrast = contrastive_loss(clap, text, heard, same.to(run.device))
        by = clap.logit_scale_a.exp() * (text[: len(scenes)] * (better - worse)).sum(1)
        preference = F.softplus(-by).mean()
        return {"loss": contrast + preference, "contrast": contrast, "preference": preference}

    train("ranking", clap.audio, loss, run, steps=STEPS, rate=RATE, average=0.99)
    clap.eval().save_pretrained(run.checkpoint / "text_encoder")

    unseen = make_library(min(UNSEEN, len(library)), run.seed + 1)
    rng = np.random.default_rng([run.seed, 4])
    texts = [caption(scene, rng, held_out=True) for scene in unseen.scenes]
    with torch.no_grad():
        sides = both_sides(pipe, unseen, torch.arange(len(unseen)), run)
        text, sound = fit(texts, torch.cat([sides["own"], sides["generated"]]).float())
        better, worse = sound.chunk(2)
        told = ((text * (better - worse)).sum(1) > 0).float().mean()
    found, _ = retrieval(clap, tokenizer, ROUNDS)
    print(f"ranking: {told:.1%} of unseen sounds fit their captions better than what is generated for them;")
    print(f"         {found:.1%} of captions still find their sound among {len(KINDS)} kinds")


def move(pictures: Tensor, generator: torch.Generator) -> None:
    """Move pictures (B, T, M), in dB, by up to MOVED, in place: round in time, and louder or softer."""
    frames, decibels = MOVED
    shifts = torch.randint(-frames, frames + 1, (len(pictures),), generator=generator)
    for picture, shift in zip(pictures, shifts.tolist(), strict=True):
        picture.copy_(picture.roll(shift, 0))
    pictures += decibels * (2 * torch.rand(len(pictures), 1, 1, generator=generator) - 1)


@torch.no_grad()
def both_sides(pipe: AudioLDM2Pipeline, library: Library, rows: Tensor, run: Run) -> dict[str, Tensor]:
    """CLAP's pictures, dB, of some sounds after VAE and vocoder, and of what is generated for their captions.

    They are "own" and "generated", each (rows, frames, mels) float16.
    """
    prompts = [Prompt(library.scenes[i], library.captions[i][0], i) for i in rows.tolist()]
    generated = torch.from_numpy(generate(pipe, prompts, **SAMPLING, title="Generating to rank"))
    own, other = [], []
    for some in tqdm(torch.arange(len(rows)).split(8), desc="Picturing both sides", disable=None):
        mels = pipe.vae.decode(pipe.vae.encode(library.mels(rows[some]).to(run.device)).mode())
        decoded = pipe.vocoder(mels[:, 0])[:, :SAMPLES].cpu()
        for side, waveforms in ((own, decoded), (other, generated[some, 0])):
            side.append(pipe.feature_extractor(waveforms, SAMPLING_RATE)[:, 0].half())
    return {"own": torch.cat(own), "generated": torch.cat(other)}
