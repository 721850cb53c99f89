"""Scores of a checkpoint: of the sounds it generates, and of each of its parts alone.

Everything is measured on held-out prompts and sounds, and judged by `criteria.matches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline
from audioldm2.audio.decibels import DECIBELS_PER_NEPER
from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.audio.resample import resample
from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import BACKGROUNDS, KINDS, SAMPLING_RATE, draw_scene, loudest_level, render
from scripts.tiny.data.tokenizers import tokenize
from scripts.tiny.evaluate.criteria import matches
from scripts.tiny.evaluate.generation import generate
from scripts.tiny.evaluate.measures import measure
from scripts.tiny.evaluate.prompts import HELD_OUT_SEED, TWO_SOUNDS, Prompt

Checks = dict[str, bool]


# --- judging sounds


def judge(prompts: Sequence[Prompt], sounds: Iterable[np.ndarray], title: str) -> list[Checks]:
    """The result of `matches` for each prompt and sound."""
    pairs = zip(prompts, sounds, strict=True)
    return [matches(p.scene, sound) for p, sound in tqdm(pairs, desc=title, total=len(prompts), disable=None)]


def share_right(results: Sequence[Checks]) -> float:
    """The share of sounds that pass every check."""
    return sum(all(checks.values()) for checks in results) / len(results)


def by_row(prompts: Sequence[Prompt], **columns: Sequence[Checks]) -> dict[str, dict[str, Any]]:
    """The table of scores.

    Args:
        prompts: what was asked for.
        columns: the results of `judge` on the prompts, by column; "right" is required.

    Returns:
        For each row, and for "all": "prompts", their number; the share of right sounds in each column; and
        "missed", how often each check failed in the column "right".
    """
    rows = {}
    for row in (*KINDS, TWO_SOUNDS, "all"):
        indices = [i for i, prompt in enumerate(prompts) if row in ("all", prompt.row)]
        if indices:
            shares = {name: share_right([results[i] for i in indices]) for name, results in columns.items()}
            missed = Counter(k for i in indices for k, right in columns["right"][i].items() if not right)
            rows[row] = {"prompts": len(indices), **shares, "missed": dict(missed)}
    return rows


def repetition(prompts: Sequence[Prompt], sounds: Iterable[np.ndarray]) -> float:
    """How much noise, rain, wind and waves repeat themselves within 36 ms, 0 to 1: the mean of their `hum`.

    A vocoder's only input is the mel spectrogram. Where that is constant its output repeats with the frames,
    and noise gets a hum.
    """
    noises = {*BACKGROUNDS} - {"engine"}
    hums = [measure(sound).hum for p, sound in zip(prompts, sounds, strict=True) if p.row in noises]
    return float(np.mean(hums))


# --- the parts alone


@torch.no_grad()
def reconstruct(
    pipe: AudioLDM2Pipeline, sounds: np.ndarray, *, vae: bool
) -> tuple[np.ndarray, dict[str, float]]:
    """Pass sounds through the VAE and the vocoder, or through the vocoder alone.

    Args:
        pipe: has both.
        sounds: (n, samples).
        vae: encode and decode with the VAE before the vocoder.

    Returns:
        The sounds that come out, (n, samples), and mean absolute errors in dB: "mel_dB", of their log-mel
        spectrograms; "vae_dB", of the VAE's spectrograms before the vocoder (0 without the VAE); "level_dB",
        of the level of the loudest part.
    """
    log_mel, decoded, errors = LogMel(LogMelConfig(hop_length=pipe.vocoder.hop_length)), [], []
    title = "Through VAE and vocoder" if vae else "Through the vocoder"
    for sound in tqdm(sounds, desc=title, disable=None):
        mel = vae_mel = log_mel(torch.from_numpy(sound[None]), SAMPLING_RATE)  # (1, 1, T, F)
        if vae:
            vae_mel = pipe.vae.decode(pipe.vae.encode(mel).mode())
        waveform = pipe.vocoder(rearrange(vae_mel, "b 1 t f -> b t f"))[:, : len(sound)]
        mel_error = (log_mel(waveform, SAMPLING_RATE) - mel).abs().mean().item()
        vae_error = (vae_mel - mel).abs().mean().item()
        level_error = abs(loudest_level(waveform[0].numpy()) - loudest_level(sound))
        errors.append((DECIBELS_PER_NEPER * mel_error, DECIBELS_PER_NEPER * vae_error, level_error))
        decoded.append(waveform[0].numpy())
    names = ("mel_dB", "vae_dB", "level_dB")
    return np.stack(decoded), dict(zip(names, np.mean(errors, axis=0).tolist(), strict=True))


@torch.no_grad()
def clap_retrieval(pipe: AudioLDM2Pipeline, rounds: int, seed: int) -> float:
    """How often CLAP finds a caption's sound among one of each kind.

    In each round there is one sound of every kind with a held-out caption, and each caption should be nearest
    to its own sound.
    """
    clap, extract = pipe.text_encoder, pipe.feature_extractor
    rate = extract.config.sampling_rate
    right: list[bool] = []
    for number in tqdm(range(rounds), desc="CLAP's retrieval", disable=None):
        rng = np.random.default_rng([seed, HELD_OUT_SEED, 4, number])
        scenes = [draw_scene(rng, kind) for kind in KINDS]
        texts = [caption(scene, rng, held_out=True) for scene in scenes]
        waveforms = torch.from_numpy(np.stack([render(scene, rng) for scene in scenes]))
        if rate != SAMPLING_RATE:
            waveforms = resample(waveforms, SAMPLING_RATE, rate)
        sound = clap.audio_features(extract(waveforms, rate))  # (kinds, P)
        text = clap.text_features(*tokenize(pipe.tokenizer, texts))
        right += ((text @ sound.T).argmax(1) == torch.arange(len(KINDS))).tolist()
    return sum(right) / len(right)


def rank_candidates(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: float,
    batch: int,
    candidates: int = 4,
) -> dict[str, float]:
    """What CLAP's ranking of several candidates gains.

    Returns:
        Shares of right sounds: "first", of CLAP's first choices; "any", of all candidates, which is what a
        random choice would score; "possible", of prompts with at least one right candidate, which no ranking
        can exceed. Also the numbers of "prompts" and "candidates".
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
    results = [judge(prompts, sounds[:, n], f"Judging candidates {n + 1}") for n in range(candidates)]
    right = np.array([[all(checks.values()) for checks in some] for some in results])  # (candidates, prompts)
    return {
        "first": float(right[0].mean()),
        "any": float(right.mean()),
        "possible": float(right.any(0).mean()),
        "prompts": len(prompts),
        "candidates": candidates,
    }
