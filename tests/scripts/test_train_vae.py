"""The trainers of the VAE and of its decoder, and the latents that later stages learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from audioldm2 import VAE
from audioldm2.models.vae import VAEConfig
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY
from scripts.tiny.stages import decoder as decoder_module, vae as vae_module
from scripts.tiny.stages.decoder import segment_levels, train_decoder
from scripts.tiny.stages.latents import channel_weights, library_latents
from scripts.tiny.stages.vae import AUDIBLE_LOG_MEL, INAUDIBLE_WEIGHT, standardize, train_vae
from tests.scripts.helpers import all_moved, run_without

pytestmark = pytest.mark.slow  # long runs of scripts that are not in the wheel


def test_the_vae_learns_and_its_latents_have_variance_1(
    parts: Path, library: Library, tmp_path: Path
) -> None:
    run = run_without(parts, tmp_path, "vae")
    train_vae(library, run)
    vae = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    torch.manual_seed(run.seed)
    assert all_moved(VAE(VAEConfig.from_dict(TINY["vae"])), vae)
    latents = library_latents(library, run)
    assert latents.shape == (8, 8, 40, 16)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "plots" / "vae_2.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_decoder_is_trained_further(parts: Path, library: Library, tmp_path: Path) -> None:
    run = run_without(parts, tmp_path)
    before = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    train_decoder(library, run)
    after = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    for name, old in before.named_children():
        new = after.get_submodule(name)
        if name in ("decoder", "from_latents"):
            assert all_moved(old, new)
        else:
            assert all(map(torch.equal, old.parameters(), new.parameters())), name
    assert (tmp_path / "plots" / "decoder.png").is_file()
    curves = torch.load(tmp_path / "decoder.pt", weights_only=True)["curves"]
    loss, error, audible, level = (torch.tensor(curves[k]) for k in ("loss", "error", "audible", "level"))
    assert level.min() > 0
    torch.testing.assert_close(loss, INAUDIBLE_WEIGHT * error + (1 - INAUDIBLE_WEIGHT) * audible + level)


def test_a_level_is_that_of_all_bands_in_a_quarter_of_a_second() -> None:
    mel = torch.full((1, 1, 24, 64), -11.5)
    mel[:, :, 8:16, 7] = torch.tensor([1.0, 3.0]).log().repeat(4)  # amplitudes
    mel[:, :, 16:, 3:6] = math.log(2)
    expected = torch.tensor([AUDIBLE_LOG_MEL, math.log(5) / 2, math.log(12) / 2])  # mean squares 5 and 12
    torch.testing.assert_close(segment_levels(mel), expected.view(1, 1, 3, 1), atol=1e-4, rtol=0)


def test_the_decoder_learns_from_noisy_latents(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[Tensor] = []

    def watched(vae: VAE, latents: Tensor) -> Tensor:
        fed.append(latents)
        return decode(vae, latents)

    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", watched)
    monkeypatch.setattr(vae_module, "SEGMENT_LENGTHS", (88,))  # 22 rows of latents, not a multiple of 4
    for i, noise in enumerate([(0.0, 0.0), (0.2, 0.0), (0.0, 0.2)]):
        monkeypatch.setattr(decoder_module, "LATENT_NOISE", noise)
        train_decoder(library, replace(run_without(parts, tmp_path / str(i)), steps=1, batch=64))
    for i, per_block in ((1, 1 / 4), (2, 1)):
        away = fed[i] - fed[0]
        assert away.shape == (64, 8, 22, 16)
        spreads = away.std((1, 2, 3))
        assert 0 < spreads.min() < 0.04
        assert 0.16 < spreads.max() < 0.23
        blocks = away[:, :, :20].unflatten(2, (5, 4)).unflatten(4, (4, 4)).mean((3, 5))
        assert (blocks.std() / away.std()).item() == pytest.approx(per_block, rel=0.1)


def test_standardized_latents_are_decoded_as_before(library: Library, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(TINY["vae"])).eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1)
    mel = library.mels([0, 1])
    with torch.no_grad():
        before = vae.encode(mel)
        decoded = vae.decode(before.mode())
        standardize(vae, library, Run(tmp_path))
        after = vae.encode(mel)
        torch.testing.assert_close(vae.decode(after.mode()), decoded, rtol=0, atol=1e-4 * decoded.abs().max())
        latents = torch.cat([vae.encode(library.mels([i])).mode() for i in range(len(library))])
    scale, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(scale, torch.ones(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean, torch.zeros(8), rtol=0, atol=1e-4)
    # The standard deviation is scaled as the mean is.
    ratio = (after.log_variance - before.log_variance) / 2
    shift = (after.mode() - after.mode().mean((2, 3), keepdim=True)).abs().log() - (
        before.mode() - before.mode().mean((2, 3), keepdim=True)
    ).abs().log()
    torch.testing.assert_close(ratio.mean((0, 2, 3)), shift.mean((0, 2, 3)), rtol=0, atol=1e-2)


def test_channels_are_weighted_by_how_narrow_their_posterior_is(library: Library, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(TINY["vae"])).eval()
    variances = torch.tensor([0.0, 0.05, 0.15, 0.2, 0.45, 0.95, 1.95, 4.95]).clamp(min=1e-9)
    with torch.no_grad():
        vae.to_moments.weight[8:].zero_()
        vae.to_moments.bias[8:] = variances.log()
    weights = channel_weights(vae, library, Run(tmp_path))
    assert weights.shape == (8, 1, 1)
    assert weights.mean().item() == pytest.approx(1)
    expected = torch.tensor([100.0, 50, 25, 20, 10, 5, 2.5, 1])
    torch.testing.assert_close(weights.flatten() / weights[-1].item(), expected)


def test_latents_are_cached_until_the_vae_or_the_library_changes(
    parts: Path, library: Library, tmp_path: Path
) -> None:
    run = run_without(parts, tmp_path)
    first = library_latents(library, run)
    written = tmp_path.joinpath("latents.safetensors").stat().st_mtime_ns
    assert torch.equal(library_latents(library, run), first)
    assert tmp_path.joinpath("latents.safetensors").stat().st_mtime_ns == written
    assert not torch.equal(library_latents(make_library(8, seed=2), run), first)
    library_latents(library, run)
    VAE(VAEConfig.from_dict(TINY["vae"])).save_pretrained(run.checkpoint / "vae")
    assert not torch.allclose(library_latents(library, run), first)
