"""docs/finetuning.md: its snippets run as they are printed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from audioldm2 import cli, write_wav
from audioldm2.checkpoints.hub import TINY_FOLDER
from audioldm2.cli import finetune
from scripts.pages import BLOCK
from tests.helpers import ROOT, noise

PAGE = ROOT / "docs" / "finetuning.md"
# The runs of the page, at toy size.
TOY = (
    *("--steps", "2", "--batch-size", "2", "--duration", "0.64"),
    *("--device", "cpu", "--precision", "float32", "--quiet"),
)


def test_commands_and_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_FOLDER, "cvssp/audioldm2")
    Path("cvssp/audioldm2/audioldm2.json").write_text('{"recommended": {"num_inference_steps": 2}}')
    names: dict[str, object] = {}
    commands = 0
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        code = block["code"]
        if block["kind"] == "csv":
            Path("data.csv").write_text(code, encoding="utf-8")
            for i in (1, 2, 3):
                write_wav(f"door-{i}.wav", 0.1 * noise(12000, seed=i), 16000)
        elif block["kind"] == "python":
            code = code.replace("steps=500", "steps=2, batch_size=2, duration=0.64")
            code = code.replace(
                "generator=seed", "generator=seed, num_inference_steps=2, audio_length_in_s=0.64"
            )
            exec(compile(code, PAGE.name, "exec"), names)
        for line in code.splitlines() if block["kind"] == "bash" else []:
            words = shlex.split(line, comments=True)
            words = words[words.index("audioldm2") + 1 :]
            if line.startswith("accelerate"):  # its launcher is tested where there is time for it
                finetune.parse(finetune.parser(), words[1:])
            else:
                assert cli.main([*words, *TOY]) == 0
            commands += 1
    assert commands == 3
    assert (tmp_path / "my-door" / "training" / "samples" / "step-000002-1.wav").is_file()
    assert (tmp_path / "my-model" / "model_index.json").is_file()
    assert len(names["creak"]) > 9000
    assert names["result"].examples == 2
