"""The dispatcher: help of all commands, words that look like a command, prompts from files, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from audioldm2 import cli
from audioldm2.cli import generate
from audioldm2.cli.commands import COMMANDS, hint
from tests.helpers import HANGS_AFTER, ROOT, run_python

HELP = """
import contextlib, io, json, sys, time
from audioldm2.cli import main
found = {}
for name in json.loads(sys.argv[1]):
    out, start = io.StringIO(), time.process_time() if found else 0.0
    try:
        with contextlib.redirect_stdout(out):
            main([*([name] if name else []), "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    found[name] = (out.getvalue(), time.process_time() - start)
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.parametrize("columns", ["40", "200"])
def test_every_help_fits_80_columns_and_needs_no_torch(columns: str) -> None:
    done = run_python("-c", HELP, json.dumps(["", *COMMANDS]), COLUMNS=columns)
    for name, (text, seconds) in json.loads(done.stdout).items():
        assert text.startswith(f"usage: audioldm2 {name}".rstrip() if name != "generate" else "usage: ")
        assert max(map(len, text.splitlines())) <= 80
        assert "examples:" in text
        assert seconds < 0.5, "of the processor"
        assert name or all(f"audioldm2 {command} " in text for command in COMMANDS)


def test_words_that_look_like_a_command() -> None:
    for words, expected in [
        (
            ["generat", "rain"],
            "did you mean: audioldm2 generate rain? A prompt of several words needs quotes",
        ),
        (["Generate", "-"], "did you mean: audioldm2 generate -?"),
        (["help"], 'for help: audioldm2 --help; for a sound: audioldm2 generate "help"'),
        (["help", "generat"], "for help: audioldm2 generate --help"),
        (["generate-help"], "for help: audioldm2 generate --help"),
        (["generate", "x"], "the command comes first: audioldm2 generate x"),
    ]:
        found = hint(words)
        assert found is not None
        assert expected in found
    for prompt in (["generat"], ["generat", "-o", "a.wav"], ["a", "bell"], ["self-help"], ["--help"], ["-"]):
        assert hint(prompt) is None


def test_the_hint_comes_before_errors_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generat", "a.csv", "--format", "mp3"], ["--quiet", "generate", "a.csv"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "audioldm2 generate a.csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--", "-bell", "--model", "tiny"])
    assert 'write --model and what belongs to it before the "--"' in capsys.readouterr().err


class Stdin(io.TextIOWrapper):
    """Standard input with these bytes."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))


def test_a_prompt_is_read_from_a_file_or_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_bytes("\ufeff\r\n  Regen auf Blech, außen \r\n".encode())
    read: list[str] = []
    monkeypatch.setattr(generate, "run", lambda parser, options: read.append(options.prompt) or 0)
    assert cli.main(["--from-file", "prompt.txt"]) == 0
    for arguments in (["-"], ["generate", "-o", "a.wav", "-"], ["--from-file", "-"]):
        monkeypatch.setattr(sys, "stdin", Stdin(b"A bell"))
        assert cli.main(arguments) == 0
    assert read == ["Regen auf Blech, außen", "A bell", "A bell", "A bell"]

    terminal, side = pty.openpty()
    os.write(terminal, b"A typed bell\nnot this\n")
    with open(side, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(["-"]) == 0
    os.close(terminal)
    assert read[4:] == ["A typed bell"]
    assert "describe the sound in one line, then press Enter" in capsys.readouterr().err
    assert cli.main(["generate", "generate"]) == 0
    assert read[5:] == ["generate"]


def test_prompts_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "run", lambda parser, options: 0)
    for data, expected in {
        b"": "standard input is empty",
        b" \n\t\n": "standard input is empty",
        b"\xff\xfe\x00": "standard input is not a text file in UTF-8",
        b"a\0b": "standard input is not a text file in UTF-8",
        b"a\nb\n": "several lines; a prompt is one line. audioldm2 batch makes a sound for each",
        "ä".encode() * 60_000: "larger than 100,000 bytes",
    }.items():
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        with pytest.raises(SystemExit) as stop:
            cli.main(["-"])
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bell", "--from-file", "-"])
    assert "give the prompt or --from-file, not both" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    for name, expected in {".": "Is a directory", "nothing": "No such file", "-": "input is closed"}.items():
        assert cli.main(["--from-file", name]) == 1
        assert expected in capsys.readouterr().err


# Modules that take the place of the real ones, and are interrupted while they are imported.
SLEEPING = "import sys, time\nprint('here', file=sys.__stderr__, flush=True)\ntime.sleep(600)\n"
CONVERTING = f"""
try:
    {SLEEPING.replace(chr(10), chr(10) + "    ")}
except KeyboardInterrupt:
    raise ImportError("initialization failed") from None
"""


@pytest.mark.parametrize(
    ("module", "source", "commands"),
    [("textwrap", SLEEPING, COMMANDS), ("torch", SLEEPING, ["bell"]), ("torch", CONVERTING, ["bell"])],
    ids=["first imports", "torch", "torch, which turns it into an error"],
)
def test_ctrl_c_during_the_imports(module: str, source: str, commands: list[str], tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(source)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "audioldm2", command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for command in commands
    ]
    for process in processes:
        assert process.stderr is not None
        assert process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS_AFTER)
        assert process.returncode == 130
        assert out == ""
        assert err.startswith("audioldm2: error: interrupted")
        assert len(err.splitlines()) == 1


def test_help_into_a_closed_pipe_prints_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m audioldm2 --help | true', sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("", "")
