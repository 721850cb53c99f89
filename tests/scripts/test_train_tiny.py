"""scripts/train_tiny: the table of stages, the command, and the checkpoint that it assembles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from audioldm2 import VAE, AudioLDM2Pipeline
from audioldm2.checkpoints.formats import PARTS, TOKENIZERS
from audioldm2.training import loop
from scripts.tiny import train_command
from scripts.tiny.assemble import assemble, pipeline, take_parts
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY
from scripts.tiny.stages import STAGES
from tests.helpers import ROOT
from tests.scripts.helpers import SHIPPED, call_main, run_script, run_without, same_files


def train_tiny(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return call_main(train_command.main, *arguments, "--threads", "1")


# --- the table of stages


def test_stages_run_after_those_whose_parts_they_need() -> None:
    trained: set[str] = set()
    for stage in STAGES:
        assert stage.needs <= trained, stage.name
        trained |= stage.writes
    assert trained == {*PARTS, *TOKENIZERS}


def test_the_readme_lists_the_stages_in_order() -> None:
    readme = (ROOT / "scripts" / "tiny" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| (.*) \|$", readme, re.MULTILINE)
    assert rows == [(stage.name, str(stage.steps), stage.help) for stage in STAGES]


# --- the command


def test_help_lists_the_stages() -> None:
    done = run_script("train_tiny", "--help")
    assert done.returncode == 0
    for stage in STAGES:
        assert re.search(
            rf"^  {stage.name} +{stage.steps}  {re.escape(stage.help)}$", done.stdout, re.MULTILINE
        )


@pytest.mark.slow
def test_all_stages_give_a_checkpoint_that_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "plot_losses", lambda *_: None)  # slow, and tested with each stage
    done = train_tiny("--folder", tmp_path, "--sounds", "4", "--steps", "1", "--batch", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "tiny") in done.stdout
    pipe = AudioLDM2Pipeline.from_pretrained(tmp_path / "tiny")
    assert pipe.dtype == torch.float16
    shipped = AudioLDM2Pipeline.from_pretrained("tiny")
    assert pipe.recommended == shipped.recommended != {}
    assert type(pipe.scheduler) is type(shipped.scheduler)
    assert pipe.scheduler.config_dict() == shipped.scheduler.config_dict()
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a bell", num_inference_steps=1).audios.shape == (1, 81920)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--device", "tpu"), "tpu"),
        (("--stages", "gan"), "invalid choice: 'gan'"),
        (("--begin", "nowhere"), "--begin: nowhere/unet is not a folder"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = train_tiny(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_without_the_parts_it_needs_is_refused(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "vae", tmp_path / "checkpoint" / "vae")
    done = train_tiny("--folder", tmp_path, "--stages", "language")
    assert done.returncode == 2
    assert "stage language needs text_encoder, text_encoder_2, tokenizer, tokenizer_2;" in done.stderr
    assert "run the stages tokenizers, clap, t5 first" in done.stderr


@pytest.mark.slow
def test_errors_while_training_are_reported_without_a_traceback(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    small = ("--folder", tmp_path, "--parts", parts, "--sounds", "2", "--batch", "2", "--stages")
    assert train_tiny(*small, "vae", "--steps", "1").returncode == 0
    for arguments, message in (
        (("vae", "--steps", "2"), "vae_1.pt belongs to a run with steps 1, and this run has steps 2"),
        (("unet", "--begin", tmp_path / "broken"), str(tmp_path / "broken" / "unet")),
    ):
        done = train_tiny(*small, *arguments)
        assert done.returncode == 1, done.stderr[-2000:]
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_stages_of_missing_parts_run(parts: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(parts, given, ignore=shutil.ignore_patterns("vae"))
    done = train_tiny("--parts", given, "--steps", "2", "--sounds", "4", "--batch", "2", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): [\d.]+ min$", done.stdout, re.MULTILINE) == ["vae", "decoder"]
    assert (tmp_path / "tiny" / "vae").is_dir()


@pytest.mark.parametrize("given", ["nothing", "broken"])
def test_a_folder_without_readable_parts_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "broken" / "vae").mkdir(parents=True)
    done = train_tiny("--parts", tmp_path / given, "--folder", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert given in done.stderr


# --- the parts


def test_trained_parts_are_copied_as_float32(parts: Path, tmp_path: Path) -> None:
    given, run = tmp_path / "given", Run(tmp_path / "run")
    VAE.from_pretrained(parts, subfolder="vae").half().save_pretrained(given / "vae")
    shutil.copytree(parts / "tokenizer", given / "tokenizer")
    shutil.copytree(parts / "vocoder", run.checkpoint / "vocoder")
    shutil.copytree(parts / "unet", given / "vocoder")  # ignored: the run has a vocoder
    assert take_parts(run, given) == {"vae", "tokenizer", "vocoder"}
    taken = VAE.from_pretrained(run.checkpoint, subfolder="vae")
    for name, value in VAE.from_pretrained(given, subfolder="vae").state_dict().items():
        assert torch.equal(taken.state_dict()[name], value.float()), name
    assert taken.state_dict()[name].dtype == torch.float32
    assert same_files(run.checkpoint / "tokenizer", given / "tokenizer")
    assert same_files(run.checkpoint / "vocoder", parts / "vocoder")


def test_the_shipped_parts_have_the_sizes_in_sizes_py(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert take_parts(run, SHIPPED) == {*PARTS, *TOKENIZERS}
    for name, stage in pipeline(run).stages.items():
        assert stage.config == PARTS[name][0].config.from_dict(TINY[name]), name


def test_a_checkpoint_with_missing_parts_is_not_assembled(parts: Path, tmp_path: Path) -> None:
    run = run_without(parts, tmp_path, "unet", "vocoder")
    with pytest.raises(FileNotFoundError, match="lacks unet, vocoder; train the missing parts first"):
        assemble(run, tmp_path / "tiny")
