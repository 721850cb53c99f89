"""HiFi-GAN's discriminators and losses, and the distance of spectra."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.training.vocoder import (
    PeriodDiscriminator,
    ScaleDiscriminator,
    VocoderDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    vocoder_loss,
)
from tests.helpers import noise, seeded
from tests.training.helpers import descend, gradients

SIZES = HifiGanConfig(
    model_in_dim=16,
    upsample_initial_channel=16,
    upsample_rates=(8, 8),
    upsample_kernel_sizes=(16, 16),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    normalize_before=False,
)
LOG_MEL = LogMel(LogMelConfig(n_fft=256, hop_length=64, n_mels=16))


@pytest.fixture
def networks() -> nn.ModuleDict:
    """A vocoder and its discriminators with random weights."""
    torch.manual_seed(0)
    discriminator = VocoderDiscriminator((2, 3), scales=2, period_width=2, scale_width=4)
    return nn.ModuleDict({"vocoder": HifiGan(SIZES), "discriminator": discriminator})


def tones(count: int, seed: int = 0) -> Tensor:
    """Steady tones, (count, 1024), at 16 kHz."""
    frequencies = 200 + 1800 * torch.rand(count, 1, generator=seeded(seed))
    return 0.3 * torch.sin(2 * torch.pi * frequencies * torch.arange(1024) / 16000)


def vocode(vocoder: nn.Module, real: Tensor) -> Tensor:
    return vocoder(LOG_MEL(real, 16000)[:, 0])


def test_the_discriminators_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        periods, scale = VocoderDiscriminator(scales=0), ScaleDiscriminator()
    sizes = [sum(p.numel() for p in module.parameters()) for module in (periods, scale)]
    assert sizes == [41_105_770, 9_874_306]  # of the paper's code
    assert [part.period for part in periods.periods] == [2, 3, 5, 7, 11]
    assert [layer.groups for layer in scale.layers] == [1, 4, 16, 16, 16, 16, 1]


def test_a_period_discriminator_compares_samples_of_the_same_phase_only() -> None:
    discriminator = PeriodDiscriminator(5, width=2)
    waveform = noise(1, 998).requires_grad_()  # not a multiple of 5
    outputs = discriminator(waveform)[-1]
    assert outputs.shape == (1, 1, 3, 5)
    outputs[..., 1].sum().backward()
    seen = waveform.grad[0].ne(0)
    assert seen[1:980:5].any()
    phases = torch.arange(998) % 5
    assert not seen[(phases != 1) & (torch.arange(998) < 990)].any()  # the last are reflected


def test_a_scale_discriminator_sees_half_of_the_rate_of_the_one_before(networks: nn.ModuleDict) -> None:
    discriminator = networks["discriminator"]
    features = discriminator(noise(2, 1024))
    assert [len(layers) for layers in features] == [6, 6, 8, 8]
    assert [layers[-1].shape[-1] for layers in features[2:]] == [16, 9]
    half = F.avg_pool1d(noise(2, 1024), 4, 2, 2)
    torch.testing.assert_close(discriminator.scales[1](half), features[3])


def test_only_the_first_scale_is_normalized_by_its_singular_value(networks: nn.ModuleDict) -> None:
    for i, scale in enumerate(networks["discriminator"].scales):
        layer = scale.layers[6]
        with torch.no_grad():
            for parameter in layer.parametrizations.weight.parameters():
                parameter.mul_(3)  # what is divided by the singular value does not change
            for _ in range(50):
                weight = layer.weight
        largest = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
        assert (largest == pytest.approx(1, abs=1e-2)) == (i == 0)


def test_the_losses_are_the_papers_equations() -> None:
    real, made = ([[noise(2, 3, 4, seed=i), noise(2, 1, 5, seed=i + 1)] for i in s] for s in ((0, 2), (4, 6)))
    judged, adversarial, matching = 0.0, 0.0, 0.0
    for r, m in zip(real, made, strict=True):
        judged += F.mse_loss(r[1], torch.ones(2, 1, 5)) + F.mse_loss(m[1], torch.zeros(2, 1, 5))
        adversarial += F.mse_loss(m[1], torch.ones(2, 1, 5))
        matching += (r[0] - m[0]).abs().sum() / 24 + (r[1] - m[1]).abs().sum() / 10
    torch.testing.assert_close(discriminator_loss(real, made), judged)
    torch.testing.assert_close(adversarial_loss(made), adversarial)
    torch.testing.assert_close(feature_matching_loss(real, made), matching)


def test_each_network_gets_the_gradient_of_its_own_loss(networks: nn.ModuleDict) -> None:
    vocoder, discriminator = networks["vocoder"], networks["discriminator"].eval()
    real = tones(2)
    losses = vocoder_loss(vocode(vocoder, real), real, discriminator, LOG_MEL)
    losses["loss"].backward()
    of_vocoder, of_discriminator = gradients(vocoder), gradients(discriminator)

    networks.zero_grad()
    made = vocode(vocoder, real)
    of_made, of_real = discriminator(made), discriminator(real)
    mel = F.l1_loss(LOG_MEL(made, 16000), LOG_MEL(real, 16000))
    expected = adversarial_loss(of_made) + 2 * feature_matching_loss(of_real, of_made) + 45 * mel
    torch.testing.assert_close(losses["loss"] - losses["discriminator"], expected)
    expected.backward()
    torch.testing.assert_close(of_vocoder, gradients(vocoder))
    networks.zero_grad()
    discriminator_loss(discriminator(real), discriminator(made.detach())).backward()
    torch.testing.assert_close(of_discriminator, gradients(discriminator))
    with pytest.raises(ValueError, match=r"made has shape \(2, 1000\) and real \(2, 1024\)"):
        vocoder_loss(made[:, :1000], real, discriminator, LOG_MEL)


def test_the_discriminators_learn_to_separate_and_a_step_of_the_vocoder_fools_them_more(
    networks: nn.ModuleDict,
) -> None:
    vocoder, discriminator = networks["vocoder"], networks["discriminator"]
    real = tones(4)
    with torch.no_grad():
        made = vocode(vocoder, real)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3, betas=(0.8, 0.99))
    for _ in range(10):
        optimizer.zero_grad()
        discriminator_loss(discriminator(real), discriminator(made)).backward()
        optimizer.step()
    discriminator.eval()
    for of_real, of_made in zip(discriminator(real), discriminator(made), strict=True):
        assert of_real[-1].mean() > of_made[-1].mean()

    def fooled() -> float:
        return adversarial_loss(discriminator(vocode(vocoder, real))).item()

    before = fooled()
    losses = vocoder_loss(
        vocode(vocoder, real), real, discriminator, LOG_MEL, feature_weight=0.0, mel_weight=0.0
    )
    losses["loss"].backward()
    length = sum(gradient.square().sum() for gradient in gradients(vocoder)).sqrt().item()
    torch.optim.SGD(vocoder.parameters(), lr=1e-2 / length).step()
    assert fooled() < before


def test_a_short_run_lowers_the_mel_distance(networks: nn.ModuleDict) -> None:
    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        real = tones(4, seed=int(torch.randint(10**6, (), generator=generator)))
        return vocoder_loss(vocode(networks["vocoder"], real), real, networks["discriminator"], LOG_MEL)

    curves = descend(networks, loss, steps=12, rate=2e-2)
    assert sum(curves["mel"][-3:]) < 0.8 * sum(curves["mel"][:3])
    assert sum(curves["discriminator"][-3:]) < sum(curves["discriminator"][:3])
