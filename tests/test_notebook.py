"""How outputs and pipelines look in a notebook."""

from __future__ import annotations

import base64
import io
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, AudioPipelineOutput, read_wav
from audioldm2.extras import install_hint
from tests.helpers import ROOT, load_pipeline

RATE = 16000


class Page(HTMLParser):
    """The text of some HTML and the sources of its sounds and images; every tag must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[str] = []
        self.sources: dict[str, list[bytes]] = {"audio": [], "img": []}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "img"):
            self.open.append(tag)
        if tag in self.sources:
            values = dict(attributes)
            assert "controls" in values or values["alt"]
            kind, _, content = str(values["src"]).partition(";base64,")
            assert kind == {"audio": "data:audio/wav", "img": "data:image/png"}[tag]
            self.sources[tag].append(base64.b64decode(content, validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(audios: Any, scores: Any = None, rate: int = RATE) -> Page:
    return Page(AudioPipelineOutput(audios, rate, scores)._repr_html_())


def test_every_sound_has_a_player_a_picture_and_its_score(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    sounds = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 3000)).astype(np.float32)
    shown = page(sounds, np.array([0.75, -0.5]))
    assert shown.texts == ["1 of 2: 0.19 s, score 0.750", "2 of 2: 0.19 s, score -0.500"]
    for wav, expected in zip(shown.sources["audio"], sounds, strict=True):
        (tmp_path / "a.wav").write_bytes(wav)
        waveform, rate = read_wav(tmp_path / "a.wav")
        assert rate == RATE
        assert np.abs(waveform[0].numpy() - expected).max() <= 2**-16 + 1e-9
    pictures = [image.imread(io.BytesIO(png), format="png") for png in shown.sources["img"]]
    assert [picture.shape for picture in pictures] == [(378, 630, 4)] * 2
    assert not np.array_equal(*pictures)


def test_few_and_short_sounds_are_shown_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audioldm2.notebook._plot", lambda *_: "")
    shown = page(torch.zeros(11, 160), torch.full((11,), 0.25))
    assert shown.texts[7] == "8 of 11: 0.01 s, score 0.250"
    assert len(shown.sources["audio"]) == 8
    assert shown.texts[-1] == (
        "3 of 11 sounds, 0.01 s each, are not shown here; write_wav writes them to files."
    )
    minute = page(np.zeros((3, 1000 * 50), np.float32), rate=1000)
    assert len(minute.sources["audio"]) == 2
    assert minute.texts[-1].startswith("1 of 3 sounds, 50.00 s each")
    hour = page(np.zeros((1, 3_600_000), np.float32), rate=1000)
    assert hour.sources["audio"] == []
    assert hour.texts == [
        "1 of 1 sounds, 3600.00 s each, are not shown here; write_wav writes them to files."
    ]


def test_latents_and_other_things_are_described_and_escaped() -> None:
    shown = page(torch.zeros(1, 8, 40, 16))
    assert shown.texts == [repr(AudioPipelineOutput(torch.zeros(1, 8, 40, 16), RATE))]
    assert "Tensor of shape (1, 8, 40, 16)" in shown.texts[0]
    assert (
        page("<script>alert(1)</script> & co")
        .texts[0]
        .startswith("AudioPipelineOutput(audios=<script>alert(1)</script> & co")
    )
    with pytest.raises(ValueError, match="1 of 5 samples in audio are NaN or infinite"):
        page(np.array([[0, 0, np.nan, 0, 0]]))


def test_without_matplotlib_there_are_players_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = page(np.zeros((2, 100)))
    assert (len(shown.sources["audio"]), shown.sources["img"]) == (2, [])
    assert shown.texts[2:] == [f"No plots: plotting requires matplotlib: {install_hint('plot')}"]


def test_the_repr_of_a_pipeline_lists_parts_sizes_device_and_dtype() -> None:
    pipe = load_pipeline("tiny")
    first, *parts = repr(pipe).splitlines()
    total = sum(p.numel() for stage in pipe.stages.values() for p in stage.parameters())
    assert first == f"AudioLDM2Pipeline 'tiny' on cpu, float32, {total / 1e6:.1f} M parameters"
    assert [line.split()[0] for line in parts] == [f"{name}:" for name in pipe.components]
    count = sum(p.numel() for p in pipe.projection_model.parameters())
    assert f"  projection_model: ProjectionModel, {count / 1e3:.1f} k parameters" in parts
    assert "  tokenizer_2: T5Tokenizer" in parts or "  tokenizer_2: T5TokenizerFast" in parts
    pipe.vae.to(torch.bfloat16)
    pipe.unet.to("meta")
    assert repr(AudioLDM2Pipeline(**pipe.components)).startswith("AudioLDM2Pipeline on meta, float32, ")
    assert "VAE, 0.3 M parameters, bfloat16, on cpu" in repr(pipe)


NOTEBOOK = """
import torch
from audioldm2 import AudioLDM2Pipeline
pipe = AudioLDM2Pipeline.from_pretrained("tiny")
# %%
output = pipe("A bell over rain", num_waveforms_per_prompt=2, **pipe.recommended)
# %%
output
# %%
from audioldm2.plots import plot_sound
plot_sound(output.audios[0], output.sampling_rate)
"""


@pytest.mark.slow
def test_a_real_notebook_shows_one_line_players_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK.split("# %%\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    loading, generating, showing, plotting = (cell.outputs for cell in notebook.cells)
    assert loading == []
    (line,) = generating
    assert line.data["text/plain"].startswith("Denoising: 100%")
    assert "\n" not in line.data["text/plain"]
    assert len(Page(showing[0].data["text/html"]).sources["audio"]) == 2
    assert base64.b64decode(plotting[0].data["image/png"]).startswith(b"\x89PNG")
