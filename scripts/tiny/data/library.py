"""The training library on disk: sounds, their log-mel spectrograms and captions, made once for all stages."""

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
from scripts.tiny.data import captions as captions_module, sounds as sounds_module
from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import CLIP_SAMPLES, SAMPLING_RATE, Scene, Sound, draw_scene, render
from scripts.tiny.sizes import HOP_LENGTH

LIBRARY_SIZE = 6000  # sounds
CAPTIONS_PER_SOUND = 6
INT16_MAX = 32767


class Library:
    """Sounds with their captions.

    Args:
        scenes: what each of the n sounds contains.
        captions: `CAPTIONS_PER_SOUND` training captions of each.
        samples: (n, CLIP_SAMPLES) int16.
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
        """The waveforms of some sounds, (B, CLIP_SAMPLES) float32 in [-1, 1]."""
        return torch.from_numpy(self._samples[np.asarray(indices)].astype(np.float32) / INT16_MAX)

    def mels(self, indices: Tensor | list[int]) -> Tensor:
        """Their log-mel spectrograms with a frame every `HOP_LENGTH` samples, (B, 1, 160, 64) float32."""
        return torch.from_numpy(self._mels[np.asarray(indices)].astype(np.float32))[:, None]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random indices of a batch, (batch,)."""
        return torch.randint(len(self), (batch,), generator=generator)


def make_library(size: int, seed: int) -> Library:
    """Synthesize a library of `size` sounds. The i-th sound depends on `seed` and i alone."""
    log_mel = LogMel(LogMelConfig(hop_length=HOP_LENGTH))
    samples = np.empty((size, CLIP_SAMPLES), np.int16)
    mels = np.empty((size, CLIP_SAMPLES // log_mel.config.hop_length, log_mel.config.n_mels), np.float16)
    scenes, captions = [], []
    for i in tqdm(range(size), desc="Synthesizing sounds", disable=None):
        rng = np.random.default_rng([seed, i])
        scene = draw_scene(rng)
        samples[i] = np.round(render(scene, rng) * INT16_MAX)
        waveform = torch.from_numpy(samples[i].astype(np.float32) / INT16_MAX)
        mels[i] = log_mel(waveform[None], SAMPLING_RATE)[0, 0].numpy()
        scenes.append(scene)
        captions.append([caption(scene, rng) for _ in range(CAPTIONS_PER_SOUND)])
    return Library(scenes, captions, samples, mels)


def load_library(folder: Path, size: int = LIBRARY_SIZE, seed: int = 0) -> Library:
    """Load a library from disk; it is made first if it is missing or if the code that makes it has changed.

    The subfolder's name holds a checksum of the source files that decide what is in the library, so another
    version of them gets a subfolder of its own.

    Args:
        folder: where libraries are kept; created if missing.
        size: number of sounds.
        seed: of the sounds and captions.
    """
    makers = (sounds_module.__file__, captions_module.__file__, __file__)
    source = zlib.crc32(b"".join(Path(path).read_bytes() for path in makers) + str(HOP_LENGTH).encode())
    subfolder = folder / f"library-{size}-{seed}-{source:08x}"
    texts, arrays = subfolder / "captions.json", [subfolder / "samples.npy", subfolder / "mels.npy"]
    if not texts.is_file():
        library = make_library(size, seed)
        subfolder.mkdir(parents=True, exist_ok=True)
        for path, array in zip(arrays, (library._samples, library._mels), strict=True):
            np.save(path, array)
        content = {"scenes": [asdict(scene) for scene in library.scenes], "captions": library.captions}
        with replacing(texts) as temporary:  # written last and atomically: it marks the library as complete
            temporary.write_text(json.dumps(content), encoding="utf-8")
    content = json.loads(texts.read_text(encoding="utf-8"))
    scenes = [
        Scene(tuple(Sound(**sound) for sound in scene["sounds"]), scene["loudness"])
        for scene in content["scenes"]
    ]
    return Library(scenes, content["captions"], *(np.load(path, mmap_mode="r") for path in arrays))
