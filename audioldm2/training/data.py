"""Training data: sound files and captions -> latents and conditions.

    items = read_table("data.csv")                 # the path and the caption of each row
    data = encode_items(pipe, items, how, cache)   # computed once, kept in a safetensors file

The file is written again when a sound, a caption, a setting or a weight of the encoders has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from audioldm2.audio.log_mel import LogMel
from audioldm2.audio.resample import resample
from audioldm2.audio.sound_file import read_sound
from audioldm2.audio.waveforms import SILENCE
from audioldm2.decoding import frames_and_samples
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.quoting import one_line
from audioldm2.runtime.precision import stage_device, stage_dtype
from audioldm2.tensors import check_finite
from audioldm2.training.cache import cached, digest_of
from audioldm2.training.conditions import EncodedTexts, encode_texts
from audioldm2.training.table import Item

SHORTEST = 0.1  # s of sound in a file
PEAK = 0.5  # that examples are scaled to, as in AudioLDM 2's training
SOUNDS_AT_ONCE = 8  # that the VAE encodes
# Counted up when this module computes something else from the same files.
VERSION = 1
TEXTS = ("states", "mask", "vectors", "uncond")  # the fields of `EncodedTexts`, in the cache


# --- sounds


@dataclass(frozen=True)
class Excerpting:
    """How sounds become examples of equal length.

    Args:
        rate: their sampling rate in Hz.
        samples: of each.
        excerpts: of each longer file, at most.
        keep_level: leave their levels as they are.
    """

    rate: int
    samples: int
    excerpts: int = 1
    keep_level: bool = False


def read_excerpts(item: Item, how: Excerpting) -> Tensor:
    """Read a sound file: mixed to one channel, resampled, cut or padded with silence at its end.

    Excerpts of a longer file are spread evenly from its beginning to its end; those that are silent are left
    out.

    Returns:
        (n, samples) float32, from 1 to `how.excerpts` examples.

    Raises:
        ImportError: the file is not WAV, and soundfile is not installed.
        OSError: the file cannot be read.
        ValueError: it is not a sound, too short or silent, or has samples that are not finite.
    """
    try:
        waveform, rate = read_sound(item.path)
    except ValueError as error:
        raise ValueError(f"{item.where}: {one_line(error)}") from error
    waveform = waveform.mean(0)
    seconds = len(waveform) / rate
    if seconds < SHORTEST:
        raise ValueError(
            f"{item.where}: {item.path} has {1000 * seconds:.0f} ms of sound; a clip needs at least "
            f"{1000 * SHORTEST:.0f} ms"
        )
    if waveform.abs().max() < SILENCE:
        raise ValueError(f"{item.where}: {item.path} is silent")
    waveform = resample(waveform, rate, how.rate)
    rest = len(waveform) - how.samples
    if rest <= 0:
        parts = F.pad(waveform, (0, -rest))[None]
    else:
        count = min(how.excerpts, -(-len(waveform) // how.samples))
        starts = torch.linspace(0, rest if count > 1 else 0, count).long().tolist()
        parts = torch.stack([waveform[start : start + how.samples] for start in starts])
        audible = parts.abs().amax(1) >= SILENCE
        if not audible.any():
            raise ValueError(f"{item.where}: the excerpts of {item.path} are silent; take more of them")
        parts = parts[audible]
    if not how.keep_level:
        parts = parts - parts.mean(1, keepdim=True)
        parts = parts * (PEAK / parts.abs().amax(1, keepdim=True).clamp(min=SILENCE))
    return parts


# --- latents and conditions


@dataclass(frozen=True)
class EncodedData:
    """What the VAE and the text encoders make of n items, on the CPU.

    Attributes:
        means: of the VAE's posteriors, scaled as the UNet generates latents, (m, 8, T/4, F/4).
        spreads: their standard deviations, the same shape.
        items: the item of each of the m examples, (m,).
        texts: the conditions of the items' captions, n rows.
        digest: of everything that these depend on.
    """

    means: Tensor
    spreads: Tensor
    items: Tensor
    texts: EncodedTexts
    digest: str


def training_samples(pipe: AudioLDM2Pipeline, seconds: float | None) -> int:
    """The samples of an example whose latents have whole rows.

    Args:
        pipe: the pipeline.
        seconds: None is the length that the checkpoint was trained on.
    """
    vocoder, vae = pipe.part("vocoder"), pipe.part("vae")
    frames, _ = frames_and_samples(pipe.part("unet"), vae, vocoder, seconds)
    return int(frames * vocoder.hop_length)


def encode_items(
    pipe: AudioLDM2Pipeline, items: Sequence[Item], how: Excerpting, cache: Path, show: bool | None = None
) -> EncodedData:
    """Compute latents and conditions of items, or read them from a file where they are kept.

    Args:
        pipe: its VAE and text encoders are used.
        items: n of them.
        how: how sounds become examples.
        cache: the file, .safetensors. It is written again if a sound, a caption, a setting or a weight of the
            encoders has changed.
        show: whether to show progress bars; None is on a terminal.

    Raises:
        OSError, ValueError: a sound that cannot be used; the message names its line of the table.
        NonFiniteError: an encoder returned numbers that are not finite.
    """
    log_mel = LogMel(pipe.log_mel_config())
    captions = [item.caption for item in items]

    def make() -> dict[str, Tensor]:
        found = _encode_sounds(pipe, log_mel, items, how, show)
        texts = encode_texts(pipe, captions, show=show)
        return {**found, **{name: getattr(texts, name) for name in TEXTS}}

    sources = [*_sources(pipe, log_mel, items, how)]
    tensors = cached(cache, sources, make)
    texts = EncodedTexts(**{name: tensors.pop(name) for name in TEXTS})
    return EncodedData(**tensors, texts=texts, digest=digest_of(sources))


@torch.no_grad()
def _encode_sounds(
    pipe: AudioLDM2Pipeline, log_mel: LogMel, items: Sequence[Item], how: Excerpting, show: bool | None
) -> dict[str, Tensor]:
    rows, means, spreads = [], [], []
    hidden = None if show is None else not show
    with (
        pipe.generation(),
        pipe.running("vae") as vae,
        tqdm(total=len(items), desc="Encoding sounds", disable=hidden) as bar,
    ):
        device, dtype, factor = stage_device(vae), stage_dtype(vae), vae.config.scaling_factor

        def examples() -> Iterator[tuple[int, Tensor]]:
            for row, item in enumerate(items):
                for waveform in read_excerpts(item, how):
                    yield row, waveform
                bar.update()

        stream = examples()
        while batch := [*islice(stream, SOUNDS_AT_ONCE)]:
            rows += [row for row, _ in batch]
            mel = log_mel(torch.stack([waveform for _, waveform in batch]).to(device), how.rate)
            posterior = vae.encode(mel.to(dtype))
            means.append((posterior.mean * factor).float().cpu())
            spreads.append(((0.5 * posterior.log_variance).exp() * factor).float().cpu())
            check_finite("vae", means[-1])
    return {"means": torch.cat(means), "spreads": torch.cat(spreads), "items": torch.tensor(rows)}


def _sources(
    pipe: AudioLDM2Pipeline, log_mel: LogMel, items: Sequence[Item], how: Excerpting
) -> Iterator[bytes]:
    """Everything that latents and conditions depend on."""
    yield f"{VERSION} {log_mel.config} {how}".encode()
    for name in ("vae", "text_encoder", "text_encoder_2", "projection_model", "language_model"):
        yield weights_digest(getattr(pipe, name)).encode()
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer([item.caption for item in items], verbose=False).input_ids
        yield json.dumps(ids).encode()
    for item in items:
        yield item.caption.encode()
        yield item.path.read_bytes()


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 digest of a module's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
