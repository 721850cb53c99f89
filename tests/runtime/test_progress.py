"""Progress bars in a notebook that has no widgets."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from audioldm2 import AudioLDM2Pipeline
from audioldm2.runtime.progress import NotebookScreen, notebook_screen
from tests.helpers import load_pipeline, sound


class Cell:
    """The outputs of a notebook cell, by display_id, as IPython.display changes them."""

    def __init__(self) -> None:
        self.outputs: dict[str, str] = {}
        self.updates = 0

    def display(self, data: dict[str, str], raw: bool, display_id: str) -> None:
        assert raw
        assert display_id not in self.outputs
        self.outputs[display_id] = data["text/plain"]

    def update_display(self, data: dict[str, str], raw: bool, display_id: str) -> None:
        assert raw
        assert display_id in self.outputs
        self.outputs[display_id] = data["text/plain"]
        self.updates += 1


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """As if this were a notebook without ipywidgets, which is what tqdm.auto found at its import."""

    class Shell:
        pass

    made = Cell()
    ipython = SimpleNamespace(get_ipython=Shell, display=made)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace(ZMQInteractiveShell=Shell))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    for name in ("QT_API", "SPYDER_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture(scope="module")
def loaded() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture
def tiny(loaded: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    loaded.set_progress_bar_config(mininterval=0)
    return loaded


def test_a_generation_leaves_one_line(
    tiny: AudioLDM2Pipeline, cell: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("audioldm2.decoding.FRAMES_AT_ONCE", 8)  # sounds are decoded one by one, in chunks
    sound(tiny, num_waveforms_per_prompt=2, num_inference_steps=4)
    (text,) = cell.outputs.values()
    assert text.startswith("Denoising: 100%|██████████| 4/4 [")
    assert "\n" not in text
    assert cell.updates > 10, "nothing was shown while it ran"
    assert capsys.readouterr() == ("", "")
    tiny.set_progress_bar_config(leave=True)
    sound(tiny)
    text = [*cell.outputs.values()][1]
    names = [line.partition(":")[0] for line in text.splitlines()]
    assert names == ["Encoding text", "Denoising", "Decoding", "Vocoding"]


def test_a_generation_in_a_callback_has_its_bars_below(tiny: AudioLDM2Pipeline, cell: Cell) -> None:
    seen = []

    def inner(step: int, *_: Any) -> None:
        sound(tiny)
        seen.append([*cell.outputs.values()][-1])

    sound(tiny, callback=inner, callback_steps=2)
    (text,) = cell.outputs.values()
    assert [line.partition(":")[0] for line in seen[0].splitlines()] == ["Denoising", "Denoising"]
    assert text.splitlines()[-1].startswith("Denoising: 100%|██████████| 2/2 [")


def test_bars_outside_of_a_generation_stay(tiny: AudioLDM2Pipeline, cell: Cell) -> None:
    for _ in tiny.progress_bar(range(3)):
        pass
    with tiny.progress("Sounds", 2, unit=" sound") as bar:
        bar.update(2)
    tiny.set_progress_bar_config(disable=True)
    sound(tiny)
    first, second = cell.outputs.values()
    assert first.startswith("100%|██████████| 3/3 [")
    assert second.startswith("Sounds: 100%|██████████| 2/2 [")
    assert second.endswith("sound/s]")


def test_elsewhere_bars_go_to_standard_error(
    tiny: AudioLDM2Pipeline, cell: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(notebook_screen(), NotebookScreen)
    monkeypatch.setenv("QT_API", "pyqt6")  # a console
    assert notebook_screen() is None
    monkeypatch.delenv("QT_API")
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert notebook_screen() is None
    monkeypatch.delitem(sys.modules, "IPython")
    sound(tiny)
    assert cell.outputs == {}
    assert "Vocoding: 100%" in capsys.readouterr().err


def test_a_screen_is_a_small_terminal() -> None:
    cell = Cell()
    screen = NotebookScreen(cell)
    screen.flush()
    screen.write("\rone  \n\rtwo\n\x1b[A\x1b[A\ronly")
    screen.flush()
    assert [*cell.outputs.values()] == ["only\ntwo"]
    screen.write("\n\r   \r")
    screen.flush()
    screen.flush()
    assert ([*cell.outputs.values()], cell.updates) == (["only"], 2)
