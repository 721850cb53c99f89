"""A quick check of an installed audioldm2, for `scripts/test_matrix`. Prints one line of JSON at the end.

    python matrix_check.py sound.npy [reference.npy]

It runs in an environment that holds the wheel and its requirements, and imports nothing from the checkout.
With the checkpoint in the package it checks that

- every public name imports, and the command runs;
- prompts are encoded as stored here (a tokenizer that fails silently gives another sound);
- a prompt gives the sound that it names, bit for bit the same twice, and again after saving and loading;
- stages equal transformers' (T5, CLAP, GPT-2, HiFi-GAN) and diffusers' (UNet, VAE) within 1e-4 of the
  output's scale, where these are installed and support the installed PyTorch;
- the sound equals `reference.npy`, which another environment wrote, within 1 % in root mean square.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import audioldm2
from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler

HOME = Path(audioldm2.__file__).parent
TINY = HOME / "tiny"
SAMPLE_RATE = 16000
PROMPTS = {  # prompt -> range in Hz that most of the energy has to be in
    "A low steady tone": (60, 700),
    "A high steady tone": (1500, 8000),
}
SAME_STAGE = 1e-4  # greatest difference, as a fraction of the greatest value
SAME_SOUND = 0.01  # root mean square of the difference, as a fraction of the sound's

# Ids with transformers 5.24 and tokenizers 0.23: CLAP's, then T5's.
ENCODED = {
    "A bell over rain, twice!": (
        "0 37 333 495 375 16 269 91 593 5 2",
        "25 48 75 119 128 5 6 11 28 26 12 246 1",
    ),
    "techno_MUSIC 128 bpm; naïve": (
        "0 88 73 394 310 67 49 57 55 45 39 225 21 22 28 267 84 81 31 225 82 69 132 112 90 73 2",
        "6 167 287 19 18 283 239 199 206 240 195 6 257 258 263 173 169 21 267 6 19 183 2 224 8 1",
    ),
}


def check_import() -> None:
    """Every public name, from site-packages, and the command."""
    assert "site-packages" in HOME.parts, f"audioldm2 is imported from {HOME}, not from the wheel"
    assert (HOME / "py.typed").is_file(), "py.typed is missing"
    for name in audioldm2.__all__:
        getattr(audioldm2, name)
    command = [sys.executable, "-m", "audioldm2", "--version"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert audioldm2.__version__ in printed, f"audioldm2 --version prints {printed!r}"


def check_tokenizers(pipe: AudioLDM2Pipeline) -> None:
    """Prompts are encoded to the stored ids."""
    for prompt, expected in ENCODED.items():
        for tokenizer, ids in zip((pipe.tokenizer, pipe.tokenizer_2), expected, strict=True):
            encoded = " ".join(map(str, tokenizer(prompt).input_ids))
            assert encoded == ids, f"{type(tokenizer).__name__} encodes {prompt!r} as {encoded}, not as {ids}"


def load(folder: str | Path) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: AudioLDM2Pipeline) -> np.ndarray:
    """One waveform per prompt, (prompts, samples)."""
    generator = torch.Generator().manual_seed(0)
    sounds: np.ndarray = pipe(
        [*PROMPTS], num_inference_steps=20, guidance_scale=2, generator=generator
    ).audios
    return sounds


def check_sound(sounds: np.ndarray) -> None:
    """The energy lies where the prompt says."""
    for (prompt, (low, high)), sound in zip(PROMPTS.items(), sounds, strict=True):
        power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        hertz = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
        share = power[(hertz >= low) & (hertz < high)].sum() / power.sum()
        assert sound.std() > 0.003, f"{prompt}: no sound, its standard deviation is {sound.std():.4f}"
        assert share > 0.7, f"{prompt}: {share:.0%} of the energy in {low} to {high} Hz"


def check_saved(pipe: AudioLDM2Pipeline) -> None:
    """Saving and loading changes no bit of the sound."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        saved = load(folder)
        align(pipe)
        align(saved)
        assert np.array_equal(generate(saved), generate(pipe)), "another sound after saving and loading"


