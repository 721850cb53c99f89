"""The command line: files, messages, exit codes and help."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audioldm2 import (
    QUALITIES,
    AudioLDM2Pipeline,
    CheckpointError,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FeatureCaching,
    cli,
    read_wav,
)
from audioldm2.quality_settings import NEUTRAL
from tests.helpers import HAMMER, HANGS_AFTER, ROOT, load_pipeline, noise, seeded


@pytest.fixture
def fast(random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a quick run, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return ["--model", str(random_checkpoint), "--duration", "0.5", "--steps", "2", "--device", "cpu"]


class Stub:
    """A pipeline that makes the same noise each time and keeps what it was called with."""

    def __init__(self, **recommended: object):
        self.recommended = recommended
        self.device = torch.device("cpu")
        self.scheduler = None
        self.vocoder = SimpleNamespace(config=SimpleNamespace(sampling_rate=16000))
        self.called: dict[str, object] = {}
        self.error: BaseException | None = None

    def set_progress_bar_config(self, **options: object) -> None:
        pass

    def __call__(self, prompt: str, **arguments: object) -> tuple[np.ndarray]:
        self.called = arguments
        if self.error is not None:
            raise self.error
        return (0.1 * noise(1, 800).numpy(),)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    monkeypatch.chdir(tmp_path)
    stub = Stub(num_inference_steps=12, guidance_scale=2.0)
    stub.scheduler = DPMSolverMultistepScheduler()
    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", lambda *_, **__: stub)
    return stub


STUBBED = [HAMMER, "--model", "tiny", "--device", "cpu"]


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
def test_a_long_prompt_is_one_short_warning(fast: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main([" ".join([HAMMER] * 5) + " rain", "--quiet", *fast]) == 0
    (line,) = capsys.readouterr().err.splitlines()  # though both encoders cut the prompt
    assert line.startswith("audioldm2: warning: 'A hammer")
    assert "cut off" in line
    assert "rain'" in line
    assert len(line) < 300


BAD_ARGUMENTS = {
    "no prompt": ([], 'the prompt is missing; describe the sound: audioldm2 "'),
    "forgotten quotes": (["a", "bell"], 'unrecognized arguments: bell; put the prompt in quotes: "a bell"'),
    "forgotten quotes, options": (
        ["--steps", "5", "a", "bell", "over", "rain", "--seed", "1"],
        'unrecognized arguments: bell over rain; put the prompt in quotes: "a bell over rain"',
    ),
    "prompt as an option": (
        ["--prompt", HAMMER],
        "unrecognized argument: --prompt; the prompt needs no option",
    ),
    "prompt with =": ([f"--prompt={HAMMER}"], "the prompt needs no option"),
    "typo": ([HAMMER, "--setps", "20"], "unrecognized argument: --setps; did you mean --steps?"),
    "Python's name": ([HAMMER, "--audio-length-in-s=2"], "did you mean --duration?"),
    "one dash": ([HAMMER, "-output", "a.wav"], "unrecognized argument: -output; did you mean --output?"),
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
    "device number": (
        [HAMMER, "--device", "0"],
        "unknown device '0'; use cpu, cuda, cuda:1, mps or xpu; the GPU",
    ),
    "device not available": ([HAMMER, "--device", "cuda:77"], "cuda:77 is not available"),
    "suffix": ([HAMMER, "-o", "a.xyz"], "unknown type of sound file '.xyz'; use .wav, .wave, .flac"),
    "image suffix": ([HAMMER, "--spectrogram", "s.txt"], "unknown type of image file '.txt'; use .png"),
    "lossless format": ([HAMMER, "-o", "a.flac", "--format", "float32"], "it always has pcm16"),
    "lossy format": ([HAMMER, "-o", "a.mp3", "--format", "pcm16"], "it is lossy"),
    "no output": ([HAMMER, "-o", ""], "-o/--output: the name of the file is empty"),
    "image to standard output": ([HAMMER, "--spectrogram", "-"], "cannot be written to standard output"),
    "too many steps": (
        [HAMMER, "--model", "tiny", "--steps", "2000"],
        "--steps must be an integer from 1 to 1000",
    ),
    "too short": ([HAMMER, "--model", "tiny", "--duration", "0.01"], "--duration must be from 0.128 to 3600"),
    "no speech": ([HAMMER, "--model", "tiny", "--transcription", "hi"], "--transcription is for the speech"),
    "revision of a folder": (
        [HAMMER, "--model", "tiny", "--revision", "main"],
        "--revision: tiny is not a repository",
    ),
    "control characters": ([HAMMER, "--scheduler", "\x1b[31mred\n"], r"\x1b[31mred"),
    "same files": ([HAMMER, "-o", "a.png", "--spectrogram", "./a.png"], "are the same file"),
    "quality": ([HAMMER, "--quality", "fast"], "invalid choice: 'fast'"),
    "cache text": ([HAMMER, "--cache", "often"], "--cache: must be an interval such as 3, or a list"),
    "cache of no step": ([HAMMER, "--cache", "0"], "such as 0,1,2,5; got '0'"),
    "cache not from 0": ([HAMMER, "--cache", "1,2"], "such as 0,1,2,5; got '1,2'"),
    "cache of late steps": (
        [HAMMER, "--cache", "0,5", "--steps", "4"],
        "--cache lists step 5, but the last of the run's 4 steps is 3",
    ),
    "cache of a preset's late steps": (
        [HAMMER, "--cache", "0,50", "--quality", "best"],
        "--cache lists step 50",
    ),
    "interval text": (
        [HAMMER, "--guidance-interval", "0.75"],
        "--guidance-interval: must be START-END, two fractions",
    ),
    "interval of nothing": ([HAMMER, "--guidance-interval", "0.5-0.5"], "such as 0-0.75; got '0.5-0.5'"),
    "interval too long": ([HAMMER, "--guidance-interval", "0-20"], "such as 0-0.75; got '0-20'"),
    "interval without guidance": (
        [HAMMER, "--guidance-interval", "0-0.5", "--guidance", "1"],
        "--guidance-interval has no effect without guidance; pass a --guidance greater than 1",
    ),
    "rescale": ([HAMMER, "--guidance-rescale", "1.5"], "--guidance-rescale: must be a number from 0 to 1"),
    "rescale without guidance": (
        [HAMMER, "--guidance-rescale", "0.7", "--guidance", "1"],
        "--guidance-rescale has no effect without guidance",
    ),
    "unconditional": ([HAMMER, "--unconditional", "noise"], "invalid choice: 'noise'"),
    "zeros without guidance": (
        [HAMMER, "--unconditional", "zeros", "--guidance", "1"],
        "--unconditional has no effect without guidance",
    ),
    "zeros and a negative": (
        [HAMMER, "--unconditional", "zeros", "--negative", "noise"],
        "--unconditional = 'zeros' cannot be combined with a negative prompt",
    ),
    "timesteps text": (
        [HAMMER, "--timesteps", "first,last"],
        "--timesteps: must be decreasing integers of at least 0, such",
    ),
    "timesteps that rise": ([HAMMER, "--timesteps", "1,2"], "such as 999,700,300; got"),
    "timesteps beyond": (
        [HAMMER, "--model", "tiny", "--timesteps", "2000,5"],
        "--timesteps must be decreasing integers from at most 999",
    ),
    "timesteps and steps": (
        [HAMMER, "--timesteps", "9,5", "--steps", "2"],
        "--timesteps and --steps cannot be used together",
    ),
    "quality of an inversion": (
        [HAMMER, "--quality", "draft", "--from", __file__, "--invert"],
        "--quality cannot be used with --invert, which determines the sampler and its steps",
    ),
    "timesteps of an inversion": (
        [HAMMER, "--timesteps", "9,5", "--from", __file__, "--invert"],
        "--timesteps cannot be used with --invert",
    ),
    "another library's name": ([HAMMER, "--feature-cache", "3"], "did you mean --cache?"),
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
        "fp8": ["--variant", "fp8"],
        "the folder of the output path does not exist": ["-o", "nowhere/a.wav"],
        "is a folder": ["-o", "folder"],
        "folder/: the output path is a folder": ["-o", "folder/"],
        "new/: the output path is a folder": ["-o", "new/"],
        "nowhere": ["--spectrogram", "nowhere/a.png"],
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

    def broken(name: str) -> None:
        raise OSError(f"the libraries of {name} are missing")

    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", loaded)
    monkeypatch.setattr("audioldm2.extras.import_module", broken)
    for arguments, code, reason in [
        (["-o", "nowhere/a.wav"], 1, "nowhere"),
        (["-o", "a.flac"], 1, "soundfile, which is broken (OSError: the libraries of soundfile are missing)"),
        (["--spectrogram", "a.png"], 1, "matplotlib, which is broken"),
        (["--steps", "1001"], 2, "--steps must be an integer from 1 to 1000"),
        (["--duration", "0.001"], 2, "--duration must be from 0.04 to 3600"),
        (["--transcription", "hello"], 2, "--transcription is for the speech checkpoints"),
    ]:
        assert failing([HAMMER, *fast, *arguments], capsys)[0] == code
        with suppress(SystemExit):
            cli.main([HAMMER, *fast, *arguments])
        assert reason in capsys.readouterr().err


def test_a_speaking_checkpoint_needs_words(
    random_speech_checkpoint: Path,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = failing([HAMMER, "--model", str(random_speech_checkpoint)], capsys)
    assert code == 2
    assert "this checkpoint speaks: pass --transcription, the words to say" in line


def test_the_suffix_decides_the_type_of_the_file(stub: Stub) -> None:
    soundfile = pytest.importorskip("soundfile")
    assert cli.main([*STUBBED, "-o", "a.wav", "--seed", "1", "--quiet"]) == 0
    assert cli.main([*STUBBED, "-o", "a.flac", "--seed", "1", "--quiet"]) == 0
    assert soundfile.info("a.flac").format == "FLAC"
    np.testing.assert_array_equal(soundfile.read("a.flac")[0], soundfile.read("a.wav")[0])


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_gets_the_sound_and_nothing_else(
    stub: Stub, capfdbinary: pytest.CaptureFixture, name: str
) -> None:
    assert cli.main([*STUBBED, "-o", name, "--seed", "3", "--spectrogram", "a.png"]) == 0
    out, err = capfdbinary.readouterr()
    assert b"standard output: 0.05 s at 16000 Hz, seed 3" in err
    Path("piped.wav").write_bytes(out)
    assert cli.main([*STUBBED, "-o", "a.wav", "--seed", "3", "--quiet"]) == 0
    assert out == Path("a.wav").read_bytes()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a.png", "a.wav", "piped.wav"]


def test_a_terminal_or_a_closed_standard_output_gets_no_sound(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert failing([*STUBBED, "-o", "-"], capsys)[0] == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([*STUBBED, "-o", "-"]) == 1
    assert capsys.readouterr().err == "audioldm2: error: standard output is closed; name a file with -o\n"


def test_the_checkpoints_recommendations_are_the_defaults(stub: Stub) -> None:
    def used(*arguments: str) -> tuple[object, object]:
        assert cli.main([*STUBBED, "--quiet", *arguments]) == 0
        return stub.called["num_inference_steps"], stub.called["guidance_scale"]

    assert used() == (12, 2.0)
    assert used("--steps", "7") == (7, 2.0)
    assert used("--guidance", "1") == (12, 1.0)
    stub.scheduler = DDIMScheduler()
    assert used("--scheduler", "ddim") == (None, 2.0), "the number of steps is for dpmsolver++"
    stub.recommended = {"audio_length_in_s": 3.0, "negative_prompt": "noise", "unknown": 1}
    assert used() == (None, 3.5)
    assert stub.called["audio_length_in_s"] == 3.0
    assert stub.called["negative_prompt"] == "noise"
    assert "unknown" not in stub.called
    used("--duration", "2", "--negative", "")
    assert (stub.called["audio_length_in_s"], stub.called["negative_prompt"]) == (2.0, "")


def test_options_of_quality_are_arguments_of_the_pipeline(stub: Stub) -> None:
    def used(*arguments: str) -> dict[str, object]:
        stub.called = {}
        assert cli.main([*STUBBED, "--quiet", *arguments]) == 0
        names = {*NEUTRAL, "quality", "num_inference_steps", "negative_prompt"}
        found = {name: value for name, value in stub.called.items() if name in names and value is not None}
        return {**found, "scheduler": type(stub.scheduler).__name__}

    dpm, ddim = "DPMSolverMultistepScheduler", "DDIMScheduler"
    draft = QUALITIES["draft"]
    of_draft = type(draft.make_scheduler(DDIMScheduler())).__name__
    assert used() == {"num_inference_steps": 12, "scheduler": dpm}
    assert used("--quality", "draft") == {"quality": draft, "scheduler": of_draft}
    assert used("--quality", "draft", "--steps", "5", "--cache", "1") == {
        "quality": draft,
        "num_inference_steps": 5,
        "feature_cache": 1,
        "scheduler": of_draft,
    }
    assert used("--quality", "draft", "--scheduler", "ddim") == {
        "quality": replace(draft, sampler="ddim"),
        "scheduler": ddim,
    }
    assert used("--quality", "draft", "--timesteps", "900,500") == {
        "quality": draft,
        "timesteps": (900, 500),
        "scheduler": of_draft,
    }
    assert used("--timesteps", "900,500,0") == {"timesteps": (900, 500, 0), "scheduler": dpm}
    assert used("--cache", "0,1, 2,5")["feature_cache"] == FeatureCaching(steps=(0, 1, 2, 5))
    stub.recommended = {"negative_prompt": "noise"}
    assert used("--unconditional", "text")["negative_prompt"] == "noise"
    assert used(
        *("--cache", "3", "--guidance-interval", "0 - .75", "--guidance-rescale", "0.7"),
        *("--unconditional", "zeros"),
    ) == {
        "feature_cache": 3,
        "guidance_interval": (0.0, 0.75),
        "guidance_rescale": 0.7,
        "unconditional": "zeros",
        "scheduler": dpm,
    }


def test_a_preset_of_the_command_line_is_that_of_the_pipeline(
    fast: list[str], random_checkpoint: Path
) -> None:
    arguments = ["--quality", "draft", "--scheduler", "unipc", "--guidance-interval", "0-0.5", "--seed", "3"]
    assert cli.main([HAMMER, "-o", "hammer.wav", "--format", "float32", "--quiet", *arguments, *fast]) == 0
    waveform, _ = read_wav("hammer.wav")
    quality = replace(QUALITIES["draft"], timesteps=None, num_inference_steps=2, guidance_interval=(0, 0.5))
    pipe = load_pipeline(random_checkpoint)
    audio = pipe(HAMMER, audio_length_in_s=0.5, quality=quality, generator=seeded(3)).audios
    np.testing.assert_array_equal(waveform[0].numpy(), audio[0])


def test_errors_use_the_options_names_and_print_no_secrets(
    stub: Stub, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine\n")
    for error, code, expected in [
        (ValueError("num_waveforms_per_prompt is 0"), 2, "--candidates is 0; see audioldm2 --help"),
        (TypeError("negative_prompt must be text"), 2, "--negative must be text; see audioldm2 --help"),
        (ValueError("my_guidance_scale_2 is odd"), 1, "my_guidance_scale_2 is odd"),
        (CheckpointError("the transcription of a file"), 1, "the transcription of a file"),
        (RuntimeError("b'Bearer secret-of-mine\\n' is illegal"), 1, r"b'Bearer ***\n' is illegal"),
        (RuntimeError("Bearer abcdef, hf_abcdefgh123"), 1, "Bearer *** ***"),
        (RuntimeError("\x1b]0;title\x07 \u202e \udcff"), 1, r"\x1b]0;title\x07 \u202e \udcff"),
        (RuntimeError("a" * 300_000 + "z" * 300_000), 1, f"{'a' * 328}...{'z' * 328}"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError(), 1, "RuntimeError"),
    ]:
        stub.error = error
        found = failing([*STUBBED, "--quiet"], capsys)
        assert found == (code, f"audioldm2: error: {expected}")
        with suppress(SystemExit):
            cli.main([*STUBBED, "--debug"])
        err = capsys.readouterr().err
        assert "Traceback" in err
        for secret in ("secret-of-mine", "hf_abcdefgh123", "\x1b", "\u202e"):
            assert secret not in err


class Full(io.TextIOBase):
    """A stream whose device is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_broken_streams_do_not_lose_the_sound(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        patch.setattr(sys, "stdout", None)
        assert cli.main([*STUBBED, "-o", "b.wav"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert cli.main([*STUBBED, "-o", "c.wav", "--spectrogram", "c.png", "--quiet"]) == 1
    message = "c.wav was written, but a message to standard output was not: No space left on device"
    assert capsys.readouterr().err == f"audioldm2: error: {message}\n"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["b.wav", "c.png", "c.wav"]


def test_progress_bars_that_cannot_be_printed_do_not_lose_the_sound(
    fast: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        assert cli.main([HAMMER, *fast]) == 0
    assert Path("audio.wav").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_run_without_a_file(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: signal.Signals
) -> None:
    # Under nohup, or in a job in the background, this process ignores some of them.
    inherited = signal.signal(
        number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    )
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]

    def stopped(*arguments: object) -> None:
        assert len(list(Path.cwd().iterdir())) == 1  # the temporary file
        signal.raise_signal(number)

    monkeypatch.setattr(os, "replace", stopped)
    monkeypatch.setattr("audioldm2.atomic.check_writable", lambda path: None)
    for module in ("cli.generate", "audio.wav"):
        monkeypatch.setattr(f"audioldm2.{module}.check_writable", lambda path: None)
    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", lambda *_, **__: (np.zeros((1, 800), np.float32),))
    try:
        assert cli.main([HAMMER, "--quiet", *fast]) == 128 + number
    finally:
        after = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
        signal.signal(number, inherited)
    out, err = capsys.readouterr()
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (out, err) == ("", f"audioldm2: error: {how}; no partial file was left\n")
    assert list(Path.cwd().iterdir()) == []
    assert after == before


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
    assert "; and " in line


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


PROCESS = """
import sys, time
from audioldm2 import cli
from audioldm2.atomic import replacing
from audioldm2.cli import generate, process

def run(parser, options):  # the real one imports PyTorch, which takes seconds
    with replacing(options.output) as temporary:
        temporary.write_text("sound" * 100_000)
        print("half", file=sys.stderr, flush=True)
        if options.steps:
            time.sleep(600)
    return 1 if process.print_line("written") else 0

generate.run = run
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_is_stopped_leaves_no_file(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, HAMMER, "--steps", "900"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores SIGINT, one under nohup SIGHUP, and child processes inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "half\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 128 + number
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (out, err) == ("", f"audioldm2: error: {how}; no partial file was left\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("streams", "code", "message"),
    [
        ("2>&-", 0, "written\n"),
        ("2>/dev/full", 0, "written\n"),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 1, "half\n"),
        ("2>&1 | head -c0", 1, ""),
    ],
)
def test_a_process_with_a_broken_stream_writes_its_file(
    tmp_path: Path, streams: str, code: int, message: str
) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'set -o pipefail; trap "" PIPE; "$0" -c "$1" bell {streams}',
            sys.executable,
            PROCESS,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (code, message)
    assert Path(tmp_path, "audio.wav").read_text() == "sound" * 100_000
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_while_drawing_keeps_the_sound(
    fast: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("audioldm2.plots.save_spectrogram", stopped)
    assert cli.main([HAMMER, "--spectrogram", "a.png", "--quiet", *fast]) == 130
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
