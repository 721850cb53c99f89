"""The stages, one file each, and how each lies in a checkpoint.

A stage's own file knows nothing of checkpoints: it imports torch, einops and `layers`, and can be read or
copied alone. What joins the two stands here, once: `PARTS`, and the `from_pretrained` and `save_pretrained`
that every stage is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from audioldm2.checkpoints.hub import checkpoint_folder, default_dtype
from audioldm2.checkpoints.stage import Format, load_stage, save_stage
from audioldm2.models.clap import ClapConfig, ClapModel
from audioldm2.models.gpt2 import GPT2, GPT2Config
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.projection import ProjectionConfig, ProjectionModel
from audioldm2.models.t5 import T5Config, T5Encoder
from audioldm2.models.unet import UNet, UNetConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.models.vits import VitsTextConfig, VitsTextEncoder

_T5 = Format(
    T5Encoder,
    T5Config,
    "text_encoder_2.transformers",
    {"architectures": ["T5EncoderModel"], "model_type": "t5"},
    # A checkpoint of the whole T5 has the encoder in it.
    aliases=("T5ForConditionalGeneration", "T5Model"),
)
_VITS = Format(
    VitsTextEncoder,
    VitsTextConfig,
    "text_encoder_2.vits",
    {"architectures": ["VitsModel"], "model_type": "vits"},
)

# The parts that have weights, by the Hub's folder names, in the order in which the data walks through them.
PARTS: dict[str, tuple[Format[Any], ...]] = {
    "text_encoder": (
        Format(
            ClapModel,
            ClapConfig,
            "text_encoder.transformers",
            {"architectures": ["ClapModel"], "model_type": "clap"},
            later="audio",
        ),
    ),
    "text_encoder_2": (_T5, _VITS),
    "projection_model": (
        Format(
            ProjectionModel,
            ProjectionConfig,
            "projection_model.diffusers",
            {"_class_name": "AudioLDM2ProjectionModel"},
        ),
    ),
    "language_model": (
        Format(
            GPT2,
            GPT2Config,
            "language_model.transformers",
            {"architectures": ["GPT2Model"], "model_type": "gpt2"},
            aliases=("GPT2LMHeadModel",),
        ),
    ),
    "unet": (Format(UNet, UNetConfig, "unet.diffusers", {"_class_name": "AudioLDM2UNet2DConditionModel"}),),
    "vae": (Format(VAE, VAEConfig, "vae.diffusers", {"_class_name": "AutoencoderKL"}),),
    "vocoder": (
        Format(
            HifiGan,
            HifiGanConfig,
            "vocoder.transformers",
            {"architectures": ["SpeechT5HifiGan"], "model_type": "speecht5_hifigan"},
        ),
    ),
}


def format_of(stage: nn.Module) -> Format[Any]:
    """How a stage lies in a checkpoint; TypeError where it is none of ours."""
    for form in (form for forms in PARTS.values() for form in forms):
        if isinstance(stage, form.stage):
            return form
    raise TypeError(f"a {type(stage).__name__} is no stage of this package, which cannot save it")


def _give_pretrained(form: Format[Any]) -> None:
    def from_pretrained(
        cls: type[nn.Module],
        repo_or_folder: str | Path,
        subfolder: str = "",
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> nn.Module:
        """The stage with a checkpoint's weights, in eval mode.

        Args:
            repo_or_folder: a folder, "tiny" for the checkpoint in this package, or "owner/name" on the Hub.
            subfolder: where in it the stage lies, such as "unet"; "" is the top.
            torch_dtype, device, variant, revision, cache_dir, token, local_files_only: as in
                `AudioLDM2Pipeline`.

        Raises:
            CheckpointError: the checkpoint cannot be found, read or fitted.
        """
        folder = checkpoint_folder(
            repo_or_folder,
            [subfolder],
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        dtype = default_dtype(folder) if torch_dtype is None else torch_dtype
        return load_stage(folder / subfolder, form, dtype, device or "cpu", variant)

    def save_pretrained(self: nn.Module, folder: str | Path) -> None:
        """Write config.json and weights into `folder`, such that diffusers and transformers load them."""
        save_stage(self, Path(folder), form)

    form.stage.from_pretrained = classmethod(from_pretrained)
    form.stage.save_pretrained = save_pretrained


for _forms in PARTS.values():
    for _form in _forms:
        _give_pretrained(_form)
