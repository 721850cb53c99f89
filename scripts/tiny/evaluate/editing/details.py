"""What settings of long sounds, loops and inversion cost or change: the tables inside of the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, decoding, windows
from audioldm2.audio.decibels import DECIBELS_PER_NEPER, RANGE_DB
from audioldm2.audio.log_mel import LogMel
from audioldm2.editing import sources
from scripts.tiny.data.sounds import ALL_SOUNDS, CLIP_SECONDS, SAMPLING_RATE, Scene, render
from scripts.tiny.evaluate.criteria import matches
from scripts.tiny.evaluate.editing.cases import draw_cases, lasting, looped, sweep
from scripts.tiny.evaluate.editing.judges import AUDIBLE_DEPTH, deepest_dip, level, third_octaves
from scripts.tiny.evaluate.editing.methods import Model, inverted
from scripts.tiny.evaluate.measures import spectrogram
from scripts.tiny.evaluate.prompts import HELD_OUT_SEED

LONG_SECONDS = 4 * CLIP_SECONDS
WINDOWS_OF_DECODING = (40, 128, 256)  # rows of latents
LENGTHS = (2, 4, 8, 16, 32)  # of what is decoded, in clips
SEAM = 0.05  # s on both sides of a seam
SKIPS = (0.6, 0.5, 0.45, 0.4, 0.0)


@dataclass(frozen=True)
class Detail:
    """A table inside of a document.

    Attributes:
        name: of the option --details.
        page: the document.
        measure: makes the table from a model, the number of sounds, and the seed.
    """

    name: str
    page: Path
    measure: Callable[[Model, int, int], str]


# --- windows


def windows_table(model: Model, count: int, seed: int) -> str:
    """How much the level changes from one latent to the next, at the ends of windows and elsewhere."""
    cases = draw_cases("windows", lasting, count, seed, chosen_on=False)
    rate, row = SAMPLING_RATE, sources.latent_samples(model.pipe)
    rows = int(LONG_SECONDS * rate) // row
    window = windows.window_rows(model.pipe.unet, CLIP_SECONDS, row / rate)
    starts = windows.window_starts(rows, window, window // 2)
    ends = sorted({*starts[1:], *(start + window for start in starts[:-1])})
    lines = ["| | at a window's end | elsewhere |", "| --- | ---: | ---: |"]
    for name, options, weights in (
        ("equal weights", {"window": CLIP_SECONDS}, equal_weights),
        ("weights that fade", {"window": CLIP_SECONDS}, windows.fading_weights),
        ("without windows", {}, windows.fading_weights),
    ):
        with patch.object(windows, "fading_weights", weights):
            changes = np.stack(
                [level_changes(one, row) for one in model.write(cases, LONG_SECONDS, **options)]
            )
        inside = np.ones(changes.shape[1], bool)
        inside[[end - 1 for end in ends]] = False
        at_ends = f"{changes[:, ~inside].mean():.1f} dB" if options else "-"
        lines.append(f"| {name} | {at_ends} | {changes[:, inside].mean():.1f} dB |")
    lines += ["", f"{count} sounds of {LONG_SECONDS:g} s, {model.steps} steps, seed {seed}."]
    return "\n".join(lines)


def equal_weights(window: int, overlap: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(window, device=device)


def level_changes(waveform: np.ndarray, row: int) -> np.ndarray:
    """By how many dB the levels of neighboring latents differ, of those that are audible."""
    count = len(waveform) // row
    levels = np.array([level(part) for part in waveform[: count * row].reshape(count, row)])
    changes: np.ndarray = np.abs(np.diff(np.maximum(levels, levels.max() - AUDIBLE_DEPTH)))
    return changes


# --- decoding


@torch.no_grad()
def decoding_table(model: Model, count: int, seed: int) -> str:
    """How far spectrograms that are decoded in windows are from those that are decoded at once."""
    pipe, errors = model.pipe, {}
    order = np.random.default_rng([seed, HELD_OUT_SEED, 6]).permutation(len(ALL_SOUNDS) * count)
    lengths = [clips for clips in LENGTHS if clips <= max(count, LENGTHS[0])]
    scenes = [Scene((ALL_SOUNDS[index % len(ALL_SOUNDS)],)) for index in order]
    clips = [
        render(scene, np.random.default_rng([seed, 6, i])) for i, scene in enumerate(scenes[: lengths[-1]])
    ]
    log_mel = LogMel(pipe.log_mel_config())
    for length in lengths:
        waveform = torch.from_numpy(np.concatenate(clips[:length]))[None]
        latents = pipe.encode_audio(waveform, SAMPLING_RATE)
        exact = pipe.decode(latents)
        if length == lengths[0]:
            own_error = mel_distance(log_mel(waveform, SAMPLING_RATE)[:, :, : exact.shape[2]], exact)
        for rows in WINDOWS_OF_DECODING:
            if latents.shape[2] > rows:
                with patch.multiple(decoding, WINDOW_ROWS=rows, OVERLAP_ROWS=rows // 4):
                    errors[length, rows] = mel_distance(exact, pipe.decode(latents, exact=False))
    head = " | ".join(f"windows of {rows} rows" for rows in WINDOWS_OF_DECODING)
    lines = [f"| length | {head} |", "| ---: |" + " ---: |" * len(WINDOWS_OF_DECODING)]
    for length in lengths:
        cells = [
            f"{errors[length, rows]:.1f} dB" if (length, rows) in errors else "-"
            for rows in WINDOWS_OF_DECODING
        ]
        lines.append(f"| {length * CLIP_SECONDS:.0f} s | {' | '.join(cells)} |")
    lines += ["", f"The VAE's own error is {own_error:.1f} dB. Seed {seed}."]
    return "\n".join(lines)


def mel_distance(expected: Tensor, actual: Tensor) -> float:
    """The mean distance of log-mel spectrograms in dB, within 80 dB of the first one's maximum."""
    lowest = expected.max() - RANGE_DB / DECIBELS_PER_NEPER
    return float(DECIBELS_PER_NEPER * (expected.clamp(min=lowest) - actual.clamp(min=lowest)).abs().mean())


