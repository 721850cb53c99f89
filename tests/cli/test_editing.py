"""A sound as input of the command line: what is refused at once, and what the pipeline is called with."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioldm2 import AudioLDM2Pipeline, cli, read_wav, write_wav
from tests.helpers import load_pipeline, noise, run_python, seeded

RATE = 16000
SOUND = (0.1 * noise(RATE // 2, seed=5)).clamp(-1, 1)  # 0.5 s
FAST = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--quiet", "--seed", "1"]
BAD_ARGUMENTS = {
    "--keep 0-1": "--keep goes with --from, the sound to edit, which is missing",
    "--strength 0.5": "--strength goes with --from",
    "--extend 1": "--extend goes with --from",
    "--invert": "--invert goes with --from",
    "--from in.wav --skip 0.4": "--skip goes with --invert",
    "--from in.wav --source-prompt x": "--source-prompt goes with --invert",
    "--from in.wav --strength 2": "--strength: must be a number from 0 to 1, got '2'",
    "--from in.wav --keep 2-1": "--keep: has the pair (2.0, 1.0); the first number must be",
    "--from in.wav --keep 1": "--keep: must be seconds, as in 0-2.5 or 4-, got '1'",
    "--from in.wav --keep=-1": "--keep: must be seconds",
    "--from in.wav --replace-band 4000-": "--replace-band: must be a band in Hz, as in 4000-8000",
    "--from in.wav --keep 0-1 --replace 2-3": "--keep and --replace say the same in two ways",
    "--from in.wav --extend 0": "--extend: must be a number of seconds, more than 0",
    "--from in.wav --extend 1 --keep 0-1": "--extend keeps all of --from, so leave out --keep",
    "--from in.wav --extend 1 --duration 3": "so leave out --duration",
    "--from in.wav --loop --replace 0-1": "--loop goes with --from and --strength",
    "--from in.wav --invert sdedit": "--invert: must be ddpm or ddim, got 'sdedit'; write the prompt before",
    "--from in.wav --invert --strength 0.4": "--invert edits all of the sound, so leave out --strength",
    "--from in.wav --invert --skip 1.5": "--skip: must be a number from 0 to 1, got '1.5'",
    "--from in.wav --invert ddim --candidates 2": "--invert with ddim has no candidates",
    "--from none.wav": "--from: there is no file none.wav",
    "--from .": "--from: . is a folder; name a sound file",
    "--from in.txt": "--from: is for a sound; read the prompt from in.txt with --from-file",
    "--from in.wav -o in.wav": "-o/--output and --from are the same file; write the edited sound into an",
    "--from in.wav -o ./link.wav": "are the same file",
    # Not without PyTorch: what depends on the sound.
    "--from in.wav --replace 3-4": "--replace has the span from 3 to 4 s, but the sound is 0.5 s long",
    "--from silent.wav": "--from is silent: its peak is",
    "--from short.wav": "--from is 0.005 s long; it must be from",
}


@pytest.fixture(scope="module")
def loaded() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture
def tiny(loaded: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> AudioLDM2Pipeline:
    """The pipeline that every command loads."""
    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", lambda *_, **__: loaded)
    return loaded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a sound."""
    monkeypatch.chdir(tmp_path)
    write_wav("in.wav", SOUND, RATE, format="float32")
    write_wav("silent.wav", 0 * SOUND, RATE)
    write_wav("short.wav", SOUND[:80], RATE)
    Path("in.txt").write_text("A bell")
    Path("link.wav").hardlink_to("in.wav")
    return tmp_path


