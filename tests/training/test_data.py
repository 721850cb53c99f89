"""Sounds and captions as training data: excerpts, latents, conditions, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, resample, write_wav
from audioldm2.audio.sound_file import write_sound
from audioldm2.training import data as data_module
from audioldm2.training.data import (
    PEAK,
    Excerpting,
    encode_items,
    read_excerpts,
    training_samples,
)
from audioldm2.training.table import Item
from tests.helpers import load_pipeline, noise

RATE = 16000
HOW = Excerpting(RATE, 8192, keep_level=True)


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def item(path: Path, waveform: torch.Tensor, rate: int = RATE, caption: str = "A bell") -> Item:
    """A row for a waveform, which is written to its file."""
    write_wav(path, waveform, rate, format="float32")
    return Item(path, caption, "t.csv:2")


def test_sounds_are_mixed_resampled_cut_and_padded(tmp_path: Path) -> None:
    stereo = 0.1 * noise(2, 22050)
    (found,) = read_excerpts(item(tmp_path / "a.wav", stereo, 44100), HOW)
    expected = resample(stereo.mean(0), 44100, RATE)
    assert torch.equal(found[:8000], expected)
    assert not found[8000:].any()
    write_sound(tmp_path / "c.flac", (0.1 * noise(9000)).numpy(), RATE)
    (found,) = read_excerpts(Item(tmp_path / "c.flac", "A bell", ""), HOW)
    torch.testing.assert_close(found, 0.1 * noise(9000)[:8192], rtol=0, atol=1e-4)
    (found,) = read_excerpts(item(tmp_path / "b.wav", 0.1 * noise(20000)), HOW)
    assert torch.equal(found, 0.1 * noise(20000)[:8192])


def test_excerpts_of_a_long_file_reach_from_end_to_end(tmp_path: Path) -> None:
    long = 0.1 * noise(40000)
    long[9000:26000] = 0
    row = item(tmp_path / "a.wav", long)
    found = read_excerpts(row, Excerpting(RATE, 8192, excerpts=3, keep_level=True))
    assert torch.equal(found, torch.stack([long[:8192], long[-8192:]])), "the silent one is left out"
    assert len(read_excerpts(row, Excerpting(RATE, 8192, excerpts=99))) == 4


def test_levels_are_those_of_the_original_training_unless_they_are_kept(tmp_path: Path) -> None:
    row = item(tmp_path / "a.wav", 0.01 * noise(8192) + 0.1)
    (found,) = read_excerpts(row, Excerpting(RATE, 8192))
    assert found.abs().max().item() == pytest.approx(PEAK)
    assert found.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a sound", "a.wav is not a sound file"),
        (torch.zeros(16000), "a.wav is silent"),
        (0.1 * noise(80), "a.wav has 5 ms of sound; a clip needs at least 100 ms"),
        (torch.cat([torch.zeros(9000), 0.1 * noise(9000)]), "the excerpts of .*a.wav are silent; take more"),
    ],
)
def test_a_sound_that_cannot_be_used_is_one_line(
    tmp_path: Path, content: bytes | torch.Tensor, message: str
) -> None:
    row = Item(tmp_path / "a.wav", "A bell", "t.csv:2")
    if isinstance(content, bytes):
        row.path.write_bytes(content)
    else:
        write_wav(row.path, content, RATE)
    with pytest.raises(ValueError, match=f"^t.csv:2: .*{message}") as error:
        read_excerpts(row, HOW)
    assert "\n" not in str(error.value)


def test_nan_samples_are_refused(tmp_path: Path) -> None:
    row = item(tmp_path / "a.wav", 0.1 * noise(16000))
    content = bytearray(row.path.read_bytes())
    content[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    row.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 16000 samples in .*a\.wav are NaN"):
        read_excerpts(row, HOW)


def test_the_length_is_the_checkpoint_s_or_that_asked_for(tiny: AudioLDM2Pipeline) -> None:
    assert training_samples(tiny, None) == 81920
    assert training_samples(tiny, 0.6) == 10240, "whole rows of latents: 0.64 s"


def test_latents_and_conditions_are_the_pipeline_s(
    tiny: AudioLDM2Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waveforms = 0.1 * noise(2, 8192)
    items = [
        item(tmp_path / f"{i}.wav", waveforms[i], caption=caption)
        for i, caption in enumerate(("A bell", "Slow rain on a roof"))
    ]
    cache = tmp_path / "cache" / "data.safetensors"
    found = encode_items(tiny, items, HOW, cache)
    torch.testing.assert_close(found.means, tiny.encode_audio(waveforms, RATE), rtol=0, atol=1e-5)
    assert found.spreads.shape == found.means.shape
    assert found.spreads.min() > 0
    assert found.items.tolist() == [0, 1]
    states, mask, vectors = tiny.encode_prompt("A bell", "cpu", 1, True, negative_prompt="")
    for row, side in ((found.texts.uncond[0], 0), (torch.tensor(0), 1)):
        torch.testing.assert_close(found.texts.vectors[row], vectors[side], rtol=0, atol=1e-4)
        own = mask[side].bool()
        torch.testing.assert_close(
            found.texts.states[row, : len(own)][own].float(), states[side][own], rtol=0, atol=5e-3
        )

    # Read again without a computation, and made again when something has changed.
    made: list[int] = []
    encode = data_module.encode_texts

    def counting(pipe: AudioLDM2Pipeline, texts: list[str], **options: object) -> object:
        made.append(len(texts))
        return encode(pipe, texts)

    monkeypatch.setattr(data_module, "encode_texts", counting)
    again = encode_items(tiny, items, HOW, cache)
    assert made == []
    assert torch.equal(again.means, found.means)
    assert torch.equal(again.texts.states, found.texts.states)
    assert again.digest == found.digest
    digests = {found.digest}
    digests.add(encode_items(tiny, [items[0], items[1]._replace(caption="Rain")], HOW, cache).digest)
    item(tmp_path / "0.wav", 0.5 * waveforms[0])
    digests.add(encode_items(tiny, items, HOW, cache).digest)
    with torch.no_grad():
        tiny.vae.encoder.conv_in.bias.add_(0.1)
    digests.add(encode_items(tiny, items, HOW, cache).digest)
    cache.write_bytes(cache.read_bytes()[:1000])  # a damaged file
    digests.add(encode_items(tiny, items, HOW, cache).digest)
    assert len(made) == len(digests) == 4
