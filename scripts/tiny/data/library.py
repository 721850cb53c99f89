"""The library on disk: sounds, their log-mel pictures and captions, made once and read by every trainer."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2.atomic import replacing
from audioldm2.audio.log_mel import LogMel, LogMelConfig
from scripts.tiny.data import captions as captions_module, sounds
from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import SAMPLES, SAMPLING_RATE, Scene, Sound, draw_scene, render
from scripts.tiny.sizes import HOP

SIZE = 6000
CAPTIONS = 6  # of each sound
FULL = 32767  # of a 16-bit sample


class Library:
    """Sounds with their captions.

    Args:
        scenes: what is to be heard in each.
        captions: `CAPTIONS` of each, in training's phrasings.
        samples: (n, SAMPLES) int16.
        mels: (n, 160, 64) float16, natural logarithm.
    """

    def __init__(
        self, scenes: list[Scene], captions: list[list[str]], samples: np.ndarray, mels: np.ndarray
    ) -> None:
        self.scenes, self.captions = scenes, captions
        self._samples, self._mels = samples, mels

    def __len__(self) -> int:
        return len(self.scenes)

    def waveforms(self, indices: Tensor | list[int]) -> Tensor:
        """(B, SAMPLES) float32 in [-1, 1]."""
        return torch.from_numpy(self._samples[np.asarray(indices)].astype(np.float32) / FULL)

    def mels(self, indices: Tensor | list[int]) -> Tensor:
        """What `LogMel` makes of the sounds, a frame every `HOP` samples: (B, 1, 160, 64) float32."""
        return torch.from_numpy(self._mels[np.asarray(indices)].astype(np.float32))[:, None]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Indices of a batch, (batch,)."""
        return torch.randint(len(self), (batch,), generator=generator)


def make_library(size: int, seed: int) -> Library:
    """A library of so many sounds; another seed gives other sounds."""
    log_mel = LogMel(LogMelConfig(hop_length=HOP))
    samples = np.empty((size, SAMPLES), np.int16)
    mels = np.empty((size, SAMPLES // log_mel.config.hop_length, log_mel.config.n_mels), np.float16)
    scenes, captions = [], []
    for i in tqdm(range(size), desc="Synthesising sounds", disable=None):
        rng = np.random.default_rng([seed, i])
        scene = draw_scene(rng)
        samples[i] = np.round(render(scene, rng) * FULL)
        waveform = torch.from_numpy(samples[i].astype(np.float32) / FULL)
        mels[i] = log_mel(waveform[None], SAMPLING_RATE)[0, 0].numpy()
        scenes.append(scene)
        captions.append([caption(scene, rng) for _ in range(CAPTIONS)])
    return Library(scenes, captions, samples, mels)


def load_library(folder: Path, size: int = SIZE, seed: int = 0) -> Library:
    """The library in `folder`, made there first where it is missing, or where what makes it has changed.

    Args:
        folder: made where missing.
        size: number of sounds.
        seed: of their drawing.
    """
    makers = (sounds.__file__, captions_module.__file__, __file__)
    source = zlib.crc32(b"".join(Path(path).read_bytes() for path in makers) + str(HOP).encode())
    place = folder / f"library-{size}-{seed}-{source:08x}"
    texts, arrays = place / "captions.json", [place / "samples.npy", place / "mels.npy"]
    if not texts.is_file():
        library = make_library(size, seed)
        place.mkdir(parents=True, exist_ok=True)
        for path, array in zip(arrays, (library._samples, library._mels), strict=True):
            np.save(path, array)
        content = {"scenes": [asdict(scene) for scene in library.scenes], "captions": library.captions}
        with replacing(texts) as temporary:  # last, and whole: it says that the rest is there
            temporary.write_text(json.dumps(content), encoding="utf-8")
    content = json.loads(texts.read_text(encoding="utf-8"))
    scenes = [
        Scene(tuple(Sound(**sound) for sound in scene["sounds"]), scene["loudness"])
        for scene in content["scenes"]
    ]
    return Library(scenes, content["captions"], *(np.load(path, mmap_mode="r") for path in arrays))
