"""500 of the corrupted checkpoints that `scripts/fuzz` makes 10,000 of."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.corrupted_checkpoints import KINDS, corrupt, run_case, write_base

# How many cases of each kind. Those that a pipeline is loaded for, rather than one part, take longest.
CASES = {
    "json-value": 45,
    "json-number": 35,
    "json-key": 20,
    "json-text": 25,
    "scheduler": 6,
    "model-index": 40,
    "tokenizer": 40,
    "safetensors-bytes": 55,
    "safetensors-header": 55,
    "tensors": 30,
    "shards": 40,
    "bin": 30,
    "special-file": 25,
    "folders": 5,
    "names": 45,
    "several": 5,
}
SEED = 7
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of settings without effect, for example


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("fuzz") / "base")


def test_there_are_500() -> None:
    assert sum(CASES.values()) >= 500
    assert KINDS.keys() - CASES.keys() == {"values"}  # weights that are not finite load


@pytest.mark.parametrize("kind", CASES)
def test_a_corrupted_checkpoint_loads_or_is_refused(
    base: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a file that is written by accident would be
    wrong = []
    for number in range(CASES[kind]):
        result = run_case(
            corrupt(base, tmp_path / str(number), SEED, number, (kind,)), whole=False, patience=100
        )
        if result.wrong:
            wrong.append(f"{number}: {result.what}: {result.wrong}")
    assert not wrong, "\n".join(wrong)


def test_the_intact_checkpoint_gives_a_sound(base: Path, tmp_path: Path) -> None:
    case = corrupt(base, tmp_path / "case", SEED, 0, ("tensors",))
    result = run_case(case)
    assert (result.outcome, result.wrong) == ("refused", "") or result.outcome == "sound"


def test_what_is_wrong_is_seen(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of the cases itself: another error, a message that names no file, a file that is written."""
    monkeypatch.chdir(tmp_path)
    case = corrupt(base, tmp_path / "case", SEED, 0, ("names",))
    case.name = None

    def failing(error: Exception) -> str:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr("scripts.corrupted_checkpoints.load", load)
        return run_case(case).wrong

    from audioldm2.checkpoints.errors import CheckpointError

    assert failing(CheckpointError(f"{case.folder} is broken")) == ""
    assert "KeyError" in failing(KeyError("x"))
    assert "names no file" in failing(CheckpointError("broken"))
    assert "characters" in failing(CheckpointError(f"{case.folder}: {'x' * 10**5}"))

    def writing(*_: object) -> None:
        (case.folder / "new").touch()

    monkeypatch.setattr("scripts.corrupted_checkpoints.load", writing)
    assert run_case(case, whole=False).wrong == "files were written"
