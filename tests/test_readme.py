"""Every snippet of the README runs as it is printed."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import matplotlib
import pytest

from audioldm2 import cli
from tests.helpers import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory where cvssp/audioldm2 is a small checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(random_checkpoint, folder / "cvssp" / "audioldm2")
    return folder


def test_python_snippets_and_audioldm2_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the README, as later snippets use names and files of earlier ones."""
    monkeypatch.chdir(folder)
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    python = commands = 0
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
            python += 1
        if language == "csv":
            Path("prompts.csv").write_text(code)
        for line in code.splitlines() if language == "bash" else []:
            words = shlex.split(line, comments=True)
            if words[:1] == ["audioldm2"] and "--help" not in words:
                fast = ["--quiet", "--device", "cpu", "--steps", "2"]  # the snippets in Python take all steps
                assert cli.main([*words[1:], *fast]) == 0
                commands += 1
    assert python >= 5
    assert commands >= 6
    assert (folder / "A rising sweep.wav").stat().st_size > 100_000
    assert len(list((folder / "sounds").glob("*.wav"))) == 6
    assert len(list((folder / "sounds").glob("*.flac"))) == 6
    assert names["noise"].shape == (1, 4, 64, 16)
    assert len(names["seen"]) == 10


def test_the_scripts_that_are_named_exist() -> None:
    named = {word for _, code in BLOCKS for word in code.split() if word.startswith("scripts/")}
    assert len(named) >= 4
    for name in named:
        assert (ROOT / name).is_file(), name


def test_files_that_are_linked_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) > 15
    for target in targets:
        assert (ROOT / target).exists(), target
