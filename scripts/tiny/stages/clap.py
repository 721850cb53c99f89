"""Train CLAP, both towers: captions and the sounds that they describe are brought together, all others apart.

The loss is the symmetric contrastive one (Wu et al. 2023, eq. 1, as in CLIP), over a batch of scenes with one
rendering and one caption each. The library has few kinds, so that a batch holds the same scene several times:
whatever is of the same scene counts as belonging together, in equal parts (Yang et al. 2022, UniCL, eq. 3).
Kinds are soon told apart; what is harder, which trait and how loud, is asked for each sound: captions of its
scene with the one and the other changed are among the wrong ones (Yuksekgonul et al. 2023, section 4).

CLAP is to rank sounds that were generated, which are a little blurred and never quite silent; so the pictures
of sounds are disturbed in training: blurred, noisy, their silence filled, stripes of time and frequency left
out. Their levels stay, for loudness is a part of the scene.
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
from audioldm2.audio.log_mel import ClapFeatureExtractor, ClapFeatureExtractorConfig
from audioldm2.models import ClapModel
from audioldm2.models.clap import ClapConfig
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import (
    KINDS,
    LEVELS,
    SAMPLING_RATE,
    Scene,
    Sound,
    draw_scene,
    draw_sound,
    render,
)
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, varied
from scripts.tiny.loop import Run, train
from scripts.tiny.sizes import FEATURES, SIZES

STEPS, BATCH, RATE = 2000, 32, 1e-3
ROUNDS = 12  # of one sound a kind, that are measured on
BLURRED = 0.25  # the part of the pictures whose neighbouring cells are averaged
NOISE = 3.0  # dB, the most of the noise's standard deviation
SILENCE = (-100.0, -45.0)  # dB, the range of the floor that a picture may be filled up to
STRIPE = (24, 6)  # frames and mel bands, the most that are left out in one piece


def train_clap(library: Library, run: Run) -> None:
    """Train on the library and write `text_encoder` into the run's checkpoint."""
    torch.manual_seed(run.seed)
    clap = ClapModel(ClapConfig.from_dict(SIZES["text_encoder"])).to(run.device)
    tokenizer = read_tokenizers(run)[0]
    features = clap_features(library, run.folder / "clap_features.npy")

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = library.draw(run.size(BATCH), generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [library.scenes[i] for i in batch]
        texts, same = captions_to_tell_apart(scenes, rng)
        pictures = torch.from_numpy(features[batch.numpy()]).float()
        disturb(pictures, generator)
        text = clap.text_features(*tokenize(tokenizer, texts, run.device))
        sound = clap.audio_features(rearrange(pictures, "b t m -> b 1 t m").to(run.device))
        return {"loss": contrastive_loss(clap, text, sound, same.to(run.device))}

    train("clap", clap, loss, run, steps=STEPS, rate=RATE, average=0.995)
    clap.save_pretrained(run.checkpoint / "text_encoder")
    found, told = retrieval(clap, tokenizer, ROUNDS)
    print(f"clap: {found:.1%} of captions in unseen wordings find their sound among {len(KINDS)} kinds;")
    print(f"      {told:.1%} fit their sound better than captions of another loudness or trait")


def contrastive_loss(clap: ClapModel, text: Tensor, sound: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of each sound over all texts, and of each text that has a sound over all sounds, halved.

    Args:
        clap: has the two temperatures.
        text: features (T, P).
        sound: features (B, P).
        same: (T, B), whether text i and sound j are of the same scene; each sound has a text.
    """
    sounds_of_text, texts_of_sound = clap.logits(text, sound)
    heard = same.any(dim=1)

    def error(logits: Tensor, same: Tensor) -> Tensor:
        return F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True))

    return (error(sounds_of_text[heard], same[heard]) + error(texts_of_sound, same.t())) / 2


def scene_numbers(scenes: Sequence[Scene]) -> Tensor:
    """For each scene a number that only its likes have, (N,)."""
    numbers: dict[Scene, int] = {}
    return torch.tensor([numbers.setdefault(scene, len(numbers)) for scene in scenes])


def captions_to_tell_apart(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions of scenes (B), then of their twins, T in all; and (T, B), whether text i is of scene j."""
    said = scenes + [twin for scene in scenes for twin in twins(scene, rng)]
    texts = [varied(caption(scene, rng), rng) for scene in said]
    numbers = scene_numbers(said)
    return texts, numbers[:, None] == numbers[None, : len(scenes)]


def twins(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Two scenes that differ in one thing each: the loudness; the first sound's trait, or else its kind."""
    loudness = rng.choice([other for other in LEVELS if other != scene.loudness])
    first = scene.sounds[0]
    traits = [Sound(first.kind, trait) for trait in KINDS[first.kind] if trait != first.trait]
    kind = str(rng.choice([kind for kind in KINDS if kind != first.kind]))
    other = traits[rng.integers(len(traits))] if traits else draw_sound(rng, kind)
    return (
        replace(scene, loudness=str(loudness)),
        replace(scene, sounds=(other, *scene.sounds[1:])),
    )


def clap_features(library: Library, path: Path, at_once: int = 8) -> np.ndarray:
    """CLAP's pictures of all sounds, dB, (N, frames, mels) float16; kept at `path` while they fit."""
    extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURES))

    def pictures(rows: Tensor) -> np.ndarray:
        return extractor(library.waveforms(rows), SAMPLING_RATE)[:, 0].half().numpy()

    if path.exists():
        kept = np.load(path, mmap_mode="r")
        some = torch.arange(0, len(library), max(1, len(library) // 64))
        if len(kept) == len(library) and np.array_equal(kept[some.numpy()], pictures(some)):
            return kept
    batches = torch.arange(len(library)).split(at_once)
    made = [pictures(rows) for rows in tqdm(batches, desc="Picturing sounds for CLAP", disable=None)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate(made))
    return np.load(path, mmap_mode="r")


def disturb(pictures: Tensor, generator: torch.Generator, noise: float = NOISE) -> None:
    """Change pictures (B, T, M), in dB, in place, as a vocoder or an imperfect denoiser might.

    `noise` is the most of its standard deviation, in dB.
    """
    count, frames, mels = pictures.shape

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    blurred = torch.rand(count, generator=generator) < BLURRED
    around = F.pad(pictures[blurred][:, None], (1, 1, 1, 1), mode="replicate")
    pictures[blurred] = F.avg_pool2d(around, 3, stride=1)[:, 0]
    torch.maximum(pictures, drawn(*SILENCE), out=pictures)
    pictures += drawn(0, noise) * torch.randn(pictures.shape, generator=generator)
    lowest = pictures.amin(dim=(1, 2))
    for i in range(count):
        for axis, (length, most) in enumerate(zip((frames, mels), STRIPE, strict=True)):
            width = int(torch.randint(most + 1, (1,), generator=generator))
            start = int(torch.randint(length - width + 1, (1,), generator=generator))
            pictures[i].narrow(axis, start, width).fill_(float(lowest[i]))


@torch.no_grad()
def retrieval(clap: ClapModel, tokenizer: Any, rounds: int, seed: int = 1) -> tuple[float, float]:
    """How well captions in wordings that training never used find their sounds, which it never heard.

    Returns:
        How often a caption fits its own sound best among one of each kind; and how often it fits its sound
        better than the caption of a twin of the scene.
    """
    extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURES))
    device = str(clap.logit_scale_a.device)
    rng = np.random.default_rng([seed, 1])
    found, told = [], []
    for _ in range(rounds):
        scenes = [draw_scene(rng, kind) for kind in KINDS]
        said = scenes + [twin for scene in scenes for twin in twins(scene, rng)]
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])).to(device)
        texts = [caption(scene, rng, held_out=True) for scene in said]
        sound = clap.audio_features(extractor(waveforms, SAMPLING_RATE))
        fit = (clap.text_features(*tokenize(tokenizer, texts, device)) @ sound.t()).cpu()
        places = torch.arange(len(scenes))
        found.append(fit[: len(scenes)].argmax(dim=1) == places)
        own, others = fit[places, places], fit[len(scenes) :].view(len(scenes), -1, len(scenes))
        told.append(own[:, None] > others[places, :, places])
    return float(torch.cat(found).float().mean()), float(torch.cat(told).float().mean())
