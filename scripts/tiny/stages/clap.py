"""Train CLAP, both towers: captions are pulled towards the sounds they describe and away from all others.

The loss is the symmetric contrastive one (Wu et al. 2023, eq. 1, as in CLIP) over a batch of scenes with one
rendering and one caption each. There are so few kinds of sound that a batch contains the same scene several
times; all captions and sounds of the same scene count as positives, with equal weight (Yang et al. 2022,
UniCL, eq. 3). The kinds are soon told apart. Traits and loudness are harder, so for each sound the negatives
include captions of its scene with another trait and with another loudness (Yuksekgonul et al. 2023,
section 4).

CLAP will rank generated sounds, which are slightly blurred and never quite silent. Spectrograms are therefore
corrupted in training: blurred, made noisy, their silence filled, stripes of time and frequency blanked. Their
levels stay, because loudness is part of a scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2.atomic import replacing
from audioldm2.audio.clap_features import ClapFeatureExtractor, ClapFeatureExtractorConfig
from audioldm2.models import ClapModel
from audioldm2.models.clap import ClapConfig
from audioldm2.training.clap import contrastive_loss
from audioldm2.training.loop import train
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import (
    KINDS,
    LOUDNESS_LEVELS,
    SAMPLING_RATE,
    Scene,
    Sound,
    draw_scene,
    draw_sound,
    render,
)
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, vary_caption
from scripts.tiny.run import Run
from scripts.tiny.sizes import FEATURE_EXTRACTOR, TINY

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 2000, 32, 1e-3
RETRIEVAL_ROUNDS = 12  # each measures one sound of every kind
BLUR_PROBABILITY = 0.25  # that a spectrogram is averaged over neighboring cells
MAX_NOISE = 3.0  # dB, the highest standard deviation of the noise
FLOOR_RANGE = (-100.0, -45.0)  # dB; a spectrogram's silence is filled up to a level drawn from it
MAX_STRIPE = (24, 6)  # frames and mel bands, the widest stripes that are blanked


def train_clap(library: Library, run: Run) -> None:
    """Train CLAP on the library and write `text_encoder`."""
    torch.manual_seed(run.seed)
    clap = ClapModel(ClapConfig.from_dict(TINY["text_encoder"])).to(run.device)
    tokenizer = read_tokenizers(run)[0]
    all_spectrograms = clap_spectrograms(library, run.folder / "clap_spectrograms.npy")

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = library.draw(run.batch_or(BATCH_SIZE), generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [library.scenes[i] for i in batch]
        texts, positives = captions_with_negatives(scenes, rng)
        spectrograms = torch.from_numpy(all_spectrograms[batch.numpy()]).float()
        corrupt(spectrograms, generator)
        text = clap.text_features(*tokenize(tokenizer, texts, run.device))
        sound = clap.audio_features(rearrange(spectrograms, "b t m -> b 1 t m").to(run.device))
        return {"loss": contrastive_loss(clap, text, sound, positives.to(run.device))}

    train("clap", clap, loss, run, steps=TRAINING_STEPS, rate=LEARNING_RATE, average=0.995)
    clap.save_pretrained(run.checkpoint / "text_encoder")
    found, preferred = retrieval_accuracy(clap, tokenizer, RETRIEVAL_ROUNDS)
    print(f"clap: {found:.1%} of held-out captions find their sound among {len(KINDS)} kinds;")
    print(f"      {preferred:.1%} fit their sound better than captions with another loudness or trait")


def scene_ids(scenes: Sequence[Scene]) -> Tensor:
    """A number for each scene, the same for equal scenes, (N,)."""
    numbers: dict[Scene, int] = {}
    return torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in scenes])


def captions_with_negatives(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions of B scenes and of their hard negatives.

    Returns:
        T captions, the first B of the scenes themselves; and (T, B), whether caption i fits scene j.
    """
    described = scenes + [negative for scene in scenes for negative in hard_negatives(scene, rng)]
    texts = [vary_caption(caption(scene, rng), rng) for scene in described]
    ids = scene_ids(described)
    return texts, ids[:, None] == ids[None, : len(scenes)]


