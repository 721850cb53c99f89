"""How good a checkpoint is at the sounds of `sounds.py`: what it generates, and each of its parts alone.

Everything is measured on prompts in phrasings and on sounds that training never had, and judged by
`measures.matches`. A clip depends on its prompt and seed alone, not on what is generated beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline
from audioldm2.audio.log_mel import LogMel, LogMelConfig
from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import (
    BACKGROUNDS,
    KINDS,
    SAMPLES,
    SAMPLING_RATE,
    SECONDS,
    Scene,
    Sound,
    draw_scene,
    level,
    render,
)
from scripts.tiny.evaluate.measures import matches, measure

CONTENTS = tuple(Sound(kind, trait) for kind, traits in KINDS.items() for trait in traits or ("",))
TWO = "two sounds"  # the row of an event over a background
UNSEEN = 7  # goes before an example's number into its seed, which no seed of the library has
DECIBELS = 20 / np.log(10)  # of 1 in LogMel's natural logarithm
Checks = dict[str, bool]


@dataclass(frozen=True)
class Prompt:
    """A scene, a caption of it in a phrasing that training never has, and the seed of its noise."""

    scene: Scene
    text: str
    seed: int

    @property
    def row(self) -> str:
        """The row of the table that it counts in."""
        return self.scene.sounds[0].kind if len(self.scene.sounds) == 1 else TWO

    def real(self) -> np.ndarray:
        """A synthesised sound of the scene, (SAMPLES,)."""
        return render(self.scene, np.random.default_rng([self.seed, UNSEEN, 1]))


def draw_prompts(clips: int, seed: int, two: int | None = None) -> list[Prompt]:
    """So many prompts a content (kind and trait), and `two` (4 times as many) of an event over a background.

    Traits share a kind's row in the table, so a kind with two has twice as many prompts.
    """
    prompts: list[Prompt] = []

    def add(scene: Scene, rng: np.random.Generator) -> None:
        prompts.append(Prompt(scene, caption(scene, rng, held_out=True), 1000 * seed + len(prompts)))

    for sound in CONTENTS:
        for i in range(clips):
            rng = np.random.default_rng([seed, UNSEEN, 0, CONTENTS.index(sound), i])
            add(Scene((sound,), draw_scene(rng, sound.kind).loudness), rng)
    rng = np.random.default_rng([seed, UNSEEN, 2])
    wanted = len(prompts) + (4 * clips if two is None else two)
    while len(prompts) < wanted:
        scene = draw_scene(rng)
        if len(scene.sounds) == 2:
            add(scene, rng)
    return prompts


# --- generating


def start_noise(pipe: AudioLDM2Pipeline, seed: int, count: int = 1) -> Tensor:
    """The latents that denoising starts from, (count, C, T, F), float32: what a seed alone decides."""
    scale, mels = pipe.vae.downsampling, pipe.vocoder.config.model_in_dim
    frames = SAMPLES // pipe.vocoder.hop_length
    shape = (count, pipe.unet.config.in_channels, frames // scale, mels // scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches(pipe: AudioLDM2Pipeline, prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """The prompts' places in batches of texts of one length, which need no padding that could change them."""
    lengths = [len(pipe.tokenizer_2(prompt.text, verbose=False).input_ids) for prompt in prompts]
    for length in sorted({*lengths}):
        places = [i for i, other in enumerate(lengths) if other == length]
        for start in range(0, len(places), size):
            yield places[start : start + size]


