"""The command `audioldm2 batch`, killed at random moments and started again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from audioldm2.batch.manifest import MANIFEST, read_manifest
from tests.helpers import HANGS_AFTER, ROOT, run_python

SOUNDS = 200
KILLS = 50


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    kinds = ("Rain", "Wind", "A low steady tone", "A rising sweep", "A slow drum beat")
    table = tmp_path / "prompts.jsonl"
    rows = [{"prompt": kinds[i % len(kinds)], "seed": i} for i in range(SOUNDS)]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = tmp_path / "sounds"
    command = [
        *("-m", "audioldm2", "batch", str(table), "-o", str(folder), "--model", "tiny", "--device", "cpu"),
        *("--steps", "2", "--duration", "0.64", "--batch-size", "2", "--quiet"),
    ]
    random.seed(0)
    known: dict[str, dict] = {}
    kills = lost = 0
    while kills < KILLS:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            # The number of threads of `run_python`, which has a say in the last bits.
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        # Half of the kills wait until this process has finished a sound, so that the batch gets on.
        if kills % 2:
            while len(read_manifest(folder / MANIFEST)[0]) == len(known) and process.poll() is None:
                time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1 if kills % 2 else 6))
        assert process.poll() is None, "finished before it was killed; give it more to do"
        process.send_signal(signal.SIGKILL)
        process.wait(HANGS_AFTER)
        kills += 1
        found, _ = read_manifest(folder / MANIFEST)
        lost += sum(found.get(file) != record for file, record in known.items())
        known = found
    assert lost == 0
    assert 0 < len(known) < SOUNDS
    # The rest is made, and nothing else.
    done = run_python(*command, cwd=tmp_path)
    kept = len(known)
    assert done.stdout == f"{folder}: {SOUNDS} sounds, {SOUNDS - kept} new, {kept} already there\n"
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *(line["file"] for line in lines)}
    assert [line["seed"] for line in lines] == list(range(SOUNDS)), "lost, doubled or out of order"
    for line in lines:
        assert hashlib.sha256((folder / line["file"]).read_bytes()).hexdigest() == line["sha256"]
    # The bits are those of a batch that was not killed.
    whole = tmp_path / "whole"
    run_python(*[str(whole) if word == str(folder) else word for word in command], cwd=tmp_path)
    others = [json.loads(line) for line in (whole / MANIFEST).read_text().splitlines()]
    assert [(line["file"], line["sha256"]) for line in others] == [
        (line["file"], line["sha256"]) for line in lines
    ]
