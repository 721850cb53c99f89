"""The trainers of VAE and UNet: two steps, what they leave, a run cut in two; and the command for all."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audioldm2 import VAE, AudioLDM2Pipeline, UNet
from audioldm2.checkpoints.formats import PARTS, TOKENIZERS
from audioldm2.models.unet import UNetConfig
from audioldm2.models.vae import VAEConfig
from scripts.random_checkpoint import write_random_checkpoint
from scripts.tiny import loop as training
from scripts.tiny.assemble import assemble, pipeline, take_parts
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import Scene, Sound
from scripts.tiny.loop import Run, schedule, train
from scripts.tiny.sizes import SIZES, TOKENS
from scripts.tiny.stages import unet as train_unet_module, vae as train_vae_module
from scripts.tiny.stages.unet import (
    BLIND,
    GOING_ON,
    HARD,
    PAIRS,
    encode_texts,
    multiscale,
    scene_means,
    shares,
    train_unet,
)
from scripts.tiny.stages.vae import (
    SILENCE,
    UNHEARD,
    importance,
    levels,
    library_latents,
    standardise,
    train_decoder,
    train_vae,
)
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def library() -> Library:
    return make_library(4, seed=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the trained one's sizes, with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    write_random_checkpoint(folder, SIZES, limits=TOKENS)
    return folder


def start(parts: Path, folder: Path, *without: str) -> Run:
    """A run in which every part is trained, but for some."""
    run = Run(folder, steps=2, batch=2)
    shutil.copytree(parts, run.checkpoint, ignore=shutil.ignore_patterns(*without))
    return run


def moved(before: nn.Module, after: nn.Module) -> bool:
    """Whether each parameter did, and is a number."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return all(torch.isfinite(b).all() and not torch.equal(a, b) for a, b in pairs)


def test_the_vae_learns_and_its_latents_have_variance_1(
    parts: Path, library: Library, tmp_path: Path
) -> None:
    run = start(parts, tmp_path, "vae")
    train_vae(library, run)
    vae = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    torch.manual_seed(run.seed)
    assert moved(VAE(VAEConfig.from_dict(SIZES["vae"])), vae)
    latents = library_latents(library, run)
    assert latents.shape == (4, 8, 40, 16)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "plots" / "vae_2.png").read_bytes().startswith(b"\x89PNG")


def test_the_decoder_alone_is_trained_on(parts: Path, library: Library, tmp_path: Path) -> None:
    run = start(parts, tmp_path)
    before = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    train_decoder(library, run)
    after = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    for name, old in before.named_children():
        new = after.get_submodule(name)
        if name in ("decoder", "from_latents"):
            assert moved(old, new)
        else:
            assert all(map(torch.equal, old.parameters(), new.parameters())), name
    assert (tmp_path / "plots" / "decoder.png").is_file()
    curves = torch.load(tmp_path / "decoder.pt", weights_only=True)["curves"]
    loss, error, heard, level = (torch.tensor(curves[k]) for k in ("loss", "error", "heard", "level"))
    assert level.min() > 0
    torch.testing.assert_close(loss, UNHEARD * error + (1 - UNHEARD) * heard + level)


def test_a_level_is_that_of_all_bands_in_a_quarter_of_a_second() -> None:
    mel = torch.full((1, 1, 24, 64), -11.5)
    mel[:, :, 8:16, 7] = torch.tensor([1.0, 3.0]).log().repeat(4)  # amplitudes
    mel[:, :, 16:, 3:6] = math.log(2)
    expected = torch.tensor([SILENCE, math.log(5) / 2, math.log(12) / 2])  # mean squares 5 and 12
    torch.testing.assert_close(levels(mel), expected.view(1, 1, 3, 1), atol=1e-4, rtol=0)


