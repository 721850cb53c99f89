"""Embeddings of sounds and texts by a checkpoint's own CLAP, and their CLAP scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.arguments import as_texts, check_count
from audioldm2.audio.resample import MAX_RATE, resample
from audioldm2.checkpoints.folder import load_checkpoint
from audioldm2.checkpoints.formats import part_classes
from audioldm2.checkpoints.hub import Source
from audioldm2.conditioning import clap_embeddings
from audioldm2.editing.sound import Audio, Sound, as_waveforms, named_sounds, recording
from audioldm2.ranking import clap_rate, embed_features
from audioldm2.runtime.precision import stage_device
from audioldm2.runtime.stages import StageRunner

PARTS = ("text_encoder", "tokenizer", "feature_extractor")
AT_ONCE = 8  # sounds, and windows of sounds, in a batch of the audio tower
TEXTS_AT_ONCE = 64


class ClapScorer(StageRunner):
    """A checkpoint's CLAP without its other stages: what the metrics need of a pipeline.

    Every function of `audioldm2.metrics` takes it in place of a pipeline.

    Args:
        text_encoder: CLAP.
        tokenizer: of its text tower.
        feature_extractor: of its audio tower.

    Example:
        >>> clap = ClapScorer.from_pretrained("tiny")
        >>> embed_sounds(clap, torch.randn(2, 16000), 16000).shape
        torch.Size([2, 64])
    """

    stage_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    main_stage: ClassVar[str] = "text_encoder"

    def __init__(self, text_encoder: Any, tokenizer: Any, feature_extractor: Any):
        super().__init__()
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.feature_extractor = feature_extractor

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
    ) -> ClapScorer:
        """Load CLAP in float32, its tokenizer and its front end from a pipeline's checkpoint.

        Args:
            repo_or_folder: a folder, "tiny", or "owner/name" on the Hub, of which only these parts are
                downloaded.
            device: where CLAP runs.
            variant: weights of a variant, such as "fp16".
            revision: branch, tag or commit on the Hub.

        Raises:
            CheckpointError: the checkpoint cannot be found or read; the message names the file.
            ValueError: the device is not available.
        """
        others = dict.fromkeys(name for name in part_classes() if name not in PARTS)
        source = Source(repo_or_folder, variant, revision)
        found = load_checkpoint(source, torch.float32, device, replaced=others).parts
        return cls(*(found[name] for name in PARTS))


@torch.no_grad()
def embed_sounds(
    pipe: Any,
    sounds: Audio,
    sampling_rate: int | None = None,
    *,
    resample_to: int | None = None,
    name: str = "sounds",
) -> Tensor:
    """Embed sounds with the audio tower of a checkpoint's CLAP.

    A sound that is longer than CLAP's window (10 s in AudioLDM 2) is cut into windows of that length, which
    are spread evenly from its beginning to its end; the mean of their embeddings is scaled to unit length.

    Args:
        pipe: a pipeline, or `ClapScorer`.
        sounds: N waveforms in [-1, 1], (N, samples), a tensor or an array; or a list of waveforms, (samples,)
            or (channels, samples), and paths of sound files, of any lengths and rates.
        sampling_rate: of the waveforms, in Hz; files say their own.
        resample_to: a rate in Hz to which all sounds are resampled first, so that frequencies that only some
            of them can have do not count.
        name: of the argument, for error messages.

    Returns:
        (N, P), each of unit length, float32, on the CPU.

    Raises:
        ImportError, OSError: a sound file cannot be read.
        TypeError, ValueError: sounds that cannot be used, such as silence; the message names them.
        NonFiniteError: CLAP returned numbers that are not finite.
    """
    given = as_list(sounds, sampling_rate, name)
    if resample_to is not None:
        check_count("resample_to", resample_to, 1, MAX_RATE)
    rows: list[Tensor] = []
    with (
        pipe.generation(),
        pipe.progress("Embedding sounds", len(given)) as bar,
        pipe.running("text_encoder") as clap,
    ):
        front_end = pipe.part("feature_extractor")
        rate = clap_rate(front_end)

        def features() -> Iterator[Tensor]:
            for label, sound in given:
                _, waveform, own = recording(label, sound, sampling_rate, warn_quiet=False)
                if resample_to is not None:
                    waveform, own = resample(waveform, own, resample_to), resample_to
                waveform = resample(waveform.to(stage_device(clap)), own, rate)
                yield front_end(windows(waveform, getattr(front_end, "nb_max_samples", None)), rate)
                bar.update()

        stream = features()
        while group := [*islice(stream, AT_ONCE)]:
            embedded = [embed_features(clap, part).float().cpu() for part in torch.cat(group).split(AT_ONCE)]
            counts = [len(each) for each in group]
            rows += [each.mean(0) for each in torch.cat(embedded).split(counts)]
    return F.normalize(torch.stack(rows), dim=-1)


def windows(waveform: Tensor, length: int | None) -> Tensor:
    """Excerpts of a waveform, evenly spread from its beginning to its end.

    Args:
        waveform: (samples,).
        length: of each, in samples; None for the whole waveform.

    Returns:
        (ceil(samples / length), length); of a shorter waveform (1, samples).
    """
    samples = len(waveform)
    if length is None or samples <= length:
        return waveform[None]
    count = -(-samples // length)
    starts = torch.linspace(0, samples - length, count, dtype=torch.float64).round().long().tolist()
    return torch.stack([waveform[start : start + length] for start in starts])


@torch.no_grad()
def embed_texts(pipe: Any, texts: str | Sequence[str]) -> Tensor:
    """Embed texts with the text tower of a checkpoint's CLAP.

    Args:
        pipe: a pipeline, or `ClapScorer`.
        texts: N of them; one that is too long is cut off, with a warning.

    Returns:
        (N, P), each of unit length, float32, on the CPU.

    Raises:
        TypeError, ValueError: there are no texts, or one is not valid.
    """
    given, found = as_texts("texts", texts, empty=True), []
    with pipe.generation():
        for start in range(0, len(given), TEXTS_AT_ONCE):
            found.append(clap_embeddings(pipe, given[start : start + TEXTS_AT_ONCE]).float().cpu())
    return torch.cat(found)


def clap_scores(
    pipe: Any,
    captions: str | Sequence[str],
    sounds: Audio,
    sampling_rate: int | None = None,
    *,
    resample_to: int | None = None,
) -> Tensor:
    """How well sounds match their captions: the cosine similarity of CLAP's embeddings.

    Args:
        pipe: a pipeline, or `ClapScorer`.
        captions: one for each sound.
        sounds: N of them; see `embed_sounds`.
        sampling_rate: of waveforms, in Hz.
        resample_to: see `embed_sounds`.

    Returns:
        (N,), from -1 to 1.

    Raises:
        As `embed_sounds` and `embed_texts` do, and ValueError if there are not as many captions as sounds.
    """
    texts = embed_texts(pipe, captions)
    embeddings = embed_sounds(pipe, sounds, sampling_rate, resample_to=resample_to)
    if len(texts) != len(embeddings):
        raise ValueError(f"{len(texts)} captions for {len(embeddings)} sounds; pass one for each")
    return (texts * embeddings).sum(-1)


def as_list(sounds: Audio, sampling_rate: int | None, name: str) -> list[tuple[str, Sound]]:
    """A caller's sounds, not read yet, each with its name for error messages; see `embed_sounds`."""
    if not isinstance(sounds, Sequence | os.PathLike):
        sounds = [*as_waveforms(sounds, name)]
    return named_sounds(sounds, sampling_rate, name)
