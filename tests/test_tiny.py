"""The checkpoint that lies in the package, audioldm2/tiny: found by its name, offline, and diffusers' too."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, CheckpointError, DPMSolverMultistepScheduler, UNet, cli, read_wav
from audioldm2.checkpoints import hub
from audioldm2.checkpoints.formats import PARTS
from scripts.tiny.data.sounds import ALL_SOUNDS, Scene, Sound
from scripts.tiny.evaluate.criteria import misses
from scripts.tiny.evaluate.generation import generate
from scripts.tiny.evaluate.prompts import Prompt
from tests.checkpoints.test_hub import NEEDED, digest
from tests.reference import reference_pipeline

FOLDER = Path(hub.__file__).resolve().parents[1] / "tiny"
LOW_TONE = "A low steady tone"
SAMPLES = 81920  # 5.12 s, the length of the sounds in the training


@pytest.fixture(scope="module")
def pipe() -> AudioLDM2Pipeline:
    """The shipped pipeline, float32; its scheduler is not to be changed."""
    loaded = AudioLDM2Pipeline.from_pretrained("tiny")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be made, and no host's address be asked for."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the network was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- found by its name


@pytest.mark.usefixtures("unplugged")
def test_the_name_alone_loads_everything_offline(pipe: AudioLDM2Pipeline) -> None:
    loaded = AudioLDM2Pipeline.from_pretrained("tiny")
    for name, stage in loaded.stages.items():
        alone = PARTS[name][0].stage.from_pretrained("tiny", subfolder=name)
        assert digest(alone) == digest(stage) == digest(pipe.stages[name]), name
        assert not alone.training
    with pytest.raises(CheckpointError, match="the network was called"):
        AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2-not-downloaded-before")


@pytest.mark.parametrize("where", ["tiny", FOLDER, str(FOLDER)], ids=["name", "path", "text"])
def test_it_runs_in_float32_where_nobody_says(where: str | Path) -> None:
    loaded = AudioLDM2Pipeline.from_pretrained(where)
    assert {p.dtype for stage in loaded.stages.values() for p in stage.parameters()} == {torch.float32}
    assert UNet.from_pretrained(where, subfolder="unet").conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_explicit_dtype_is_kept(dtype: torch.dtype) -> None:
    assert AudioLDM2Pipeline.from_pretrained("tiny", torch_dtype=dtype).dtype == dtype
    assert UNet.from_pretrained("tiny", subfolder="unet", torch_dtype=dtype).conv_in.weight.dtype == dtype


def test_a_checkpoint_in_a_local_folder_of_that_name_wins(
    pipe: AudioLDM2Pipeline, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(random_checkpoint, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    local = UNet.from_pretrained(random_checkpoint, subfolder="unet")
    assert local.config != pipe.unet.config
    assert AudioLDM2Pipeline.from_pretrained("tiny").unet.config == local.config
    assert UNet.from_pretrained("tiny", subfolder="unet").config == local.config


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_checkpoint_does_not_stand_in_its_way(
    pipe: AudioLDM2Pipeline, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/tiny, say, for who works in scripts."""
    (tmp_path / "tiny").mkdir() if kind == "folder" else (tmp_path / "tiny").touch()
    monkeypatch.chdir(tmp_path)
    assert AudioLDM2Pipeline.from_pretrained("tiny").unet.config == pipe.unet.config
    with pytest.raises(CheckpointError):
        AudioLDM2Pipeline.from_pretrained("./tiny")


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TINY_FOLDER", tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"gone is missing .*reinstall audioldm2-torch"):
        AudioLDM2Pipeline.from_pretrained("tiny")
    with pytest.raises(CheckpointError, match=r"gone is missing .*reinstall"):
        UNet.from_pretrained("tiny", subfolder="unet")


@pytest.mark.usefixtures("unplugged")
@pytest.mark.parametrize("options", [{}, {"local_files_only": True}], ids=["out of reach", "only local"])
@pytest.mark.parametrize("name", ["./nothing", "owner/not-there", "a/b/c"])
def test_what_cannot_be_found_points_to_it(name: str, options: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='"tiny" is included in the package and needs no download'):
        AudioLDM2Pipeline.from_pretrained(name, cache_dir=tmp_path, **options)


# --- what lies there


def test_the_folder_holds_what_is_read_and_is_small() -> None:
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    assert [str(path.relative_to(FOLDER)) for path in files] == sorted([*NEEDED, "README.md"])
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def test_the_model_card_says_what_matters() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ").lower() for line in card.splitlines() if line.startswith("#")]
    for heading in ("what it knows", "how it was made", "scores", "license"):
        assert any(heading in found for found in headings), f"the card has no heading on {heading}"
    assert re.search(r"^license: \S+$", card, re.MULTILINE), "the card's front matter names no license"


# --- what it gives

