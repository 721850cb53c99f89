"""All figures of a set of sounds at once, for benchmarks and for `audioldm2 evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2.audio.log_mel import LogMel
from audioldm2.audio.resample import resample
from audioldm2.editing.sound import Audio, Sound, recording
from audioldm2.metrics.clap import as_list, embed_sounds, embed_texts
from audioldm2.metrics.distances import (
    GROUPS,
    SPLITS,
    Embeddings,
    Figure,
    as_embeddings,
    frechet_distance,
    frechet_spread,
    halves,
    kernel_distance,
    kernel_spread,
)
from audioldm2.metrics.spectra import log_mel_distance
from audioldm2.quoting import quoted

PADDING_S = 0.1  # that lossy codecs add to a sound, at most
Captions = Sequence[str | Sequence[str] | None]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; None is what it could not measure from what it was given.

    Attributes:
        frechet: `frechet_distance` from the reference.
        halves: of the reference, what the Fréchet distance gives where nothing differs.
        kernel: `kernel_distance` from the reference.
        clap: mean of the CLAP scores.
        log_mel: mean of the log-mel distances from the originals, in dB.
        references: the number of sounds in the reference.
        clap_scores: of each sound; None without a caption.
        log_mel_distances: of each sound in dB; None without an original.
    """

    frechet: Figure | None = None
    halves: Figure | None = None
    kernel: Figure | None = None
    clap: Figure | None = None
    log_mel: Figure | None = None
    references: int | None = None
    clap_scores: tuple[float | None, ...] = ()
    log_mel_distances: tuple[float | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; a spread that is not known is None."""
        found = asdict(self)
        for figure in found.values():
            if isinstance(figure, dict) and math.isnan(figure["spread"]):
                figure["spread"] = None
        return found


def evaluate(
    pipe: Any,
    sounds: Audio,
    sampling_rate: int | None = None,
    *,
    reference: Audio | None = None,
    reference_rate: int | None = None,
    reference_embeddings: Embeddings | None = None,
    captions: Captions | None = None,
    originals: Sequence[Sound | None] | Tensor | np.ndarray[Any, Any] | None = None,
    originals_rate: int | None = None,
    resample_to: int | None = None,
) -> Evaluation:
    """Measure the quality of sounds; docs/metrics.md explains the figures.

    Args:
        pipe: a pipeline, or `ClapScorer`; its CLAP and its progress bars are used.
        sounds: N waveforms, (N, samples), a tensor or an array; or a list of waveforms and paths of sound
            files (see `embed_sounds`).
        sampling_rate: of the waveforms, in Hz; files say their own.
        reference: real sounds of the same kinds, best as many as there are sounds.
        reference_rate: of its waveforms, in Hz; `sampling_rate` by default.
        reference_embeddings: instead of `reference`, what `embed_sounds` made of it, (M, P): a benchmark
            embeds it once.
        captions: of each sound: a text, several whose scores are averaged, or None.
        originals: for each sound the one of the same prompt and noise that it should be, or None. The longer
            of the two is cut if they differ by at most 0.1 s.
        originals_rate: of their waveforms, in Hz; `sampling_rate` by default.
        resample_to: a rate in Hz to which sounds and reference are resampled before they are embedded.

    Raises:
        ImportError, OSError: a sound file cannot be read.
        TypeError, ValueError: sounds or captions that cannot be used; the message names them.

    Example:
        >>> real = embed_sounds(pipe, recordings, 48000)
        >>> found = evaluate(pipe, pipe(prompts).audios, 16000, reference_embeddings=real, captions=prompts)
        >>> print(f"{found.frechet.value:.3f} ± {found.frechet.spread:.3f}")
    """
    given = as_list(sounds, sampling_rate, "sounds")
    for name, others in (("captions", captions), ("originals", originals)):
        if isinstance(others, str) or (others is not None and len(others) != len(given)):
            raise ValueError(f"{name} must have one entry for each of the {len(given)} sounds")
    if reference is not None and reference_embeddings is not None:
        raise ValueError("pass reference or reference_embeddings, not both")
    found: dict[str, Any] = {}
    distant = reference is not None or reference_embeddings is not None
    if distant or captions is not None:
        embeddings = embed_sounds(pipe, sounds, sampling_rate, resample_to=resample_to)
    if distant:
        if reference is not None:
            rate = _rate_of(reference, reference_rate, sampling_rate)
            reference_embeddings = embed_sounds(
                pipe, reference, rate, resample_to=resample_to, name="reference"
            )
        assert reference_embeddings is not None
        found |= _distances(pipe, embeddings, reference_embeddings)
    if captions is not None:
        scores = _clap_scores(pipe, captions, embeddings)
        found |= {"clap": _mean(scores), "clap_scores": tuple(scores)}
    if originals is not None:
        distances = _log_mel_distances(pipe, given, originals, sampling_rate, originals_rate)
        found |= {"log_mel": _mean(distances), "log_mel_distances": tuple(distances)}
    return Evaluation(**found)


def _distances(pipe: Any, embeddings: Tensor, reference: Embeddings) -> dict[str, Any]:
    count = len(embeddings)
    real = as_embeddings("reference", reference)
    as_embeddings("sounds", embeddings)
    enough = len(real) >= 4
    with pipe.progress("Comparing", min(count, GROUPS) + (SPLITS if enough else 0)) as bar:
        return {
            "frechet": Figure(
                frechet_distance(embeddings, real), frechet_spread(embeddings, real, bar.update), count
            ),
            "halves": halves(real, after=bar.update) if enough else None,
            "kernel": Figure(kernel_distance(embeddings, real), kernel_spread(embeddings, real), count),
            "references": len(real),
        }


def _clap_scores(pipe: Any, captions: Captions, embeddings: Tensor) -> list[float | None]:
    pairs: list[tuple[int, str]] = []
    for index, each in enumerate(captions):
        texts = [each] if isinstance(each, str) else list(each or ())
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"captions[{index}] must be a text or a list of texts, got {quoted(each)}")
        pairs += [(index, text) for text in texts]
    scores: list[list[float]] = [[] for _ in captions]
    if pairs:
        rows = torch.tensor([index for index, _ in pairs])
        cosines = (embed_texts(pipe, [text for _, text in pairs]) * embeddings[rows]).sum(-1)
        for (index, _), cosine in zip(pairs, cosines.tolist(), strict=True):
            scores[index].append(cosine)
    return [float(np.mean(each)) if each else None for each in scores]


def _log_mel_distances(
    pipe: Any,
    sounds: Sequence[tuple[str, Sound]],
    originals: Sequence[Sound | None] | Tensor | np.ndarray[Any, Any],
    sampling_rate: int | None,
    originals_rate: int | None,
) -> list[float | None]:
    log_mel = LogMel()
    rate = log_mel.config.sampling_rate
    distances: list[float | None] = []
    with pipe.progress("Comparing spectrograms", len(sounds)) as bar:
        for index, ((name, sound), original) in enumerate(zip(sounds, originals, strict=True)):
            bar.update()
            if original is None:
                distances.append(None)
                continue
            own = _rate_of(original, originals_rate, sampling_rate)
            ((label, given),) = as_list([original], own, f"originals[{index}]")
            pair = [recording(name, sound, sampling_rate, False), recording(label, given, own, False)]
            first, second = (resample(each.waveform, each.rate, rate).float() for each in pair)
            if abs(len(first) - len(second)) > PADDING_S * rate:
                lengths = f"{len(first) / rate:.3g} and {len(second) / rate:.3g} s"
                raise ValueError(f"{pair[0].name} and {pair[1].name} differ in length ({lengths})")
            samples = min(len(first), len(second))
            distances.append(log_mel_distance(first[:samples], second[:samples], rate, log_mel).item())
    return distances


def _rate_of(sounds: Any, given: int | None, default: int | None) -> int | None:
    """The rate of waveforms; None if there are only files."""
    each = sounds if isinstance(sounds, list | tuple) else [sounds]
    has_waveforms = any(isinstance(one, Tensor | np.ndarray) for one in each)
    return given if given is not None or not has_waveforms else default


def _mean(values: Sequence[float | None]) -> Figure | None:
    """The mean of what is known, with its standard error; None if nothing is."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    error = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else math.nan
    return Figure(float(known.mean()), error, len(known))
