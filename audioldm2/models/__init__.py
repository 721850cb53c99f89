"""The stages, one file each, in the order in which they run.

    clap.py, htsat.py   text_encoder       prompt -> one vector; ranks finished sounds
    t5.py, vits.py      text_encoder_2     prompt, or words to speak -> one state per token
    projection.py       projection_model   both -> one sequence
    gpt2.py             language_model     the sequence -> 8 vectors, the "language of audio"
    unet.py             unet               noisy latents, GPT-2's vectors, T5's states -> the noise
    vae.py              vae                latents <-> log-mel spectrogram
    hifigan.py          vocoder            log-mel spectrogram -> waveform

A stage's file imports torch, einops and three small modules: layers.py (shared blocks), config.py (helpers of
config dataclasses) and stage.py (the base class); the VAE also imports `audioldm2.noise`. A stage knows
nothing about checkpoints: `audioldm2.checkpoints.formats.PARTS` connects the two.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioldm2.models.clap import ClapModel
    from audioldm2.models.gpt2 import GPT2
    from audioldm2.models.hifigan import HifiGan
    from audioldm2.models.projection import ProjectionModel
    from audioldm2.models.stage import Stage
    from audioldm2.models.t5 import T5Encoder
    from audioldm2.models.unet import UNet
    from audioldm2.models.vae import VAE
    from audioldm2.models.vits import VitsTextEncoder

_MODULES = {
    "GPT2": "gpt2",
    "VAE": "vae",
    "ClapModel": "clap",
    "HifiGan": "hifigan",
    "ProjectionModel": "projection",
    "Stage": "stage",
    "T5Encoder": "t5",
    "UNet": "unet",
    "VitsTextEncoder": "vits",
}
__all__ = [
    "GPT2",
    "VAE",
    "ClapModel",
    "HifiGan",
    "ProjectionModel",
    "Stage",
    "T5Encoder",
    "UNet",
    "VitsTextEncoder",
]


def __getattr__(name: str) -> Any:
    """Import a stage when it is first asked for, so that using one does not import all."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
