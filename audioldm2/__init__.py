"""audioldm2: the AudioLDM 2 text-to-audio pipeline in plain PyTorch.

    from audioldm2 import AudioLDM2Pipeline

    pipe = AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2")
    audio = pipe("A hammer hits a wooden surface.").audios[0]  # numpy, 16 kHz

Every stage can be used alone (`UNet`, `VAE`, ...). Names are imported when they are first used, so that
importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
DISTRIBUTION = "audioldm2-torch"  # the package's name on PyPI

_HOMES = {
    "AudioLDM2Pipeline": "audioldm2.pipeline",
    "AudioPipelineOutput": "audioldm2.output",
    "CheckpointError": "audioldm2.checkpoints.errors",
    "ClapFeatureExtractor": "audioldm2.audio.clap_features",
    "ClapModel": "audioldm2.models.clap",
    "DDIMScheduler": "audioldm2.schedulers",
    "DPMSolverMultistepScheduler": "audioldm2.schedulers",
    "FeatureCaching": "audioldm2.feature_cache",
    "GPT2": "audioldm2.models.gpt2",
    "HifiGan": "audioldm2.models.hifigan",
    "LatentRecorder": "audioldm2.sampling",
    "LogMel": "audioldm2.audio.log_mel",
    "LogMelConfig": "audioldm2.audio.log_mel",
    "MissingCheckpointError": "audioldm2.checkpoints.errors",
    "NonFiniteError": "audioldm2.tensors",
    "ProjectionModel": "audioldm2.models.projection",
    "QUALITIES": "audioldm2.quality",
    "Quality": "audioldm2.quality",
    "T5Encoder": "audioldm2.models.t5",
    "UNet": "audioldm2.models.unet",
    "UniPCMultistepScheduler": "audioldm2.schedulers",
    "VAE": "audioldm2.models.vae",
    "VitsTextEncoder": "audioldm2.models.vits",
    "read_sound": "audioldm2.audio.sound_file",
    "read_wav": "audioldm2.audio.wav",
    "record_attention": "audioldm2.attention",
    "resample": "audioldm2.audio.resample",
    "write_wav": "audioldm2.audio.wav",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:  # `as` marks what is exported
    from audioldm2.attention import record_attention as record_attention
    from audioldm2.audio.clap_features import ClapFeatureExtractor as ClapFeatureExtractor
    from audioldm2.audio.log_mel import LogMel as LogMel, LogMelConfig as LogMelConfig
    from audioldm2.audio.resample import resample as resample
    from audioldm2.audio.sound_file import read_sound as read_sound
    from audioldm2.audio.wav import read_wav as read_wav, write_wav as write_wav
    from audioldm2.checkpoints.errors import (
        CheckpointError as CheckpointError,
        MissingCheckpointError as MissingCheckpointError,
    )
    from audioldm2.feature_cache import FeatureCaching as FeatureCaching
    from audioldm2.models.clap import ClapModel as ClapModel
    from audioldm2.models.gpt2 import GPT2 as GPT2
    from audioldm2.models.hifigan import HifiGan as HifiGan
    from audioldm2.models.projection import ProjectionModel as ProjectionModel
    from audioldm2.models.t5 import T5Encoder as T5Encoder
    from audioldm2.models.unet import UNet as UNet
    from audioldm2.models.vae import VAE as VAE
    from audioldm2.models.vits import VitsTextEncoder as VitsTextEncoder
    from audioldm2.output import AudioPipelineOutput as AudioPipelineOutput
    from audioldm2.pipeline import AudioLDM2Pipeline as AudioLDM2Pipeline
    from audioldm2.quality import QUALITIES as QUALITIES, Quality as Quality
    from audioldm2.sampling import LatentRecorder as LatentRecorder
    from audioldm2.schedulers import (
        DDIMScheduler as DDIMScheduler,
        DPMSolverMultistepScheduler as DPMSolverMultistepScheduler,
        UniPCMultistepScheduler as UniPCMultistepScheduler,
    )
    from audioldm2.tensors import NonFiniteError as NonFiniteError


def __getattr__(name: str) -> Any:
    if name.endswith("Scheduler") and name not in _HOMES:
        raise AttributeError(
            f"audioldm2 has no {name}; import it from diffusers, and assign it to pipe.scheduler"
        )
    if name not in _HOMES:
        raise AttributeError(f"module 'audioldm2' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