def contents() -> dict[Path, bytes]:
    """All files of the working directory."""
    return {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the error, one line, of a run that writes nothing."""
    before = contents()
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(str(stop.code))
    out, err = capsys.readouterr()
    assert contents() == before
    assert out == ""
    assert err.count("\n") == 1, err
    return code, err


def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    tiny: AudioLDM2Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, reason in BAD_ARGUMENTS.items():
        code, line = failing(["Rain", *FAST, *arguments.split()], capsys)
        assert (code, reason in line) == (2, True), line
    code, line = failing(["--from-file", "in.wav", *FAST], capsys)
    assert code == 2
    assert "is for the prompt; edit the sound with --from in.wav" in line
    Path("no.wav").write_text("This is not a sound.")
    code, line = failing(["Rain", "--from", "no.wav", *FAST], capsys)
    assert code == 1
    assert "no.wav is not a sound file" in line


def test_files_and_spans_and_presets_are_checked_without_torch() -> None:
    code = """
import sys
from audioldm2 import cli
for words in (
    "--from none.wav", "--from in.wav --keep 2-1", "--from in.wav -o in.wav", "--strength 1",
    "--quality draft --cache 0,9", "--guidance 1 --guidance-interval 0-1",
):
    try:
        cli.main(["Rain", *words.split()])
    except SystemExit as stop:
        assert stop.code == 2
    else:
        raise AssertionError(words)
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    run_python("-c", code, cwd=Path.cwd())


class Stdin(io.TextIOWrapper):
    """Standard input with the bytes of a file."""

    def __init__(self, path: str):
        super().__init__(io.BytesIO(Path(path).read_bytes()))


def test_the_sound_is_that_of_the_pipeline(
    tiny: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("in.wav"))
    words = ["--from", "-", "--strength", "0.5", "-o", "out.wav", "--format", "float32"]
    assert cli.main(["Rain", *FAST, *words]) == 0
    expected = tiny(
        "Rain", audio="in.wav", strength=0.5, num_inference_steps=2, guidance_scale=2, generator=seeded(1)
    ).audios[0]
    np.testing.assert_array_equal(read_wav("out.wav")[0][0].numpy(), expected)
    out, err = capsys.readouterr()
    assert out == "out.wav: 0.50 s at 16000 Hz, seed 1\n"
    assert err == ""


def test_each_option_is_an_argument_of_the_pipeline(
    tiny: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def called(pipe: AudioLDM2Pipeline, prompt: str, **arguments: Any) -> tuple[Any]:
        calls.append(arguments)
        return (SOUND[None].numpy(),)

    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", called)
    own = {"transcription", "num_waveforms_per_prompt", "generator", "guidance_scale", "negative_prompt"}
    of_sound = {"audio", "sampling_rate", "audio_length_in_s", "num_inference_steps"}
    for words, expected in {
        "--keep 0-0.1 --keep 0.4-": {"keep": [(0.0, 0.1), (0.4, None)]},
        "--replace 0.1-0.2 --replace-band 2000-4000": {
            "replace": [(0.1, 0.2)],
            "replace_band": [(2000.0, 4000.0)],
        },
        "--extend 0.3 --loop": {"extend": 0.3, "loop": True},
        "--windowed-decoding --window 2": {"exact_decoding": False, "window": 2.0},
    }.items():
        assert cli.main(["Rain", *FAST, "--from", "in.wav", "-o", "out.wav", *words.split()]) == 0
        found = calls.pop()
        assert found.keys() - expected.keys() == own | of_sound
        assert {name: found[name] for name in expected} == expected
        assert (found["audio"].shape, found["sampling_rate"], found["audio_length_in_s"]) == (
            (1, len(SOUND)),
            RATE,
            None,
        )
    assert cli.main(["Rain", *FAST, "--loop", "--window", "2", "-o", "out.wav"]) == 0
    assert calls.pop().keys() == own | {"loop", "window", "audio_length_in_s", "num_inference_steps"}


def test_standard_input_is_either_the_sound_or_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("in.txt"))
    code, line = failing(["-", "--from", "-", *FAST], capsys)
    assert code == 2
    assert "standard input is either the prompt or the sound" in line
    monkeypatch.setattr(sys, "stdin", Stdin("in.txt"))
    code, line = failing(["Rain", "--from", "-", *FAST], capsys)
    assert code == 1
    assert "standard input is not a sound file" in line


def test_an_edit_by_inversion(tiny: AudioLDM2Pipeline) -> None:
    words = ["--from", "in.wav", "--invert", "--source-prompt", "Wind", "--skip", "0.5", "--candidates", "2"]
    assert cli.main(["Rain", *FAST, *words, "-o", "out.wav", "--format", "float32"]) == 0
    generator = seeded(1)
    inverted = tiny.invert(
        "in.wav", prompt="Wind", num_inference_steps=2, num_waveforms_per_prompt=2, generator=generator
    )
    expected = tiny(
        "Rain",
        inverted=inverted,
        skip=0.5,
        guidance_scale=2,
        num_waveforms_per_prompt=2,
        generator=generator,
    ).audios[0]
    np.testing.assert_array_equal(read_wav("out.wav")[0][0].numpy(), expected)
    assert cli.main(["Rain", *FAST, "--from", "in.wav", "--invert", "ddim", "-o", "out.wav"]) == 0
    assert read_wav("out.wav")[0].shape == (1, len(SOUND))


def test_adapters_are_named_after_their_folders_and_have_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load_pipeline("tiny")
    for number, name in enumerate(("a/dog", "b/dog")):
        pipe.add_adapter(name, rank=2)
        for parameter in pipe.adapter_parameters(name):
            parameter.data = 0.1 * noise(*parameter.shape, seed=number)
        pipe.save_lora_weights(tmp_path / name, name)
    words = ["--lora", "./a/dog", "--lora", "b/dog/:-0.5", "--duration", "0.64"]
    assert cli.main(["A bell", *FAST, *words, "-o", "out.wav", "--format", "float32"]) == 0
    expected = pipe(
        "A bell",
        adapters={"a/dog": 1.0, "b/dog": -0.5},
        audio_length_in_s=0.64,
        num_inference_steps=2,
        guidance_scale=2,
        generator=seeded(1),
    ).audios[0]
    np.testing.assert_allclose(read_wav("out.wav")[0][0].numpy(), expected, atol=1e-5)
    capsys.readouterr()
    for value, code, reason in (
        ("dog:nan", 2, "argument --lora: must be FOLDER or FOLDER:WEIGHT, got 'dog:nan'"),
        (":1", 2, "argument --lora: must be FOLDER"),
        ("./none:0.5", 1, "none"),
        ("in.wav", 1, "in.wav"),
    ):
        found, line = failing(["A bell", *FAST, "--lora", value, "-o", "other.wav"], capsys)
        assert (found, reason in line) == (code, True), line
    code, line = failing(["serve", "--model", "tiny", "--model", "other", "--lora", "a/dog"], capsys)
    assert code == 2
    assert "an adapter is for one checkpoint" in line