# One prompt of each family, what is to be heard, and the seed of its noise.
FAMILIES = [
    Prompt(Scene((Sound("tone", "low"),)), "A low steady tone", 0),
    Prompt(Scene((Sound("tone", "middle"),)), "A medium-pitched steady tone", 0),
    Prompt(Scene((Sound("tone", "high"),)), "A high steady tone", 0),
    Prompt(Scene((Sound("sweep", "rising"),)), "A rising sweep", 0),
    Prompt(Scene((Sound("sweep", "falling"),)), "A falling sweep", 0),
    Prompt(Scene((Sound("pulses", "slow"),)), "Slow beeps", 0),
    Prompt(Scene((Sound("pulses", "fast"),)), "Fast beeps", 0),
    Prompt(Scene((Sound("clicks", "slow"),)), "Slow clicks", 0),
    Prompt(Scene((Sound("clicks", "fast"),)), "Fast clicks", 0),
    Prompt(Scene((Sound("siren"),)), "A siren", 0),
    Prompt(Scene((Sound("bell"),)), "A bell", 0),
    Prompt(Scene((Sound("pluck"),)), "A plucked string", 0),
    Prompt(Scene((Sound("struck"),)), "A xylophone note", 1),
    Prompt(Scene((Sound("scale", "rising"),)), "A rising scale", 0),
    Prompt(Scene((Sound("scale", "falling"),)), "A falling scale", 0),
    Prompt(Scene((Sound("arpeggio", "rising"),)), "A rising arpeggio", 0),
    Prompt(Scene((Sound("arpeggio", "falling"),)), "A falling arpeggio", 0),
    Prompt(Scene((Sound("drums", "slow"),)), "A slow drum beat", 0),
    Prompt(Scene((Sound("drums", "fast"),)), "A fast drum beat", 0),
    Prompt(Scene((Sound("noise"),)), "White noise", 0),
    Prompt(Scene((Sound("rain"),), "loud"), "Loud rain", 0),
    Prompt(Scene((Sound("wind"),)), "Wind", 0),
    Prompt(Scene((Sound("waves"),)), "Sea waves", 0),
    Prompt(Scene((Sound("engine"),), "soft"), "A soft engine hum", 2),
    Prompt(Scene((Sound("birds"),)), "Chirping birds", 0),
    Prompt(Scene((Sound("bell"), Sound("rain"))), "A bell over rain", 0),
]
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def heard(pipe: AudioLDM2Pipeline) -> dict[str, np.ndarray]:
    """A sound of each prompt, at 10 steps of DPM-Solver++."""
    sampler = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(sampler.config)
    sounds = generate(pipe, FAMILIES, steps=10, guidance=GUIDANCE, batch=8)
    pipe.scheduler = sampler
    return {prompt.text: sound for prompt, sound in zip(FAMILIES, sounds[:, 0], strict=True)}


@pytest.mark.parametrize("prompt", FAMILIES, ids=lambda prompt: prompt.text)
def test_a_prompt_is_heard(heard: dict[str, np.ndarray], prompt: Prompt) -> None:
    missed = {name: why for name, why in misses(prompt.scene, heard[prompt.text]).items() if why}
    assert not missed


def test_every_family_has_a_prompt() -> None:
    assert {prompt.scene.sounds[0] for prompt in FAMILIES} == {*ALL_SOUNDS}


@pytest.mark.filterwarnings("ignore:'Low quality' is longer than the prompt")
def test_diffusers_gives_the_same_sound(pipe: AudioLDM2Pipeline) -> None:
    arguments = {"negative_prompt": "Low quality", "num_inference_steps": 4, "audio_length_in_s": 5.12}
    theirs = reference_pipeline(FOLDER, torch_dtype=torch.float32)
    expected = theirs(LOW_TONE, generator=torch.Generator().manual_seed(0), **arguments).audios
    actual = pipe(LOW_TONE, generator=torch.Generator().manual_seed(0), **arguments).audios
    assert actual.shape == expected.shape == (1, SAMPLES)
    assert expected.std() > 0.005, "silence proves nothing"
    assert np.abs(actual - expected).max() <= 1e-3


@pytest.mark.usefixtures("unplugged")
def test_the_command_line_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "4", "--seed", "3", "--device", "cpu", "--format", "float32"]
    assert cli.main([LOW_TONE, "--model", "tiny", *options]) == 0
    out, err = capsys.readouterr()
    assert out == "audio.wav: 5.12 s at 16000 Hz, seed 3\n"
    assert "loading tiny" in err
    waveform, _ = read_wav("audio.wav")

    loaded = AudioLDM2Pipeline.from_pretrained("tiny")
    loaded.set_progress_bar_config(disable=True)
    arguments = {**loaded.recommended, "num_inference_steps": 4}  # what is not given is as recommended
    audio = loaded(LOW_TONE, **arguments, generator=torch.Generator().manual_seed(3)).audios
    np.testing.assert_array_equal(waveform[0].numpy(), audio[0])


def test_the_command_line_points_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([LOW_TONE, "--model", "./nothing", "--quiet"]) == 1
    assert '"tiny" is included in the package' in capsys.readouterr().err
