"""The vocoder's trainer and its initial oscillators."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.training import loop
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import KINDS, SAMPLING_RATE, Scene, Sound, loudest_level, render
from scripts.tiny.evaluate.criteria import matches
from scripts.tiny.run import Run
from scripts.tiny.sizes import HOP_LENGTH, TINY
from scripts.tiny.stages import vocoder as vocoder_module
from scripts.tiny.stages.oscillators import set_oscillator_weights
from scripts.tiny.stages.vocoder import train_vocoder, waveform_loss

pytestmark = pytest.mark.slow  # long runs of scripts that are not in the wheel


@pytest.fixture(scope="module")
def trained(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, with a VAE of random weights."""
    run = Run(tmp_path_factory.mktemp("run"), steps=2)
    torch.manual_seed(0)
    VAE(VAEConfig.from_dict(TINY["vae"])).save_pretrained(run.checkpoint / "vae")
    train_vocoder(library, run)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return HifiGan.from_pretrained(run.checkpoint, "vocoder").state_dict()


def test_two_steps_move_all_weights(trained: Run):
    first = HifiGan(HifiGanConfig.from_dict(TINY["vocoder"]))
    set_oscillator_weights(first, trained.seed)
    for name, now in weights(trained).items():
        before = first.state_dict()[name]
        assert torch.isfinite(now).all()
        assert torch.equal(now, before) == (name in ("mean", "scale")), name


# --- the oscillators


@pytest.fixture(scope="module")
def oscillators() -> HifiGan:
    vocoder = HifiGan(HifiGanConfig.from_dict(TINY["vocoder"])).eval()
    set_oscillator_weights(vocoder)
    return vocoder


@torch.no_grad()
def there_and_back(vocoder: HifiGan, waveform: np.ndarray) -> np.ndarray:
    mel = LogMel(LogMelConfig(hop_length=HOP_LENGTH))(torch.from_numpy(waveform)[None], SAMPLING_RATE)
    return vocoder(mel[:, 0])[0].numpy()


@pytest.mark.parametrize("frequency", [156.25, 437.5, 1000.0, 2500.0, 3000.0])
@pytest.mark.parametrize("loud", [0.02, 0.2])
def test_untrained_oscillators_reproduce_a_tone(oscillators: HifiGan, frequency: float, loud: float):
    """Its pitch within a mel band or a line, its level within 7 dB, and images at least 20 dB below."""
    time = np.arange(SAMPLING_RATE * 2) / SAMPLING_RATE
    tone = (loud * np.sin(2 * np.pi * frequency * time)).astype(np.float32)
    sound = there_and_back(oscillators, tone)
    assert abs(loudest_level(sound) - loudest_level(tone)) < 7
    power = np.abs(np.fft.rfft(sound[4096:-4096] * np.hanning(len(sound) - 8192))) ** 2
    hertz = np.fft.rfftfreq(len(sound) - 8192, 1 / SAMPLING_RATE)
    assert abs(hertz[power.argmax()] - frequency) < max(32, 0.04 * frequency)
    near = np.abs(hertz - frequency) < max(150, 0.15 * frequency)
    assert power[~near].max() < 0.01 * power.max()


def test_untrained_oscillators_are_silent_for_a_silent_mel(oscillators: HifiGan):
    with torch.no_grad():
        assert oscillators(torch.full((1, 40, 64), -11.5)).abs().max() < 1e-3


def test_most_real_sounds_pass_the_oscillators(oscillators: HifiGan):
    rng = np.random.default_rng(0)
    scenes = [Scene((Sound(kind, (*traits, "")[0]),)) for kind, traits in KINDS.items()]
    right = [all(matches(s, there_and_back(oscillators, render(s, rng))).values()) for s in scenes]
    assert np.mean(right) >= 0.8


def test_oscillators_refuse_other_sizes():
    for change in ({"leaky_relu_slope": 0.1}, {"upsample_initial_channel": 128}):
        vocoder = HifiGan(HifiGanConfig.from_dict({**TINY["vocoder"], **change}))
        with pytest.raises(ValueError, match="leaky_relu_slope 0 and upsample_initial_channel 192, not 3, "):
            set_oscillator_weights(vocoder)


# --- training


def test_a_resumed_run_ends_with_the_same_weights(
    library: Library, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(tmp_path, steps=2)
    shutil.copytree(trained.checkpoint / "vae", run.checkpoint / "vae")
    calls: list[int] = []

    def killed(*waveforms: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:  # in the second step; the state of the first is saved
            raise KeyboardInterrupt
        return waveform_loss(*waveforms)

    monkeypatch.setattr(loop, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(vocoder_module, "waveform_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_vocoder(library, run)
    train_vocoder(library, run)
    assert len(calls) == 3
    for name, weight in weights(trained).items():
        assert torch.equal(weight, weights(run)[name]), name