def hard_negatives(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Two scenes that differ in one thing: the loudness, or the first sound (its trait if it has one)."""
    loudness = rng.choice([other for other in LOUDNESS_LEVELS if other != scene.loudness])
    first = scene.sounds[0]
    traits = [Sound(first.kind, trait) for trait in KINDS[first.kind] if trait != first.trait]
    kind = str(rng.choice([kind for kind in KINDS if kind != first.kind]))
    other = traits[rng.integers(len(traits))] if traits else draw_sound(rng, kind)
    return (
        replace(scene, loudness=str(loudness)),
        replace(scene, sounds=(other, *scene.sounds[1:])),
    )


def clap_spectrograms(library: Library, path: Path, at_once: int = 8) -> np.ndarray:
    """CLAP's log-mel spectrograms of all sounds in dB, (N, frames, mels) float16.

    They are cached at `path`. The cache is used if it has as many sounds and some 64 of them are equal.
    """
    extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURE_EXTRACTOR))

    def compute(rows: Tensor) -> np.ndarray:
        spectrograms: np.ndarray = extractor(library.waveforms(rows), SAMPLING_RATE)[:, 0].half().numpy()
        return spectrograms

    if path.exists():
        found: np.ndarray = np.load(path, mmap_mode="r")
        some = torch.arange(0, len(library), max(1, len(library) // 64))
        if len(found) == len(library) and np.array_equal(found[some.numpy()], compute(some)):
            return found
    batches = torch.arange(len(library)).split(at_once)
    made = [compute(rows) for rows in tqdm(batches, desc="Computing CLAP's spectrograms", disable=None)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate(made))
    written: np.ndarray = np.load(path, mmap_mode="r")
    return written


def corrupt(spectrograms: Tensor, generator: torch.Generator, noise: float = MAX_NOISE) -> None:
    """Change spectrograms (B, T, M) in dB, in place, as a vocoder or an imperfect denoiser might.

    `noise` is the highest standard deviation of the added noise, in dB.
    """
    count, frames, mels = spectrograms.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    blurred = torch.rand(count, generator=generator) < BLUR_PROBABILITY
    padded = F.pad(spectrograms[blurred][:, None], (1, 1, 1, 1), mode="replicate")
    spectrograms[blurred] = F.avg_pool2d(padded, 3, stride=1)[:, 0]
    torch.maximum(spectrograms, uniform(*FLOOR_RANGE), out=spectrograms)
    spectrograms += uniform(0, noise) * torch.randn(spectrograms.shape, generator=generator)
    lowest = spectrograms.amin(dim=(1, 2))
    for i in range(count):
        for axis, (length, widest) in enumerate(zip((frames, mels), MAX_STRIPE, strict=True)):
            width = int(torch.randint(widest + 1, (1,), generator=generator))
            start = int(torch.randint(length - width + 1, (1,), generator=generator))
            spectrograms[i].narrow(axis, start, width).fill_(float(lowest[i]))


@torch.no_grad()
def retrieval_accuracy(clap: ClapModel, tokenizer: Any, rounds: int, seed: int = 1) -> tuple[float, float]:
    """How well held-out captions find their sounds, which are not in the library either.

    Returns:
        How often a caption fits its own sound best among one of each kind; and how often a sound's own
        caption fits it better than the caption of a hard negative.
    """
    extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURE_EXTRACTOR))
    device = str(clap.logit_scale_a.device)
    rng = np.random.default_rng([seed, 1])
    found, preferred = [], []
    for _ in range(rounds):
        scenes = [draw_scene(rng, kind) for kind in KINDS]
        described = scenes + [negative for scene in scenes for negative in hard_negatives(scene, rng)]
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])).to(device)
        texts = [caption(scene, rng, held_out=True) for scene in described]
        sound = clap.audio_features(extractor(waveforms, SAMPLING_RATE))
        similarity = (clap.text_features(*tokenize(tokenizer, texts, device)) @ sound.t()).cpu()
        rows = torch.arange(len(scenes))
        found.append(similarity[: len(scenes)].argmax(dim=1) == rows)
        negatives = similarity[len(scenes) :].view(len(scenes), -1, len(scenes))
        preferred.append(similarity[rows, rows][:, None] > negatives[rows, :, rows])
    return float(torch.cat(found).float().mean()), float(torch.cat(preferred).float().mean())
