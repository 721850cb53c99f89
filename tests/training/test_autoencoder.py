"""The VAE's losses and its discriminator."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models.vae import VAE, DiagonalGaussian, VAEConfig
from audioldm2.training.adversarial import frozen
from audioldm2.training.autoencoder import (
    PatchDiscriminator,
    adaptive_weight,
    autoencoder_loss,
    discriminator_loss,
    kl_per_latent,
    spectrogram_errors,
)
from tests.helpers import noise, seeded
from tests.training.helpers import descend, gradients

SIZES = VAEConfig(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
)


@pytest.fixture
def networks() -> nn.ModuleDict:
    """A VAE and a discriminator with random weights."""
    torch.manual_seed(0)
    return nn.ModuleDict({"vae": VAE(SIZES), "discriminator": PatchDiscriminator(width=4)})


def stripes(count: int, seed: int = 0) -> Tensor:
    """Spectrograms of steady sounds, (count, 1, 32, 32): a few loud bands over silence."""
    loud = torch.rand(count, 1, 1, 32, generator=seeded(seed)) < 0.3
    return torch.where(loud, 1.0, -1.0).expand(-1, -1, 32, -1)


def test_the_divergence_equals_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    parameters = noise(3, 8, 5, 6)
    expected = DiagonalGaussianDistribution(parameters).kl().mean() / (4 * 5 * 6)
    torch.testing.assert_close(kl_per_latent(DiagonalGaussian(parameters)), expected)


def test_errors_count_inaudible_cells_as_little_as_asked() -> None:
    mel = torch.tensor([-11.0, -7.0, -5.0, 1.0])
    decoded = torch.tensor([-9.0, -4.0, -5.5, 1.0])
    errors = spectrogram_errors(decoded, mel, -6.0, 0.25)
    values = [errors[key].item() for key in ("error", "audible", "loss")]
    assert values == pytest.approx([5.5 / 4, 2.5 / 4, (5.5 + 3 * 2.5) / 16])
    assert spectrogram_errors(decoded, mel)["loss"].item() == pytest.approx(5.5 / 4)


def test_the_discriminator_has_the_papers_size_and_sees_patches() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_763_585  # of the paper's code
    mel = noise(1, 1, 160, 160).requires_grad_()
    discriminator = PatchDiscriminator(width=4).eval()
    logits = discriminator(mel)
    assert logits.shape == (1, 1, 18, 18)
    logits[0, 0, 9, 9].backward()
    seen = mel.grad[0, 0].ne(0)
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == 70


def test_the_hinge_loss_stops_at_a_margin_of_1() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx((0.25 + 0.75) / 2)


def test_the_adversarial_gradient_is_made_as_long_as_the_errors() -> None:
    weight = noise(6).requires_grad_()
    error, adversarial = (weight * noise(6, seed=1)).sum(), 30 * (weight * noise(6, seed=2)).sum()
    ratio = adaptive_weight(error, adversarial, weight)
    assert not ratio.requires_grad
    torch.testing.assert_close(ratio, noise(6, seed=1).norm() / (30 * noise(6, seed=2).norm() + 1e-4))
    assert adaptive_weight(error, 0 * adversarial, weight) == pytest.approx(1e4)


def test_each_network_gets_the_gradient_of_its_own_loss(networks: nn.ModuleDict) -> None:
    vae, discriminator = networks["vae"], networks["discriminator"]
    mel = stripes(4)
    losses = autoencoder_loss(
        vae, mel, seeded(), discriminator, kl_weight=0.3, adversarial_weight=0.7, audible_level=-0.5
    )
    losses["loss"].backward()
    of_vae, of_discriminator = gradients(vae), gradients(discriminator)

    networks.zero_grad()
    latents = vae.encode(mel)
    decoded = vae.decode(latents.sample(seeded()))
    error, adversarial = F.l1_loss(decoded, mel), -discriminator(decoded).mean()
    last = vae.decoder.conv_out.weight
    lengths = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, adversarial)]
    expected = error + 0.3 * latents.kl().mean() / latents.mean[0].numel()
    expected = expected + 0.7 * lengths[0] / (lengths[1] + 1e-4) * adversarial
    torch.testing.assert_close(losses["loss"] - losses["discriminator"], expected)
    expected.backward()
    torch.testing.assert_close(of_vae, gradients(vae))
    networks.zero_grad()
    hinge = F.relu(1 - discriminator(mel)).mean() / 2 + F.relu(1 + discriminator(decoded.detach())).mean() / 2
    hinge.backward()
    torch.testing.assert_close(losses["discriminator"], hinge)
    torch.testing.assert_close(of_discriminator, gradients(discriminator))


def test_a_frozen_module_is_as_before_afterwards_even_after_an_error() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with contextlib.suppress(KeyError), frozen(module):
        assert not module.weight.requires_grad
        raise KeyError
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)


def test_a_discriminator_learns_to_separate_and_a_step_of_the_vae_fools_it_more(
    networks: nn.ModuleDict,
) -> None:
    vae, discriminator = networks["vae"], networks["discriminator"]
    mel = stripes(8)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(mel).mode())
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for _ in range(20):
        optimizer.zero_grad()
        discriminator_loss(discriminator(mel), discriminator(decoded)).backward()
        optimizer.step()
    assert discriminator(mel).mean() > discriminator(decoded).mean() + 0.5

    def fooled() -> Tensor:
        return discriminator(vae.decode(vae.encode(mel).sample(seeded()))).mean()

    # With hardly any other loss, a small step along the gradient can only be about the discriminator.
    losses = autoencoder_loss(vae, mel, seeded(), discriminator, kl_weight=0.0, adversarial_weight=1e4)
    losses["loss"].backward()
    before = fooled()
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-4 / sum(g.norm() for g in gradients(vae)).item())
    optimizer.step()
    assert fooled() > before


def test_a_short_run_lowers_the_error_and_trains_the_discriminator(networks: nn.ModuleDict) -> None:
    weights = [p.detach().clone() for p in networks["discriminator"].parameters()]

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        mel = stripes(8, seed=int(torch.randint(10**6, (), generator=generator)))
        return autoencoder_loss(networks["vae"], mel, generator, networks["discriminator"], kl_weight=1e-3)

    curves = descend(networks, loss, steps=16, rate=5e-3)
    error = curves["error"]
    assert sum(error[-3:]) < 0.8 * sum(error[:3])
    moved = zip(weights, networks["discriminator"].parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in moved)
