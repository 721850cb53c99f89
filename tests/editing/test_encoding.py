"""Sound in: encoding sounds into latents, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, LogMel, LogMelConfig, resample
from tests.helpers import HAMMER, load_pipeline, noise, sound
from tests.reference import Both, assert_close


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def tone(hertz: float, seconds: float, rate: int) -> Tensor:
    time = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return 0.4 * torch.sin(2 * math.pi * hertz * time).float()


def loudest(waveform: Tensor, rate: int) -> float:
    """The frequency that has the most energy, in Hz."""
    power = np.abs(np.fft.rfft(waveform.double().numpy() * np.hanning(len(waveform)))) ** 2
    return float(power.argmax() * rate / len(waveform))


def test_latents_are_those_of_the_encoder(base: Both) -> None:
    pipe = base.ours
    wave = noise(2, 64 * 160) * 0.1
    mel = LogMel(LogMelConfig(n_mels=16))(wave, 16000)
    expected = base.theirs.vae.encode(mel).latent_dist.mode() * base.theirs.vae.config.scaling_factor
    latents = pipe.encode_audio(wave, 16000)
    assert latents.shape == (2, 4, 16, 4)
    assert_close(latents, expected.detach())
    assert torch.equal(latents, pipe.encode_audio(wave.numpy(), 16000))
    assert_close(pipe.encode_audio(wave[0], 16000), latents[:1], 1e-5)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_sound_comes_back_as_long_as_it_was_and_with_its_pitch(tiny: AudioLDM2Pipeline, rate: int) -> None:
    """A spectrogram with another hop than the checkpoint's would be three times as long."""
    wave = tone(440.0, 2.048, rate)
    latents = tiny.encode_audio(wave, rate)
    assert latents.shape[2] == 2.048 * 16000 / 512 / 4
    (again,) = tiny.decode_latents(latents)
    assert len(again) == 2.048 * 16000
    assert loudest(again, 16000) == pytest.approx(440, abs=16000 / 1024)
    assert 0.1 < float(again.std()) / float(wave.std()) < 3


@pytest.mark.parametrize("samples", [1, 100, 641, 1500])
def test_the_end_is_padded_to_whole_latents(base: Both, samples: int) -> None:
    latents = base.ours.encode_audio(noise(samples), 16000)
    assert latents.shape == (1, 4, -(-max(samples, 1024) // 640), 4)


def test_latents_of_a_generation_decode_to_its_sound(pipe: AudioLDM2Pipeline) -> None:
    latents = torch.as_tensor(sound(pipe, HAMMER, output_type="latent"))
    audio = sound(pipe, HAMMER)
    np.testing.assert_allclose(pipe.decode_latents(latents)[:, : audio.shape[1]], audio, atol=1e-5)


BAD: dict[str, tuple[Any, Any, str]] = {
    "path": ("dog.wav", 16000, "got a path; read the file with read_sound"),
    "channels last": (noise(900, 2), 16000, r"audio has shape \(900, 2\).*pass audio\.mean\(1\)"),
    "integers": (np.zeros(9, np.int16), 16000, "audio must be float32 .* got int16"),
    "three axes": (noise(1, 1, 9), 16000, r"audio has shape \(1, 1, 9\)"),
    "empty": (noise(0), 16000, "audio has no samples"),
    "nan": (noise(900) / 0, 16000, "samples in audio are NaN or infinite"),
    "rate": (noise(900), 0, "orig_sr|sampling_rate"),
    "rate as text": (noise(900), "16 kHz", "orig_sr|sampling_rate"),
}


@pytest.mark.parametrize(("audio", "rate", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_encoded_is_named(base: Both, audio: Any, rate: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        base.ours.encode_audio(audio, rate)


def test_latents_that_cannot_be_decoded_are_named(base: Both) -> None:
    for bad in (noise(1, 4, 8, 4) / 0, noise(4, 8, 4), noise(1, 4, 8, 4).long()):
        with pytest.raises(ValueError, match="latents"):
            base.ours.decode_latents(bad)


@pytest.mark.parametrize("rate", [8000, 48000])
def test_sounds_are_resampled_to_the_checkpoints_rate(base: Both, rate: int) -> None:
    wave = noise(1, rate) * 0.1
    expected = base.ours.encode_audio(resample(wave, rate, 16000), 16000)
    assert torch.equal(base.ours.encode_audio(wave, rate), expected)


def test_a_long_sound_is_encoded_in_pieces(tiny: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = tiny.vae.encode
    monkeypatch.setattr(tiny.vae, "encode", lambda mel: seen.append(mel.shape[2]) or encode(mel))
    wave = noise(1, 512 * 100) * 0.1
    whole = tiny.encode_audio(wave, 16000)
    monkeypatch.setattr("audioldm2.editing.sound.FRAMES_AT_ONCE", 48)
    monkeypatch.setattr("audioldm2.editing.sound.PIECE_CONTEXT", 24)
    pieces = tiny.encode_audio(wave, 16000)
    assert seen == [100, 72, 76, 28]
    assert pieces.shape == whole.shape
    # Not equal: each piece has statistics of its own in the norms.
    assert 0 < float((pieces - whole).pow(2).mean().sqrt()) < 0.1 * float(whole.pow(2).mean().sqrt())
