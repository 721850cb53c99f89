"""Fine-tuning tiny for a few steps: what is written, resuming, several processes, and mistakes."""

from __future__ import annotations

import copy
import csv
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from audioldm2 import AudioLDM2Pipeline, cli, write_wav
from audioldm2.training.finetune import FOLDER, FinetuneResult, finetune
from audioldm2.training.loop import Processes, RunMismatchError
from audioldm2.training.options import FinetuneOptions
from tests.helpers import HANGS_AFTER, ROOT, assert_same_sound, load_pipeline, noise, run_python, sound

FAST = FinetuneOptions(steps=2, batch_size=2, duration=0.64, rate=1e-3, warmup=0, validation=0.3, rank=2)
WORDS = (
    *("--steps", "2", "--batch-size", "2", "--duration", "0.64", "--rate", "1e-3", "--warmup", "0"),
    *("--validation", "0.3", "--rank", "2", "--model", "tiny", "--device", "cpu"),
)
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["file_name,caption"]
    for i in range(3):
        write_wav(folder / f"{i}.wav", 0.1 * noise(9000, seed=i), 16000)
        lines.append(f"{i}.wav,My door number {i}")
    (folder / "data.csv").write_text("\n".join(lines))
    return folder / "data.csv"


@pytest.fixture(scope="module")
def _base() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture
def tiny(_base: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline of the test's own."""
    return copy.deepcopy(_base)


@pytest.fixture(scope="module")
def adapted(
    _base: AudioLDM2Pipeline, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AudioLDM2Pipeline, FinetuneResult]:
    """A pipeline after a fine-tune of two steps."""
    pipe = copy.deepcopy(_base)
    pipe.recommended = {"num_inference_steps": 2}
    options = dataclasses.replace(FAST, sample_every=2, sample_prompts=("My door",), validate_every=1)
    return pipe, finetune(pipe, table, tmp_path_factory.mktemp("adapted"), options)


def test_an_adapter_is_written_that_loads_and_can_be_switched_off(
    adapted: tuple[AudioLDM2Pipeline, FinetuneResult], tiny: AudioLDM2Pipeline
) -> None:
    pipe, result = adapted
    tensors = load_file(result.folder / ADAPTER)
    assert sum(tensor.numel() for tensor in tensors.values()) == result.parameters
    assert all(bool(tensor.any()) for tensor in tensors.values()), "B has moved from zero"
    assert result.examples == 2
    base, ours = sound(tiny), sound(pipe)
    tiny.load_lora_weights(result.folder)
    assert abs(sound(tiny) - ours).max() < 1e-5
    assert abs(base - ours).max() > 1e-4
    tiny.disable_lora()
    assert (sound(tiny) == base).all()
    assert pipe.unet.conv_in.weight.requires_grad
    assert not pipe.unet.training


def test_losses_validation_and_samples_are_written(
    adapted: tuple[AudioLDM2Pipeline, FinetuneResult],
) -> None:
    folder = adapted[1].folder / FOLDER
    with open(folder / "plots" / "finetune.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [bool(row["loss"]) for row in rows] == [False, True, True]
    assert adapted[1].validation == (float(rows[0]["validation"]), float(rows[-1]["validation"]))
    assert len({row["validation"] for row in rows}) == 3
    assert (folder / "plots" / "finetune.png").stat().st_size > 5000
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    assert samples == [f"step-00000{i}-1.{kind}" for i in (0, 2) for kind in ("png", "wav")]


def test_a_whole_checkpoint_is_written_and_the_loss_falls(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(FAST, full=True, steps=3, ema=0.0, precision="bf16")
    options = dataclasses.replace(options, gradient_checkpointing=True, validate_every=100)
    result = finetune(tiny, table, tmp_path / "full", options)
    assert result.validation is not None
    assert result.validation[1] < result.validation[0]
    loaded = load_pipeline(result.folder)
    saved, trained = loaded.unet.state_dict(), tiny.unet.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in saved.items())
    # Not to the bit: where a weight begins in memory decides how some CPUs add it up.
    assert_same_sound(sound(loaded), sound(tiny))
    assert type(loaded.scheduler) is type(tiny.scheduler)
    assert loaded.recommended == tiny.recommended
    assert not tiny.unet.is_gradient_checkpointing


@pytest.mark.slow  # two runs in processes of their own
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(table: Path, tmp_path: Path) -> None:
    words = [*WORDS, "--steps", "4", "--quiet"]
    assert cli.main(["finetune", str(table), "-o", str(tmp_path / "whole"), *words]) == 0
    command = ["-m", "audioldm2", "finetune", str(table), "-o", str(tmp_path / "killed"), *words]
    command += ["--save-every", "0"]
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    state = tmp_path / "killed" / FOLDER / "finetune.pt"
    start = time.monotonic()
    while not state.is_file() and time.monotonic() - start < HANGS_AFTER:
        assert process.poll() is None, "finished before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(HANGS_AFTER) == -signal.SIGKILL
    assert torch.load(state, weights_only=True)["done"] < 4
    assert not (tmp_path / "killed" / ADAPTER).exists()
    assert cli.main(["finetune", str(table), "-o", str(tmp_path / "killed"), *words]) == 0
    whole, killed = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    losses = [tmp_path / name / FOLDER / "plots" / "finetune.csv" for name in ("whole", "killed")]
    assert losses[0].read_text() == losses[1].read_text()


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shares of a batch, one after the other: their mean gradient is that of the whole batch."""
    from audioldm2.training import finetune as module

    found: dict[int, list[torch.Tensor]] = {}

    def recording(index: int, count: int) -> Callable[[Any], Processes]:
        def average(gradients: Any) -> None:
            found[10 * count + index] = [gradient.clone() for gradient in gradients]

        return lambda device: Processes(index, count, average, lambda: None)

    options = dataclasses.replace(FAST, steps=1, batch_size=4, full=True, validation=0.0)
    for index, count in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(module, "start_processes", recording(index, count))
        pipe = copy.deepcopy(tiny)
        finetune(pipe, table, tmp_path / f"{count}", options)
        (tmp_path / "2" / FOLDER / "finetune.pt").unlink(missing_ok=True)
    whole, first, second = found[10], found[20], found[21]
    for one, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, one, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(module, "start_processes", recording(0, 3))
    with pytest.raises(ValueError, match="batch_size = 4 cannot be divided among 3 processes"):
        finetune(tiny, table, tmp_path / "3", options)


@pytest.mark.slow
def test_accelerate_trains_on_two_processes(table: Path, tmp_path: Path) -> None:
    words = ["finetune", str(table), *WORDS, "--quiet"]
    assert cli.main([*words, "-o", str(tmp_path / "one")]) == 0
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "audioldm2"]
    run_python(*launch, *words, "-o", str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_what_is_rehearsed_has_the_predictions_from_before_as_targets(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path, full: bool
) -> None:
    """With nothing else in the batch, there is nothing to learn."""
    options = dataclasses.replace(FAST, validation=0.0, rehearse=table, rehearse_share=0.99, full=full)
    options = dataclasses.replace(options, steps=1)
    finetune(tiny, table, tmp_path / "a", options)
    with open(tmp_path / "a" / FOLDER / "plots" / "finetune.csv", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[0] < 1e-6


# --- mistakes


def test_a_folder_of_something_else_is_refused(
    adapted: tuple[AudioLDM2Pipeline, FinetuneResult],
    tiny: AudioLDM2Pipeline,
    table: Path,
    tmp_path: Path,
) -> None:
    done = adapted[1].folder
    with pytest.raises(
        RunMismatchError, match="belongs to a run with rank 2, and this run has rank 3; remove"
    ):
        finetune(tiny, table, done, dataclasses.replace(FAST, rank=3))
    assert tiny.get_active_adapters() == []
    broken = tmp_path / "broken" / FOLDER / "settings.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(RunMismatchError, match=r"settings\.json is broken; remove"):
        finetune(tiny, table, tmp_path / "broken", FAST)
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(ValueError, match="is not empty and not the output of a fine-tune"):
        finetune(tiny, table, tmp_path, FAST)


def test_a_loss_that_is_not_finite_leaves_the_pipeline_as_it_was(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    before = copy.deepcopy(tiny.unet.state_dict())
    for full in (False, True):
        options = dataclasses.replace(FAST, rate=1e30, steps=4, full=full, validation=0.0)
        with pytest.raises(FloatingPointError, match="step 2: the loss is nan; try a lower learning rate"):
            finetune(tiny, table, tmp_path / str(full), options)
    after = tiny.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pipeline_that_cannot_be_trained_is_refused(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the UNet's weights are bfloat16; load the checkpoint with"):
        finetune(tiny.to(torch.bfloat16), table, tmp_path / "a", FAST)
    tiny.unet = torch.nn.Sequential()
    with pytest.raises(TypeError, match=r"pipe\.unet is a Sequential"):
        finetune(tiny, table, tmp_path / "a", FAST)


def test_adapters_must_be_off_and_none_has_the_name(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    """A checkpoint that was trained with an adapter on would be saved without it."""
    tiny.add_adapter("finetuned", 2)
    with pytest.raises(ValueError, match="the adapters 'finetuned' are on"):
        finetune(tiny, table, tmp_path / "out", FinetuneOptions(full=True))
    tiny.disable_lora()
    with pytest.raises(ValueError, match="there is an adapter 'finetuned' already"):
        finetune(tiny, table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # for the checkpoint that is made for it
def test_speech_checkpoints_are_refused(random_speech_checkpoint: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speech checkpoints cannot be trained"):
        finetune(load_pipeline(random_speech_checkpoint), table, tmp_path / "a", FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rate": -1.0}, "rate must be more than 0"),
        ({"dropout": 1.0}, "dropout must be from 0 to less than 1"),
        ({"validation": -0.1}, "validation must be from 0"),
        ({"precision": "fp16"}, "precision"),
        ({"latents": "mode"}, "latents"),
        ({"sample_every": 5}, "sample_every needs sample_prompts"),
        ({"seed": 2**62}, "seed"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**settings)


def test_mistakes_on_the_command_line_are_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "silent.csv").write_text("file,caption\nsilent.wav,A door\n")
    write_wav(tmp_path / "silent.wav", torch.zeros(16000), 16000)
    out = ["-o", str(tmp_path / "out")]
    for words, code, message in (
        ([str(table)], 2, "the folder is missing"),
        (out, 2, "the table is missing"),
        ([str(table), "-o", "-"], 2, "not standard output"),
        ([str(table), *out, "--rate", "0"], 2, "argument --rate"),
        ([str(table), *out, "--validation", "1.5"], 2, "must be a share from 0 to less than 1, or a table"),
        ([str(table), *out, "--full", "--rank", "4"], 2, "argument --rank: is for an adapter"),
        ([str(table), *out, "--sample-every", "5"], 2, "--sample-prompt"),
        (["none.csv", *out], 1, "none.csv: No such file"),
        ([str(table), *out, "--validation", "none.csv"], 1, "none.csv: No such file"),
        ([str(tmp_path / "silent.csv"), *out, "--validation", "0"], 1, "silent.csv:2: .* is silent"),
        ([str(table), *out, "--targets", "to_z"], 1, "to_z"),
        ([str(table), *out, "--model", str(tmp_path)], 1, "model_index.json"),
    ):
        words = [*words, "--device", "cpu", "--quiet"]
        if "--model" not in words:
            words += ["--model", "tiny"]
        try:
            found = cli.main(["finetune", *words])
        except SystemExit as stop:
            found = int(str(stop.code))
        error = capsys.readouterr().err
        assert found == code, error
        assert error.count("\n") == 1, error
        assert re.search(message, error), error