def test_the_decoder_learns_from_latents_that_were_moved(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[Tensor] = []

    def watched(vae: VAE, latents: Tensor) -> Tensor:
        fed.append(latents)
        return decode(vae, latents)

    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", watched)
    monkeypatch.setattr(train_vae_module, "LENGTHS", (88,))  # 22 rows of latents: no multiple of 4
    for i, astray in enumerate([(0.0, 0.0), (0.2, 0.0), (0.0, 0.2)]):
        monkeypatch.setattr(train_vae_module, "ASTRAY", astray)
        train_decoder(library, replace(start(parts, tmp_path / str(i)), steps=1, batch=64))
    for i, per_block in ((1, 1 / 4), (2, 1)):
        away = fed[i] - fed[0]
        assert away.shape == (64, 8, 22, 16)
        spreads = away.std((1, 2, 3))
        assert 0 < spreads.min() < 0.04
        assert 0.16 < spreads.max() < 0.23
        blocks = away[:, :, :20].unflatten(2, (5, 4)).unflatten(4, (4, 4)).mean((3, 5))
        assert (blocks.std() / away.std()).item() == pytest.approx(per_block, rel=0.1)


def test_standardised_latents_are_decoded_as_before(library: Library, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(SIZES["vae"])).eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1)
    mel = library.mels([0, 1])
    with torch.no_grad():
        before = vae.encode(mel)
        decoded = vae.decode(before.mode())
        standardise(vae, library, Run(tmp_path))
        after = vae.encode(mel)
        torch.testing.assert_close(vae.decode(after.mode()), decoded, rtol=0, atol=1e-4 * decoded.abs().max())
        latents = torch.cat([vae.encode(library.mels([i])).mode() for i in range(len(library))])
    scale, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(scale, torch.ones(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean, torch.zeros(8), rtol=0, atol=1e-4)
    # The spread around the mean is scaled as the mean is.
    ratio = (after.log_variance - before.log_variance) / 2
    shift = (after.mode() - after.mode().mean((2, 3), keepdim=True)).abs().log() - (
        before.mode() - before.mode().mean((2, 3), keepdim=True)
    ).abs().log()
    torch.testing.assert_close(ratio.mean((0, 2, 3)), shift.mean((0, 2, 3)), rtol=0, atol=1e-2)


def test_channels_count_by_how_exact_the_vae_is(library: Library, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(SIZES["vae"])).eval()
    variances = torch.tensor([0.0, 0.05, 0.15, 0.2, 0.45, 0.95, 1.95, 4.95]).clamp(min=1e-9)
    with torch.no_grad():
        vae.to_moments.weight[8:].zero_()
        vae.to_moments.bias[8:] = variances.log()
    weights = importance(vae, library, Run(tmp_path))
    assert weights.shape == (8, 1, 1)
    assert weights.mean().item() == pytest.approx(1)
    expected = torch.tensor([100.0, 50, 25, 20, 10, 5, 2.5, 1])
    torch.testing.assert_close(weights.flatten() / weights[-1].item(), expected)


def test_latents_are_of_one_vae_and_one_library(parts: Path, library: Library, tmp_path: Path) -> None:
    run = start(parts, tmp_path)
    first = library_latents(library, run)
    changed = tmp_path.joinpath("latents.pt").stat().st_mtime_ns
    assert torch.equal(library_latents(library, run), first)
    assert tmp_path.joinpath("latents.pt").stat().st_mtime_ns == changed
    assert not torch.equal(library_latents(make_library(4, seed=2), run), first)
    library_latents(library, run)
    VAE(VAEConfig.from_dict(SIZES["vae"])).save_pretrained(run.checkpoint / "vae")
    assert not torch.allclose(library_latents(library, run), first)


def test_the_unet_learns(parts: Path, library: Library, tmp_path: Path) -> None:
    run = replace(start(parts, tmp_path, "unet"), batch=BLIND)  # one of them is noise alone
    train_unet(library, run)
    torch.manual_seed(run.seed)
    assert moved(
        UNet(UNetConfig.from_dict(SIZES["unet"])), UNet.from_pretrained(run.checkpoint, subfolder="unet")
    )


def scenes_only(*scenes: Scene) -> Library:
    return Library([*scenes], [], np.empty(0), np.empty(0))


def test_noise_alone_is_to_become_the_mean_of_a_scene() -> None:
    bell, loud = Scene((Sound("bell"),)), Scene((Sound("bell"),), "loud")
    latents = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    means, rows = scene_means(scenes_only(bell, loud, bell, bell), latents)
    assert rows.tolist() == [1, 2, 1, 1]
    expected = torch.stack([latents.mean(0), latents[[0, 2, 3]].mean(0), latents[1]])
    torch.testing.assert_close(means, expected)


def test_an_error_of_many_cells_alike_counts_more() -> None:
    wanted = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    sign = 1 - 2 * (torch.arange(16) % 2)
    for error, weight in ((torch.ones(16, 16), 1 + 1 + 4 + 16), (sign[:, None] * sign, 1)):
        losses = multiscale(wanted + 0.1 * error, wanted, torch.ones(8, 1, 1))
        assert losses["mse"].item() == pytest.approx(0.01, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(0.01 * weight, rel=1e-4)


def test_an_error_counts_as_much_as_its_channel() -> None:
    wanted = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0.1, 1.9, 8).view(-1, 1, 1)
    for channel in range(8):
        error = torch.zeros(8, 1, 1)
        error[channel] = 0.1
        losses = multiscale(wanted + error, wanted, weights)
        assert losses["mse"].item() == pytest.approx(0.01 * weights[channel].item() / 8, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(22 * losses["mse"].item(), rel=1e-4)


def test_every_kind_and_trait_is_drawn_as_often() -> None:
    rising, falling = Scene((Sound("sweep", "rising"),)), Scene((Sound("sweep", "falling"),), "soft")
    bell, both = Scene((Sound("bell"),)), Scene((Sound("bell"), Sound("rain")))
    other = Scene((Sound("bell"), Sound("wind")))
    often = shares(scenes_only(bell, rising, bell, both, falling, bell, bell, both, other))
    assert often[[0, 2, 5, 6]].sum().item() == pytest.approx(often[1].item())
    assert often[1] == often[4]
    assert often[[3, 7]].sum() == often[8]
    assert often[[3, 7, 8]].sum() == pytest.approx(PAIRS)
    assert often.sum() == pytest.approx(1)


def test_what_is_hard_is_drawn_more_often_alone_and_not_in_pairs() -> None:
    engine, behind = Scene((Sound("engine"),)), Scene((Sound("bell"), Sound("engine")))
    often = shares(scenes_only(engine, Scene((Sound("bell"),)), engine, behind))
    assert often[[0, 2]].sum().item() == pytest.approx(HARD["engine"] * often[1].item())
    assert often[3].item() == pytest.approx(PAIRS)
    assert HARD["engine"] > 1


def test_the_unet_begins_with_given_weights(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(start(parts, tmp_path, "unet"), begin=parts)
    begun: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        train_unet_module,
        "train",
        lambda name, unet, *_, **options: begun.update(unet.state_dict(), **options),
    )
    train_unet(library, run)
    given = UNet.from_pretrained(parts, subfolder="unet").state_dict()
    assert all(torch.equal(begun[name], value) for name, value in given.items())
    assert begun["rate"] == GOING_ON


def test_the_unet_learns_with_what_the_pipeline_will_say(parts: Path) -> None:
    """Each text's conditions are its own, whatever it was encoded beside; so are the empty prompt's."""
    pipe = AudioLDM2Pipeline.from_pretrained(parts)
    pipe.set_progress_bar_config(disable=True)
    texts = ["a bell", "a loud falling sweep over rain, and there is wind", "white noise"]
    said = encode_texts(pipe, texts)
    for i, text in enumerate(texts):
        both = pipe.encode_prompt(text, "cpu", 1, True)
        for row, of in ((said.silence[i], 0), (torch.tensor(i), 1)):
            vectors, states, mask = said.of(row[None], "cpu")
            length = both[1].shape[1]
            assert torch.equal(mask[0, :length], both[1][of].long())
            assert not mask[0, length:].any()
            torch.testing.assert_close(vectors[0], both[2][of], rtol=0, atol=1e-4)
            heard = mask[0, :length].bool()
            torch.testing.assert_close(states[0, :length][heard], both[0][of][heard], rtol=1e-2, atol=1e-2)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    parts: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [start(parts, tmp_path / name, "unet") for name in ("whole", "cut")]
    train_unet(library, runs[0])
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
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


# --- the loop


def learn(run: Run, **options: float) -> nn.Module:
    """A line through points of one."""
    torch.manual_seed(0)
    line = nn.Linear(1, 1)

    def loss(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(32, 1, generator=generator)
        return {"loss": (line(x) - (3 * x + 1)).square().mean()}

    train("line", line, loss, run, steps=300, rate=0.1, warmup=10, **options)
    return line


def test_the_loop_learns_and_a_finished_stage_is_not_learnt_again(tmp_path: Path) -> None:
    line = learn(Run(tmp_path), average=0.9)
    assert line.weight.item() == pytest.approx(3, abs=0.05)
    assert line.bias.item() == pytest.approx(1, abs=0.05)
    assert not line.training
    changed = (tmp_path / "plots" / "line.png").stat().st_mtime_ns, torch.load(tmp_path / "line.pt")["curves"]
    assert torch.equal(learn(Run(tmp_path), average=0.9).weight, line.weight)
    assert torch.load(tmp_path / "line.pt")["curves"] == changed[1]


def test_a_run_of_another_seed_is_not_taken_up(tmp_path: Path) -> None:
    learn(Run(tmp_path))
    with pytest.raises(ValueError, match="seed 0 and 300 steps, not with 1 and 300; remove it"):
        learn(Run(tmp_path, seed=1))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    line = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train(
            "line",
            line,
            lambda g: {"loss": line(torch.full((1, 1), torch.nan)).sum()},
            Run(tmp_path),
            steps=3,
            rate=1,
        )


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] < 0.01


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_tiny"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_the_command_trains_all_and_writes_a_checkpoint_that_sounds(tmp_path: Path) -> None:
    done = command(
        "--folder", str(tmp_path), "--sounds", "4", "--steps", "1", "--batch", "2", "--threads", "1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "tiny") in done.stdout
    pipe = AudioLDM2Pipeline.from_pretrained(tmp_path / "tiny")
    assert pipe.dtype == torch.float16
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a bell", num_inference_steps=1).audios.shape == (1, 81920)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--device", "tpu"), "tpu"),
        (("--stages", "gan"), "invalid choice: 'gan'"),
        (("--begin", "nowhere"), "--begin: nowhere/unet is not there"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: tuple[str, ...], says: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_says_what_is_wrong_with_what_it_finds(tmp_path: Path) -> None:
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    small = ("--folder", str(tmp_path), "--sounds", "2", "--batch", "2", "--threads", "1", "--stages")
    assert command(*small, "tokenizers", "vae", "--steps", "1").returncode == 0
    for arguments, says in (
        (("vae", "--steps", "2"), "vae_1.pt is of a run with seed 0 and 1 steps"),
        (("unet", "--begin", str(tmp_path / "broken")), str(tmp_path / "broken" / "unet")),
    ):
        done = command(*small, *arguments)
        assert done.returncode == 1, done.stderr[-2000:]
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_parts_that_are_trained_are_taken_as_float32(parts: Path, tmp_path: Path) -> None:
    given, run = tmp_path / "given", Run(tmp_path / "run")
    VAE.from_pretrained(parts, subfolder="vae").half().save_pretrained(given / "vae")
    shutil.copytree(parts / "tokenizer", given / "tokenizer")
    shutil.copytree(parts / "vocoder", run.checkpoint / "vocoder")
    shutil.copytree(parts / "unet", given / "vocoder")  # not looked at: the run has one
    assert take_parts(run, given) == {"vae", "tokenizer", "vocoder"}
    taken = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    for name, value in VAE.from_pretrained(given, subfolder="vae").state_dict().items():
        assert torch.equal(taken.state_dict()[name], value.float()), name
    assert taken.state_dict()[name].dtype == torch.float32
    assert same_files(run.checkpoint / "tokenizer", given / "tokenizer")
    assert same_files(run.checkpoint / "vocoder", parts / "vocoder")


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


def test_the_command_trains_what_the_parts_lack(parts: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(parts, given, ignore=shutil.ignore_patterns("vae"))
    done = command(
        "--parts", str(given), "--steps", "2", "--sounds", "4", "--batch", "2", "--folder", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): [\d.]+ min$", done.stdout, re.MULTILINE) == ["vae", "decoder"]
    assert (tmp_path / "tiny" / "vae").is_dir()


def test_the_shipped_parts_are_of_todays_sizes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert take_parts(run, ROOT / "audioldm2" / "tiny") == {*PARTS, *TOKENIZERS}
    for name, stage in pipeline(run).stages.items():
        assert stage.config == PARTS[name][0].config.from_dict(SIZES[name]), name


@pytest.mark.parametrize("given", ["nothing", "broken"])
def test_the_command_refuses_parts_that_are_none(tmp_path: Path, given: str) -> None:
    (tmp_path / "broken" / "vae").mkdir(parents=True)
    done = command("--parts", str(tmp_path / given), "--folder", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert given in done.stderr


def test_a_checkpoint_is_not_assembled_from_half_of_its_parts(parts: Path, tmp_path: Path) -> None:
    run = start(parts, tmp_path, "unet", "vocoder")
    with pytest.raises(FileNotFoundError, match="lacks unet, vocoder: train them first"):
        assemble(run, tmp_path / "tiny")
