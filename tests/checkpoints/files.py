"""A checkpoint's files, as the tests read, change and write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS

State = dict[str, Tensor]
REFERENCES = {
    "text_encoder": transformers.ClapModel,
    "text_encoder_2": transformers.T5EncoderModel,
    "projection_model": diffusers.AudioLDM2ProjectionModel,
    "language_model": transformers.GPT2Model,
    "unet": diffusers.AudioLDM2UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "vocoder": transformers.SpeechT5HifiGan,
}
# Endings of buffers of the reference that are computed here.
COMPUTED = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")


def stem(part: str, suffix: str) -> str:
    if part in ("projection_model", "unet", "vae"):
        return "diffusion_pytorch_model"
    return "model" if suffix == "safetensors" else "pytorch_model"


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{stem(part, 'safetensors')}.safetensors"


def load(folder: Path, part: str, **options) -> nn.Module:
    return load_stage(folder / part, PARTS[part][0], **options)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def rewrite(checkpoint: Path, part: str, write: Callable[[Path, str, State], None]) -> None:
    """Replace a part's weights file by what `write` makes of its tensors."""
    path = weights(checkpoint, part)
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    write(path.parent, part, state)


def write_safetensors(folder: Path, part: str, state: State) -> None:
    save_file(state, folder / f"{stem(part, 'safetensors')}.safetensors", metadata={"format": "pt"})


def write_bin(folder: Path, part: str, state: State) -> None:
    torch.save(state, folder / f"{stem(part, 'bin')}.bin")


def same_state(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def waveform(folder: Path, **options) -> Tensor:
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "A hammer hitting a wooden surface",
        negative_prompt="Low quality",
        num_inference_steps=2,
        audio_length_in_s=0.64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).audios