# --- seams


def seams_table(model: Model, count: int, seed: int) -> str:
    """How much changes at the seam of a loop, and elsewhere, and the deepest gap."""
    cases = draw_cases("seams", looped, count, seed, chosen_on=False)
    lines = [
        "| | level at the seam | elsewhere | spectrum at the seam | elsewhere | gap |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, loop, around in (
        ("not a loop", False, windows.around_predictor),
        ("a single cut that moves", True, lambda *_, **__: windows.shifted()),
        ("`loop=True`", True, windows.around_predictor),
    ):
        with patch.object(sources, "around_predictor", around):
            found = np.array([seam(one) for one in model.write(cases, CLIP_SECONDS / 2, loop=loop)])
        means = " | ".join(f"{value:.1f} dB" for value in found[:, :4].mean(0))
        gaps = f"{found[:, 4].min():.1f} to {found[:, 4].max():.1f} dB"
        lines.append(f"| {name} | {means} | {gaps} |")
    lines += ["", f"{count} sounds of {CLIP_SECONDS / 2:g} s, {model.steps} steps, seed {seed}."]
    return "\n".join(lines)


def seam(waveform: np.ndarray) -> tuple[float, float, float, float, float]:
    """The changes of level and spectrum at a loop's seam and elsewhere, and its deepest gap, in dB."""
    part = round(SEAM * SAMPLING_RATE)
    count = len(waveform) // part
    # The last and the first part are neighbors.
    parts = [waveform[i * part : (i + 1) * part] for i in range(count - 1)] + [waveform[-part:]]
    levels = np.array([level(one) for one in parts])
    bands = np.stack([third_octaves(spectrogram(one).mean(0)) for one in parts])
    spectra = 10 * np.log10(np.maximum(bands, bands.max() * 10 ** (-AUDIBLE_DEPTH / 10)))
    level_steps = np.abs(np.diff(levels, append=levels[:1]))
    spectrum_steps = np.abs(np.diff(spectra, axis=0, append=spectra[:1])).mean(1)
    twice = np.concatenate([waveform, waveform, waveform])
    seconds = len(waveform) / SAMPLING_RATE
    gap = deepest_dip(twice, seconds, 2 * seconds)
    return (
        float(level_steps[-1]),
        float(level_steps[:-1].mean()),
        float(spectrum_steps[-1]),
        float(spectrum_steps[:-1].mean()),
        gap,
    )


# --- skip


def skip_table(model: Model, count: int, seed: int) -> str:
    """What the share of the steps that an inversion skips changes."""
    cases = draw_cases("skip", sweep, count, seed, chosen_on=False)
    source = latents_of(model.pipe, [case.source for case in cases])
    run = inverted("ddpm")(model, cases)
    rows: list[tuple[str, Sequence[np.ndarray]]] = [("no editing", [case.source for case in cases])]
    rows += [(f"{skip:g}", run({"skip": skip})) for skip in SKIPS]
    rows.append(("generated from text", model.write(cases)))
    lines = ["| `skip` | prompts right | distance |", "| --- | ---: | ---: |"]
    for name, sounds in rows:
        right = sum(all(matches(case.scene, one).values()) for case, one in zip(cases, sounds, strict=True))
        distance = (latents_of(model.pipe, sounds) - source).norm() / source.norm()
        lines.append(f"| {name} | {right} of {count} | {float(distance):.1f} |")
    lines += ["", f"DDPM inversion in {model.steps} steps, guidance {model.guidance:g}, seed {seed}."]
    return "\n".join(lines)


def latents_of(pipe: AudioLDM2Pipeline, sounds: Sequence[np.ndarray]) -> Tensor:
    """The latents of sounds, which may differ in length by a fraction of a latent."""
    shortest = min(len(one) for one in sounds)
    rows = int(CLIP_SECONDS * SAMPLING_RATE) // sources.latent_samples(pipe) - 1
    waves = torch.from_numpy(np.stack([one[:shortest] for one in sounds]))
    return pipe.encode_audio(waves, SAMPLING_RATE)[:, :, :rows]


LONG = Path("docs") / "long-sounds.md"
DETAILS = (
    Detail("windows", LONG, windows_table),
    Detail("decoding", LONG, decoding_table),
    Detail("seams", LONG, seams_table),
    Detail("skip", Path("docs") / "editing-by-inversion.md", skip_table),
)
