"""The vocoder's trainer: two steps, what they leave, and a run that was cut in two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE, VAEConfig
from scripts.tiny import train_vocoder as trainer
from scripts.tiny.data import Library, make_library
from scripts.tiny.sizes import SIZES
from scripts.tiny.training import Run


@pytest.fixture(scope="module")
def library() -> Library:
    return make_library(4, seed=1)


@pytest.fixture(autouse=True)
def _few_unseen_sounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer, "UNSEEN", 2)


@pytest.fixture(scope="module")
def trained(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, with a VAE of random weights."""
    run = Run(tmp_path_factory.mktemp("run"), steps=2)
    torch.manual_seed(0)
    VAE(VAEConfig.from_dict(SIZES["vae"])).save_pretrained(run.checkpoint / "vae")
    trainer.train_vocoder(library, run)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return HifiGan.from_pretrained(run.checkpoint, "vocoder").state_dict()


def test_the_weights_move(library: Library, trained: Run):
    torch.manual_seed(trained.seed)
    first = HifiGan(HifiGanConfig.from_dict(SIZES["vocoder"]))
    trainer.initialise(first, library.mels([0, 1, 2, 3]))
    for name, now in weights(trained).items():
        before = first.state_dict()[name]
        assert torch.isfinite(now).all()
        assert torch.allclose(now, before) == (name in ("mean", "scale")), name


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    library: Library, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(tmp_path, steps=2)
    shutil.copytree(trained.checkpoint / "vae", run.checkpoint / "vae")
    judged = trainer.distance
    calls = []

    def killed(*waveforms: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:  # in the second step; the first was saved
            raise KeyboardInterrupt
        return judged(*waveforms)

    monkeypatch.setattr("scripts.tiny.training.SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer, "distance", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_vocoder(library, run)
    trainer.train_vocoder(library, run)
    assert len(calls) == 3
    for name, weight in weights(trained).items():
        assert torch.equal(weight, weights(run)[name]), name


def test_noise_is_told_from_a_buzz():
    """Pulses at the rate of the frames have noise's mean spectrum, nearly, and another texture."""
    generator = torch.Generator().manual_seed(0)
    noise, other = 0.1 * torch.randn(2, 1, 16000, generator=generator)
    buzz = torch.zeros(1, 16000)
    buzz[:, ::160] = 0.1 * 160**0.5
    assert trainer.distance(other, noise)["texture"] < 0.3 * trainer.distance(buzz, noise)["texture"]


def test_loud_and_soft_weigh_alike():
    generator = torch.Generator().manual_seed(0)
    real, made = 0.1 * torch.randn(2, 1, 16000, generator=generator)
    loud, soft = trainer.distance(made, real), trainer.distance(0.05 * made, 0.05 * real)
    assert soft["loss"].item() == pytest.approx(loud["loss"].item(), rel=0.05)
