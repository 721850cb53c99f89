"""The command line: files, messages, exit codes and help."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler, cli, read_wav
from tests.helpers import HAMMER, HANGS_AFTER, ROOT, load_pipeline, seeded


@pytest.fixture
def fast(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a quick run, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return ["--model", str(random_checkpoint), "--duration", "0.5", "--steps", "2", "--device", "cpu"]


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the error message of a run that must print no result and leave no file."""
    before = sorted(Path.cwd().iterdir())
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(Path.cwd().iterdir()) == before
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return code, lines[0]


def test_the_file_is_what_the_pipeline_returns(
    fast: list[str], random_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--negative", "Low quality", "--seed", "7", "--guidance", "4", "--candidates", "2"]
    assert cli.main([HAMMER, "-o", "hammer.wav", "--format", "float32", *arguments, *fast]) == 0
    out, err = capsys.readouterr()
    assert out == "hammer.wav: 0.50 s at 16000 Hz, seed 7\n"
    for bar in ("Encoding text", "Denoising", "2/2", "Decoding", "Vocoding", "Ranking"):
        assert bar in err
    waveform, rate = read_wav("hammer.wav")
    assert rate == 16000

    pipe = load_pipeline(random_checkpoint)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    audio = pipe(
        HAMMER,
        negative_prompt="Low quality",
        audio_length_in_s=0.5,
        num_inference_steps=2,
        guidance_scale=4.0,
        num_waveforms_per_prompt=2,
        generator=seeded(7),
    ).audios
    np.testing.assert_array_equal(waveform[0].numpy(), audio[0])


def test_pcm16_is_the_default(fast: list[str]) -> None:
    assert cli.main([HAMMER, "-o", "a.wav", "--seed", "1", "--quiet", *fast]) == 0
    assert cli.main([HAMMER, "-o", "b.wav", "--seed", "1", "--quiet", "--format", "float32", *fast]) == 0
    pcm16, float32 = read_wav("a.wav")[0], read_wav("b.wav")[0]
    assert Path("a.wav").stat().st_size < 0.6 * Path("b.wav").stat().st_size
    assert 0 < (pcm16 - float32).abs().max() <= 0.51 / 2**15


def test_a_random_seed_is_printed_and_reproduces_the_sound(
    fast: list[str], capsys: pytest.CaptureFixture
) -> None:
    for name in ("a.wav", "b.wav"):
        assert cli.main([HAMMER, "-o", name, "--quiet", *fast]) == 0
    seed, other = (line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert seed != other
    assert Path("a.wav").read_bytes() != Path("b.wav").read_bytes()
    assert cli.main([HAMMER, "-o", "again.wav", "--seed", seed, "--quiet", *fast]) == 0
    assert Path("a.wav").read_bytes() == Path("again.wav").read_bytes()


def test_quiet_prints_only_the_result(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main([HAMMER, "--quiet", "--scheduler", "ddim", "--seed", "0", *fast]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("audio.wav: ")
    assert err == ""


def test_half_precision(fast: list[str]) -> None:
    assert cli.main([HAMMER, "--quiet", "--dtype", "bfloat16", "--guidance", "1", *fast]) == 0
    assert read_wav("audio.wav")[0].abs().max() > 0.05


def test_spectrogram(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main([HAMMER, "--spectrogram", "a.png", "--quiet", *fast]) == 0
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert "a.png: spectrogram of audio.wav" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main([" ".join([HAMMER] * 5) + " rain", "--quiet", *fast]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("audioldm2: warning: ") for line in lines)
    assert any("cut off" in line and "rain" in line for line in lines)


BAD_ARGUMENTS = {
    "no prompt": ([], "prompt"),
    "empty prompt": ([" "], "the prompt is empty"),
    "not text": (["\udcff"], "the prompt is not valid UTF-8 text"),
    "negative not text": ([HAMMER, "--negative", "\udcff"], "--negative is not valid UTF-8 text"),
    "unknown option": ([HAMMER, "--loud"], "--loud"),
    "abbreviation": ([HAMMER, "--neg", "x"], "--neg"),
    "duration text": (
        [HAMMER, "--duration", "long"],
        "must be a number of seconds, more than 0 and at most 3600, got 'long'",
    ),
    "duration zero": ([HAMMER, "--duration", "0"], "more than 0"),
    "duration negative": ([HAMMER, "--duration=-3"], "more than 0"),
    "duration nan": ([HAMMER, "--duration", "nan"], "'nan'"),
    "duration too long": ([HAMMER, "--duration", "99999"], "at most 3600, got '99999'"),
    "steps": ([HAMMER, "--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
    "steps text": ([HAMMER, "--steps", "2.5"], "--steps: must be an integer"),
    "guidance": ([HAMMER, "--guidance", "inf"], "--guidance"),
    "candidates": ([HAMMER, "--candidates", "-1"], "--candidates"),
    "seed": ([HAMMER, "--seed", "-1"], "--seed"),
    "scheduler": ([HAMMER, "--scheduler", "euler"], "euler"),
    "dtype": ([HAMMER, "--dtype", "int8"], "int8"),
    "device": ([HAMMER, "--device", "banana"], "unknown device 'banana'"),
    "device not available": ([HAMMER, "--device", "cuda:77"], "cuda:77 is not available"),
    "same files": ([HAMMER, "-o", "a.png", "--spectrogram", "./a.png"], "are the same file"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_invalid_arguments_exit_with_2(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = failing(arguments, capsys)
    assert code == 2
    assert reason in line
    assert line.endswith("; see audioldm2 --help")


def test_other_errors_exit_with_1(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    cases = {
        "neither a local folder": ["--model", "./nothing"],
        "is a file": ["--model", "file"],
        "model_index.json is missing": ["--model", "folder"],
        "the folder of the output path does not exist": ["-o", "nowhere/a.wav"],
        "is a folder": ["-o", "folder"],
        "nowhere": ["--spectrogram", "nowhere/a.png"],
        "num_inference_steps": ["--steps", "100000"],
        "from 0.04 to 3600": ["--duration", "0.001"],
        "speech checkpoints": ["--transcription", "hello"],
    }
    for reason, arguments in cases.items():
        code, line = failing([HAMMER, "--quiet", *fast, *arguments], capsys)
        assert code == 1
        assert reason in line


def test_the_output_path_is_checked_before_the_model_is_loaded(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def loaded(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was loaded before the check")

    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", loaded)
    code, line = failing([HAMMER, "-o", "nowhere/a.wav", *fast], capsys)
    assert code == 1
    assert "nowhere" in line


def test_a_broken_checkpoint_is_reported_in_one_line(
    fast: list[str], random_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(random_checkpoint, "broken")
    path = Path("broken/unet/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "block_out_channels": [16, 16, 24]}))
    code, line = failing([HAMMER, "--quiet", *fast, "--model", "broken"], capsys)
    assert code == 1
    assert "wrong shape" in line
    assert "--debug prints them" in line


def test_debug_prints_the_traceback(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main([HAMMER, "--debug", "--quiet", *fast, "--model", "./nothing"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("audioldm2: error: ")


def test_out_of_memory_suggests_options(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", full)
    code, line = failing([HAMMER, "--quiet", *fast], capsys)
    assert code == 1
    assert "--dtype float16" in line


def test_a_failed_write_keeps_the_old_file(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("audio.wav").write_bytes(b"old")

    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "audio.wav")

    monkeypatch.setattr(os, "replace", fails)
    code, line = failing([HAMMER, "--quiet", *fast], capsys)
    assert code == 1
    assert "No space left" in line
    assert Path("audio.wav").read_bytes() == b"old"


def test_ctrl_c_leaves_no_file(random_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "audioldm2", HAMMER, "--model", str(random_checkpoint), "--steps", "900"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores SIGINT, and its child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = ""
    while not re.search(r"Denoising: +[1-9]", seen):
        character = process.stderr.read(1)
        assert character, f"it ended before it was interrupted: {seen}"
        seen += character
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "audioldm2: error: interrupted; no partial file was left"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_drawing_keeps_the_sound(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("audioldm2.audio.spectrogram_image.save_spectrogram", stopped)
    assert cli.main([HAMMER, "--spectrogram", "a.png", "--quiet", *fast]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("audio.wav: ")
    assert err == "audioldm2: error: interrupted; no partial file was left\n"
    assert [path.name for path in Path.cwd().iterdir()] == ["audio.wav"]


def test_help_and_version(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            cli.main([option])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("examples:", "--negative", "--spectrogram", "--model tiny", "exit codes", "audioldm2 0."):
        assert word in out
