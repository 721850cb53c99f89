"""Shell completion, in the shells themselves."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audioldm2 import cli
from audioldm2.cli.completion import SHELLS, script
from tests.helpers import HANGS_AFTER

# What is typed, and what the Tab key makes of it.
COMPLETED = {
    "audioldm2 --sch": "audioldm2 --scheduler",
    "audioldm2 --scheduler dd": "audioldm2 --scheduler ddim",
    "audioldm2 --quality dr": "audioldm2 --quality draft",
    "audioldm2 batch a.csv --unconditional z": "audioldm2 batch a.csv --unconditional zeros",
    "audioldm2 comp": "audioldm2 completion",
    "audioldm2 completion fi": "audioldm2 completion fish",
    "audioldm2 -o so": "audioldm2 -o sound.wav",
    "audioldm2 --model fol": "audioldm2 --model folder",
    "audioldm2 bell --from so": "audioldm2 bell --from sound.wav",
    "audioldm2 bell --dty": "audioldm2 bell --dtype",
    "audioldm2 --steps 3 bell --dtype bf": "audioldm2 --steps 3 bell --dtype bfloat16",
    "audioldm2 generate bell --profile so": "audioldm2 generate bell --profile sound.wav",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for a file and a folder."""
    pytest.importorskip("shtab")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sound.wav").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


def shell(name: str) -> str:
    """The path of an installed shell."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )
    assert done.stderr == ""
    return done.stdout


def test_bash(folder: Path) -> None:
    code = """
eval "$(cat)"
function_name=$(complete -p audioldm2 | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
for line in "$@"; do
    COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $function_name audioldm2
    echo "${COMP_WORDS[@]:0:$COMP_CWORD} ${COMPREPLY[*]}"
done
"""
    found = output(shell("bash"), "-c", code, "bash", *COMPLETED, stdin=script("bash"))
    assert found.splitlines() == list(COMPLETED.values())


def test_fish(folder: Path) -> None:
    Path("script.fish").write_text(script("fish"))
    code = "source script.fish; for line in $argv; complete -C $line; end"
    found = output(shell("fish"), "--no-config", "-c", code, *COMPLETED)
    words = [line.split("\t")[0].rstrip("/") for line in found.splitlines()]
    assert words == [line.rsplit(" ", 1)[1] for line in COMPLETED.values()]


def test_zsh(folder: Path) -> None:
    pty = pytest.importorskip("pty")
    zsh = shell("zsh")
    Path("script.zsh").write_text(script("zsh"))
    # Ctrl-X writes the edited line to a file, and a file appears when the prompt does.
    Path("setup.zsh").write_text("""
autoload -Uz compinit && compinit -u -D
eval "$(<script.zsh)"
report() { print -r -- "$BUFFER" >> lines.txt; BUFFER='' }
zle -N report && bindkey '^X' report
: > lines.txt
""")
    child, terminal = pty.fork()
    if child == 0:
        os.execve(zsh, ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})

    def read_until(ready: int) -> None:
        deadline = time.monotonic() + HANGS_AFTER
        lines = Path("lines.txt")
        while not lines.exists() or lines.read_text().count("\n") < ready:
            assert time.monotonic() < deadline
            if select.select([terminal], [], [], 0.02)[0]:
                os.read(terminal, 65536)  # a full terminal would stop the shell

    try:
        os.write(terminal, b"source setup.zsh\n")
        read_until(0)
        for count, line in enumerate(COMPLETED, 1):
            os.write(terminal, f"{line}\t\x18".encode())
            read_until(count)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    found = [line.rstrip(" /") for line in Path("lines.txt").read_text().splitlines()]
    assert found == list(COMPLETED.values())


def test_the_command_prints_a_script_and_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "tcsh"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert all(name in err for name in SHELLS)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert 'requires shtab: pip install "audioldm2-torch[completion]"' in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash") + "\n"