def generate(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float,
    batch: int,
    candidates: int = 1,
    title: str = "Generating",
) -> np.ndarray:
    """The sounds of prompts, (prompts, candidates, samples), of several candidates CLAP's choice first."""
    sounds: list[Any] = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=title, disable=None) as bar:
        for places in batches(pipe, prompts, max(1, batch // candidates)):
            audios = pipe(
                [prompts[i].text for i in places],
                audio_length_in_s=SECONDS,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_waveforms_per_prompt=candidates,
                latents=torch.cat([start_noise(pipe, prompts[i].seed, candidates) for i in places]),
            ).audios
            for i, some in zip(places, rearrange(audios, "(b n) t -> b n t", n=candidates), strict=True):
                sounds[i] = some
            bar.update(len(places))
    return np.stack(sounds)


# --- judging


def judge(prompts: Sequence[Prompt], sounds: Sequence[np.ndarray], title: str) -> list[Checks]:
    """What `matches` says of each sound and its prompt."""
    pairs = zip(prompts, sounds, strict=True)
    return [matches(p.scene, sound) for p, sound in tqdm(pairs, desc=title, total=len(prompts), disable=None)]


def share(found: Sequence[Checks]) -> float:
    """The share of sounds of which everything is right."""
    return sum(all(checks.values()) for checks in found) / len(found)


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The same prompts, each in the place of another one."""
    order = np.random.default_rng([seed, UNSEEN, 3]).permutation(len(prompts))
    others = np.empty(len(prompts), dtype=int)
    others[order] = np.roll(order, 1)
    return [prompts[i] for i in others]


def by_row(prompts: Sequence[Prompt], **found: Sequence[Checks]) -> dict[str, dict[str, Any]]:
    """For each row of the table, and for "all": the number of prompts, and the share of each column.

    `missed` counts the checks that failed in the column `right`.
    """
    rows = {}
    for row in (*KINDS, TWO, "all"):
        places = [i for i, prompt in enumerate(prompts) if row in ("all", prompt.row)]
        if places:
            columns = {name: share([checks[i] for i in places]) for name, checks in found.items()}
            missed = Counter(k for i in places for k, right in found["right"][i].items() if not right)
            rows[row] = {"prompts": len(places), **columns, "missed": dict(missed)}
    return rows


def repetition(prompts: Sequence[Prompt], sounds: Sequence[np.ndarray]) -> float:
    """How much noise, rain, wind and waves repeat themselves within 36 ms, 0 to 1: the mean of their `hum`.

    A vocoder hears nothing but the mel, and where that stands still its sound repeats with the frames, which
    gives noise a hum.
    """
    noises = {*BACKGROUNDS} - {"engine"}
    hums = [measure(sound).hum for p, sound in zip(prompts, sounds, strict=True) if p.row in noises]
    return float(np.mean(hums))


# --- the parts alone


@torch.no_grad()
def through(pipe: AudioLDM2Pipeline, sounds: np.ndarray, *, vae: bool) -> tuple[np.ndarray, dict[str, float]]:
    """Sounds (n, samples) through the VAE, there and back, and the vocoder, or through the vocoder alone.

    Returns:
        what comes out, (n, samples); and mean errors in dB: `mel_dB` of the log-mel picture of what comes out
        (absolute difference), `picture_dB` of the VAE's picture before the vocoder (0 without it), and
        `level_dB` of the loudest part.
    """
    log_mel, out, errors = LogMel(LogMelConfig(hop_length=pipe.vocoder.hop_length)), [], []
    title = "Through VAE and vocoder" if vae else "Through the vocoder"
    for sound in tqdm(sounds, desc=title, disable=None):
        mel = picture = log_mel(torch.from_numpy(sound[None]), SAMPLING_RATE)  # (1, 1, T, F)
        if vae:
            picture = pipe.vae.decode(pipe.vae.encode(mel).mode())
        heard = pipe.vocoder(rearrange(picture, "b 1 t f -> b t f"))[:, : len(sound)]
        difference = (log_mel(heard, SAMPLING_RATE) - mel).abs().mean().item()
        apart = abs(level(heard[0].numpy()) - level(sound))
        errors.append((DECIBELS * difference, DECIBELS * (picture - mel).abs().mean().item(), apart))
        out.append(heard[0].numpy())
    names = ("mel_dB", "picture_dB", "level_dB")
    return np.stack(out), dict(zip(names, np.mean(errors, axis=0).tolist(), strict=True))


@torch.no_grad()
def retrieval(pipe: AudioLDM2Pipeline, rounds: int, seed: int) -> float:
    """How often CLAP finds a caption's sound among one of each kind.

    In each round there is a sound and a caption, in an unknown phrasing, of every kind; each caption is to be
    nearest to its own sound.
    """
    clap, extract = pipe.text_encoder, pipe.feature_extractor
    right = []
    for number in tqdm(range(rounds), desc="CLAP's retrieval", disable=None):
        rng = np.random.default_rng([seed, UNSEEN, 4, number])
        scenes = [draw_scene(rng, kind) for kind in KINDS]
        texts = [caption(scene, rng, held_out=True) for scene in scenes]
        tokens = pipe.tokenizer(texts, padding=True, return_tensors="pt")
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes]))
        rate = extract.config.sampling_rate
        if rate != SAMPLING_RATE:
            from audioldm2.audio.resample import resample

            waveforms = resample(waveforms, SAMPLING_RATE, rate)
        sound = clap.audio_features(extract(waveforms, rate))  # (kinds, P)
        text = clap.text_features(tokens.input_ids, tokens.attention_mask)
        right += ((text @ sound.T).argmax(1) == torch.arange(len(KINDS))).tolist()
    return sum(right) / len(right)


def ranking(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float,
    batch: int,
    candidates: int = 4,
) -> dict[str, float]:
    """The share of right sounds among CLAP's first choices of some candidates, and among all candidates.

    The latter is what a choice by chance is right in. `possible` is the share of prompts with any right
    candidate: no ranking can do better.
    """
    sounds = generate(
        pipe,
        prompts,
        steps=steps,
        guidance=guidance,
        batch=batch,
        candidates=candidates,
        title=f"Ranking {candidates} candidates",
    )
    found = [judge(prompts, sounds[:, n], f"Judging candidates {n + 1}") for n in range(candidates)]
    right = np.array([[all(checks.values()) for checks in some] for some in found])  # (candidates, prompts)
    return {
        "first": float(right[0].mean()),
        "any": float(right.mean()),
        "possible": float(right.any(0).mean()),
        "prompts": len(prompts),
        "candidates": candidates,
    }
