"""The distance of waveforms by their spectra."""

from __future__ import annotations

import pytest
import torch

from audioldm2.training.spectra import balanced_difference, waveform_loss
from tests.helpers import noise

TONES = 0.3 * torch.sin(torch.tensor([[0.2], [0.5]]) * torch.arange(6000))
REAL = TONES + 0.02 * noise(2, 6000)


def test_the_distance_is_0_for_the_same_and_grows_with_what_is_missing() -> None:
    softer, silent = 0.5 * REAL, 1e-4 * noise(2, 6000, seed=1)
    same, half, none = (waveform_loss(made, REAL) for made in (REAL, softer, silent))
    assert all(value.item() == 0 for value in same.values())
    for key in ("loss", "magnitude", "logarithm", "mel"):
        assert 0 < half[key] < none[key], key
    parts = [none[key].item() for key in ("magnitude", "logarithm", "texture", "mel")]
    assert none["loss"].item() == pytest.approx(0.5 * parts[0] + 0.1 * parts[1] + 0.4 * parts[2] + parts[3])
    rolled = waveform_loss(REAL.roll(1, dims=1), REAL)  # phases do not count
    assert rolled["loss"] < 0.2 * half["loss"]


def test_a_missing_sound_has_a_gradient_however_soft_it_is() -> None:
    made = (1e-4 * noise(2, 6000, seed=1)).requires_grad_()
    waveform_loss(made, REAL)["logarithm"].backward()
    assert made.grad.norm() > 0


def test_noise_is_distinguished_from_a_buzz() -> None:
    """Pulses at the frame rate have nearly the mean spectrum of noise, but another texture."""
    real, other = 0.1 * noise(2, 1, 16000)
    buzz = torch.zeros(1, 16000)
    buzz[:, ::160] = 0.1 * 160**0.5
    assert waveform_loss(other, real)["texture"] < 0.3 * waveform_loss(buzz, real)["texture"]


def test_loud_and_soft_sounds_weigh_alike() -> None:
    real, made = 0.1 * noise(2, 1, 16000)
    loud, soft = waveform_loss(made, real), waveform_loss(0.05 * made, 0.05 * real)
    assert soft["loss"].item() == pytest.approx(loud["loss"].item(), rel=0.05)


def test_audible_and_inaudible_cells_are_averaged_apart() -> None:
    real, audible = torch.zeros(1, 20, 50), torch.zeros(1, 20, 50, dtype=torch.bool)
    audible[0, 0, :10] = True
    made = torch.where(audible, 3.0, 1.0)
    # 10 audible cells and 990 others, both with 1 % of all cells, 10, added to their number
    expected = 30 / 20 + 990 / 1000
    assert balanced_difference(made, real, audible).item() == pytest.approx(expected)