def align(pipe: AudioLDM2Pipeline) -> None:
    """Move all weights to memory of PyTorch's own, which begins at multiples of 64 bytes.

    Weights that are mapped from a file begin anywhere, and how a matrix product rounds depends on that: it
    changes a sound by about 1e-6 in root mean square.
    """
    for stage in pipe.stages.values():
        for parameter in stage.parameters():
            parameter.data = parameter.data.clone()


def difference(sound: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference, as a fraction of the reference's."""
    return float(np.square(sound - reference).mean() ** 0.5 / np.square(reference).mean() ** 0.5)


def check_transformers(pipe: AudioLDM2Pipeline) -> None:
    """T5, CLAP's text tower, GPT-2 and HiFi-GAN beside transformers' of the same files."""

    def reference(kind: Any, name: str) -> Any:
        return kind.from_pretrained(TINY / name).float().eval()

    ids = torch.tensor([[5, 9, 20, 31, 1]])
    theirs = reference(transformers.T5EncoderModel, "text_encoder_2")(ids).last_hidden_state
    compare("T5", pipe.text_encoder_2(ids, torch.ones_like(ids)), theirs)

    ids = torch.tensor([[0, 37, 93, 120, 2]])
    theirs = reference(transformers.ClapModel, "text_encoder").get_text_features(ids)
    theirs = getattr(theirs, "pooler_output", theirs)  # an output object since transformers 5
    ours = pipe.text_encoder.text_features(ids, torch.ones_like(ids))
    compare("CLAP", ours, torch.nn.functional.normalize(theirs, dim=-1))

    states = random(1, 6, width("language_model", "n_embd"))
    theirs = reference(transformers.GPT2Model, "language_model")(inputs_embeds=states).last_hidden_state
    compare("GPT-2", pipe.language_model(states), theirs)

    mel = random(1, 20, width("vocoder", "model_in_dim"))
    compare("HiFi-GAN", pipe.vocoder(mel), reference(transformers.SpeechT5HifiGan, "vocoder")(mel))


def check_diffusers(pipe: AudioLDM2Pipeline) -> None:
    """The UNet and the VAE's decoder beside diffusers' of the same files."""
    diffusers: Any = import_module("diffusers")
    unet = diffusers.AudioLDM2UNet2DConditionModel.from_pretrained(TINY / "unet").float().eval()
    vae = diffusers.AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    _, gpt2_width, t5_width = width("unet", "cross_attention_dim")[0]
    latents, conditions = random(1, 8, 40, 16), (random(1, 8, gpt2_width), random(1, 5, t5_width))
    theirs = unet(latents, 321, encoder_hidden_states=conditions[0], encoder_hidden_states_1=conditions[1])
    compare("UNet", pipe.unet(latents, 321, *conditions), theirs.sample)
    compare("VAE", pipe.vae.decode(latents), vae.decode(latents).sample)


def width(part: str, name: str) -> Any:
    """A value of a part's config."""
    return json.loads((TINY / part / "config.json").read_text(encoding="utf-8"))[name]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < SAME_STAGE, f"{name} differs from the reference by {error:.1e} of its scale"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("sound", help="where to write the sound, an .npy file")
    parser.add_argument("reference", nargs="?", help="the sound of another environment")
    options = parser.parse_args()
    check_import()
    pipe = load("tiny")
    check_tokenizers(pipe)
    sounds = generate(pipe)
    check_sound(sounds)
    assert np.array_equal(generate(pipe), sounds), "another sound from the same seed"
    check_saved(pipe)
    compared = []
    with torch.inference_mode():
        if transformers.is_torch_available():  # false where transformers does not support this PyTorch
            check_transformers(pipe)
            compared.append("transformers")
        if find_spec("diffusers"):
            check_diffusers(pipe)
            compared.append(f"diffusers {version('diffusers')}")
    np.save(options.sound, sounds)
    change = difference(sounds, np.load(options.reference)) if options.reference else None
    assert change is None or change < SAME_SOUND, f"the sound differs from the reference by {change:.1e}"
    print(json.dumps({"compared": compared, "difference": change}))


if __name__ == "__main__":
    main()
