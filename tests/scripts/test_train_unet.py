"""The UNet's trainer: what it draws, what it learns from, and a run that is killed and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, UNet
from audioldm2.models.unet import UNetConfig
from audioldm2.training import loop
from audioldm2.training.conditions import encode_texts
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import Scene, Sound
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY
from scripts.tiny.stages import unet as unet_module
from scripts.tiny.stages.unet import (
    CONTINUED_LEARNING_RATE,
    OVERSAMPLED_KINDS,
    PURE_NOISE_EVERY,
    TWO_SOUND_SHARE,
    multiscale_loss,
    sampling_weights,
    scene_means,
    train_unet,
)
from tests.scripts.helpers import all_moved, run_without

pytestmark = pytest.mark.slow  # long runs of scripts that are not in the wheel


def test_the_unet_learns(parts: Path, library: Library, tmp_path: Path) -> None:
    run = replace(run_without(parts, tmp_path, "unet"), batch=PURE_NOISE_EVERY)
    train_unet(library, run)
    torch.manual_seed(run.seed)
    assert all_moved(
        UNet(UNetConfig.from_dict(TINY["unet"])), UNet.from_pretrained(run.checkpoint, subfolder="unet")
    )


def library_of(*scenes: Scene) -> Library:
    return Library([*scenes], [], np.empty(0), np.empty(0))


def test_the_target_of_pure_noise_is_the_mean_of_a_scene() -> None:
    bell, loud = Scene((Sound("bell"),)), Scene((Sound("bell"),), "loud")
    latents = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    means, rows = scene_means(library_of(bell, loud, bell, bell), latents)
    assert rows.tolist() == [1, 2, 1, 1]
    expected = torch.stack([latents.mean(0), latents[[0, 2, 3]].mean(0), latents[1]])
    torch.testing.assert_close(means, expected)


def test_an_error_shared_by_many_cells_counts_more() -> None:
    target = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    sign = 1 - 2 * (torch.arange(16) % 2)
    for error, weight in ((torch.ones(16, 16), 1 + 1 + 4 + 16), (sign[:, None] * sign, 1)):
        losses = multiscale_loss(target + 0.1 * error, target, torch.ones(8, 1, 1))
        assert losses["mse"].item() == pytest.approx(0.01, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(0.01 * weight, rel=1e-4)


def test_an_error_counts_by_the_weight_of_its_channel() -> None:
    target = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0.1, 1.9, 8).view(-1, 1, 1)
    for channel in range(8):
        error = torch.zeros(8, 1, 1)
        error[channel] = 0.1
        losses = multiscale_loss(target + error, target, weights)
        assert losses["mse"].item() == pytest.approx(0.01 * weights[channel].item() / 8, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(22 * losses["mse"].item(), rel=1e-4)


def test_every_kind_with_every_trait_is_drawn_equally_often() -> None:
    rising, falling = Scene((Sound("sweep", "rising"),)), Scene((Sound("sweep", "falling"),), "soft")
    bell, both = Scene((Sound("bell"),)), Scene((Sound("bell"), Sound("rain")))
    other = Scene((Sound("bell"), Sound("wind")))
    weights = sampling_weights(library_of(bell, rising, bell, both, falling, bell, bell, both, other))
    assert weights[[0, 2, 5, 6]].sum().item() == pytest.approx(weights[1].item())
    assert weights[1] == weights[4]
    assert weights[[3, 7]].sum() == weights[8]
    assert weights[[3, 7, 8]].sum() == pytest.approx(TWO_SOUND_SHARE)
    assert weights.sum() == pytest.approx(1)


def test_oversampled_kinds_are_drawn_more_but_not_in_pairs() -> None:
    engine, behind = Scene((Sound("engine"),)), Scene((Sound("bell"), Sound("engine")))
    weights = sampling_weights(library_of(engine, Scene((Sound("bell"),)), engine, behind))
    assert weights[[0, 2]].sum().item() == pytest.approx(OVERSAMPLED_KINDS["engine"] * weights[1].item())
    assert weights[3].item() == pytest.approx(TWO_SOUND_SHARE)
    assert OVERSAMPLED_KINDS["engine"] > 1


def test_the_unet_starts_from_given_weights(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run_without(parts, tmp_path, "unet"), begin=parts)
    started: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        unet_module,
        "train",
        lambda name, unet, *_, **options: started.update(unet.state_dict(), **options),
    )
    train_unet(library, run)
    given = UNet.from_pretrained(parts, subfolder="unet").state_dict()
    assert all(torch.equal(started[name], value) for name, value in given.items())
    assert started["rate"] == CONTINUED_LEARNING_RATE


@pytest.mark.filterwarnings("ignore:CLAP cannot rank sounds")  # the small CLAP hears 256 frames
def test_conditions_are_those_of_the_pipeline(parts: Path) -> None:
    """Of each text and of its empty prompt, whatever it was encoded together with."""
    pipe = AudioLDM2Pipeline.from_pretrained(parts)
    pipe.set_progress_bar_config(disable=True)
    texts = ["a bell", "a loud falling sweep over rain, and there is wind", "white noise"]
    encoded = encode_texts(pipe, texts)
    for i, text in enumerate(texts):
        both = pipe.encode_prompt(text, "cpu", 1, True)
        for row, side in ((encoded.uncond[i], 0), (torch.tensor(i), 1)):
            vectors, states, mask = encoded.select(row[None], "cpu")
            length = both[1].shape[1]
            assert torch.equal(mask[0, :length], both[1][side].long())
            assert not mask[0, length:].any()
            torch.testing.assert_close(vectors[0], both[2][side], rtol=0, atol=1e-4)
            real = mask[0, :length].bool()
            torch.testing.assert_close(states[0, :length][real], both[0][side][real], rtol=1e-2, atol=1e-2)


def test_a_resumed_run_ends_with_the_same_weights(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_without(parts, tmp_path / name, "unet") for name in ("whole", "cut")]
    train_unet(library, runs[0])
    monkeypatch.setattr(loop, "SAVE_INTERVAL", 0.0)
    generator = Run.generator

    def killed(run: Run, step: int) -> torch.Generator:
        if step == 1:
            raise KeyboardInterrupt
        return generator(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "generator", killed)
        with pytest.raises(KeyboardInterrupt):
            train_unet(library, runs[1])
    assert torch.load(runs[1].folder / "unet.pt", weights_only=True)["done"] == 1
    train_unet(library, runs[1])
    whole, cut = (UNet.from_pretrained(run.checkpoint, subfolder="unet").state_dict() for run in runs)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
