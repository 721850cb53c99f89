"""Embeddings and scores of sounds, log-mel distances, and `audioldm2 evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, LogMel, cli, resample, write_wav
from audioldm2.audio.sound_file import write_sound
from audioldm2.metrics import (
    ClapScorer,
    clap_scores,
    embed_sounds,
    embed_texts,
    evaluate,
    frechet_distance,
    log_mel_distance,
    spectrogram_distance,
)
from audioldm2.metrics.clap import windows
from tests.helpers import load_pipeline, noise

RATE = 16000
CAPTIONS = ["a steady tone", "white noise", "a bell", "rain", "a siren"]


@pytest.fixture(scope="module")
def clap() -> ClapScorer:
    scorer = ClapScorer.from_pretrained("tiny")
    scorer.set_progress_bar_config(disable=True)
    return scorer


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def sounds(count: int = 5, seed: int = 0, seconds: float = 0.64) -> Tensor:
    """Noise of several levels and colors, (count, samples)."""
    white = noise(count, int(seconds * RATE), seed=seed)
    smooth = F.avg_pool1d(white[:, None], 9, 1, 4)[:, 0]
    share = torch.linspace(0, 1, count)[:, None]
    return 0.1 * (share * white + (1 - share) * smooth)


def folder(path: Path, waveforms: Tensor, suffix: str = ".wav", rate: int = RATE) -> Path:
    path.mkdir()
    for i, waveform in enumerate(waveforms):
        write_sound(path / f"{i}{suffix}", waveform, rate)
    return path


# --- embeddings


def test_scores_are_those_with_which_the_pipeline_ranks(tiny: AudioLDM2Pipeline, clap: ClapScorer) -> None:
    audio = sounds(3)
    texts = embed_texts(tiny, "rain")
    _, ranked = tiny.rank(audio, texts)
    found = clap_scores(tiny, ["rain"] * 3, audio, RATE)
    assert torch.allclose(found.sort(descending=True).values, ranked, atol=1e-5)
    assert torch.allclose(clap_scores(clap, ["rain"] * 3, audio.numpy(), RATE), found, atol=1e-6)
    with pytest.raises(ValueError, match="1 captions for 3 sounds"):
        clap_scores(clap, "rain", audio, RATE)


def test_sounds_are_read_in_every_form(clap: ClapScorer, tmp_path: Path) -> None:
    audio = sounds(10)
    expected = embed_sounds(clap, audio, RATE)
    assert expected.shape == (10, 64)
    assert expected.dtype == torch.float32
    assert torch.allclose(expected.norm(dim=1), torch.ones(10))
    stereo = torch.stack([audio[1], audio[1]])
    faster = resample(audio[2], RATE, 32000)
    write_wav(tmp_path / "a.wav", faster, 32000, format="float32")
    mixed = embed_sounds(clap, [audio[0].numpy(), stereo, tmp_path / "a.wav", audio[3][:5000]], RATE)
    assert torch.allclose(mixed[:2], expected[:2], atol=1e-5)
    assert (mixed[2] @ expected[2]) > 0.99  # the upper end of the band is not the same
    assert torch.allclose(embed_sounds(clap, audio[4], RATE), expected[4:5], atol=1e-5)
    narrow = embed_sounds(clap, audio[4:5], RATE, resample_to=4000)
    assert (narrow[0] @ expected[4]) < 0.99
    with pytest.raises(ValueError, match=r"sounds\[1\] is silent"):
        embed_sounds(clap, torch.stack([audio[0], 0 * audio[1]]), RATE)
    with pytest.raises(ValueError, match="sounds needs its sampling_rate"):
        embed_sounds(clap, audio)


def test_a_long_sound_is_the_mean_of_its_windows(clap: ClapScorer) -> None:
    found = windows(torch.arange(25.0), 10)
    assert found[:, 0].tolist() == [0, 8, 15]  # 7.5 is rounded to even
    assert windows(torch.arange(9.0), 10).shape == (1, 9)
    assert windows(torch.arange(25.0), None).shape == (1, 25)
    length = clap.feature_extractor.nb_max_samples
    long = 0.1 * noise(length * 3 // 2, seed=3)
    whole = embed_sounds(clap, long, RATE)
    parts = embed_sounds(clap, windows(long, length), RATE)
    assert torch.allclose(whole[0], F.normalize(parts.mean(0), dim=0), atol=1e-5)
    assert torch.equal(embed_sounds(clap, long, RATE), whole), "no excerpt is drawn at random"


# --- log-mel distance


def test_the_log_mel_distance_is_in_decibels() -> None:
    audio = sounds(2)
    assert torch.allclose(log_mel_distance(audio / 2, audio, RATE), torch.full((2,), 20 * math.log10(2)))
    assert log_mel_distance(audio, audio.numpy(), RATE).tolist() == [0, 0]
    mel, other = LogMel()(audio, RATE), LogMel()(sounds(2, 1), RATE)
    expected = (20 / math.log(10)) * (mel - other).square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(log_mel_distance(audio, sounds(2, 1), RATE), expected, rtol=1e-4)
    # What is 80 dB below the maximum of the reference counts as silence.
    reference = torch.full((1, 1, 4, 4), -20.0)
    reference[0, 0, 0, 0] = 0.0
    louder = reference.maximum(torch.tensor(-10.0))
    assert spectrogram_distance(louder, reference).item() == 0
    with pytest.raises(ValueError, match="they must be equal"):
        log_mel_distance(audio, audio[:, 1:], RATE)


# --- all at once


@pytest.mark.filterwarnings("default:.* sounds are few")
def test_evaluate_composes_the_figures(clap: ClapScorer) -> None:
    audio, real = sounds(), sounds(6, seed=1)
    embedded = embed_sounds(clap, real, RATE)
    found = evaluate(
        clap,
        audio.numpy(),
        RATE,
        reference_embeddings=embedded,
        captions=["rain", ["rain", "white noise"], None, "a bell", []],
        originals=[audio[0] / 2, None, audio[2], audio[3][:-100], audio[4]],
    )
    again = evaluate(clap, audio, RATE, reference=real)
    assert found.frechet is not None
    assert found.frechet.value == frechet_distance(embed_sounds(clap, audio, RATE), embedded)
    assert again.kernel == found.kernel
    assert found.frechet.spread > 0
    assert found.references == 6
    assert found.halves is not None
    assert found.halves.count == 3
    one, two, none, _, empty = found.clap_scores
    assert none is None
    assert empty is None
    both = clap_scores(clap, ["rain", "white noise"], [audio[1], audio[1]], RATE)
    assert two == pytest.approx(both.mean().item(), abs=1e-5)
    known = [score for score in found.clap_scores if score is not None]
    assert found.clap is not None
    assert (found.clap.value, found.clap.count) == (pytest.approx(np.mean(known)), 3)
    assert found.clap.spread == pytest.approx(np.std(known, ddof=1) / 3**0.5)
    assert found.log_mel is not None
    assert found.log_mel.count == 4
    assert found.log_mel_distances[0] == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert found.log_mel_distances[1] is None
    assert found.log_mel_distances[3] == 0
    json.dumps(found.as_dict(), allow_nan=False)
    single = evaluate(clap, audio[:1], RATE, captions=["rain"]).as_dict()
    assert single["clap"]["spread"] is None
    assert single["clap"]["value"] == pytest.approx(one, abs=1e-5)


def test_what_evaluate_refuses(clap: ClapScorer) -> None:
    audio = sounds(2)
    for arguments, message in [
        ({"captions": ["rain"]}, "captions must have one entry for each of the 2 sounds"),
        ({"captions": "ab"}, "captions must have one entry"),
        ({"originals": audio[:1]}, "originals must have one entry"),
        ({"originals": [audio[0], audio[1][:5000]]}, "differ in length"),
        ({"reference": audio, "reference_embeddings": audio}, "not both"),
        ({"reference": audio[:1]}, "reference has 1 embeddings"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(clap, audio, RATE, **arguments)
    with pytest.raises(TypeError, match=r"captions\[0\] must be a text"):
        evaluate(clap, audio, RATE, captions=[[3], "rain"])


# --- the command


@pytest.mark.filterwarnings("default:.* sounds are few")
def test_the_command_measures_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path / "made", sounds())
    real = folder(tmp_path / "real", resample(sounds(6, seed=1), RATE, 32000), rate=32000)
    (real / "0.wav").rename(real / "x.wav")
    (real / "notes.txt").write_text("not a sound")
    rows = "\n".join(f"{i}.wav,{text}" for i, text in enumerate(CAPTIONS[:4]))
    (made / "metadata.csv").write_text(f"file_name,caption\n{rows}\n0.wav,a tone\n")
    options = ["--model", "tiny", "--device", "cpu", "--threads", "1", "--rate", "16000"]
    words = ["evaluate", str(made), "--reference", str(real), "--paired", *options]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for line, name, end in zip(
        lines[1:],
        (
            "Fréchet distance",
            "  reference in halves",
            "kernel distance",
            "CLAP score",
            "log-mel distance, dB",
        ),
        ("5 and 6 of the reference", "3 and as many", "5 and 6 of the reference", "4", "4"),
        strict=True,
    ):
        assert line.startswith(name)
        assert line.endswith(f"  {end}")
    assert "warning: 5 sounds are few" in err
    assert "Embedding sounds" in err

    assert cli.main([*words, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['frechet']['value']:.3f}" in lines[1]
    assert found["sounds"][4] == {
        "file": "4.wav",
        "clap_score": None,
        "log_mel_distance": pytest.approx(found["sounds"][4]["log_mel_distance"]),
    }
    assert found["sounds"][0]["log_mel_distance"] is None

    # A batch's manifest comes before a metadata.csv, and --captions before both.
    records = [{"file": f"{i}.wav", "prompt": "rain", "key": "", "sha256": ""} for i in range(2)]
    (made / "manifest.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "t.csv").write_text("file_name,caption\n3.wav,rain\n")
    for more, count in (([], 2), (["--captions", str(tmp_path / "t.csv")], 1)):
        assert cli.main(["evaluate", str(made), *options, *more, "--json", "--quiet"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["clap"]["count"] == count
        assert found["frechet"] is None


def test_folders_that_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, one = folder(tmp_path / "made", sounds(2)), folder(tmp_path / "one", sounds(1))
    other = folder(tmp_path / "other", sounds(2))
    (tmp_path / "empty").mkdir()
    for file in other.iterdir():
        file.rename(other / f"other-{file.name}")
    (tmp_path / "t.csv").write_text("file_name,caption\n9.wav,rain\n")
    empty, missing = str(tmp_path / "empty"), str(tmp_path / "missing")
    for words, message in [
        ([], "the folder is missing"),
        ([str(made), "more"], "unrecognized arguments: more"),
        ([missing], f"argument FOLDER: {missing} is not there"),
        ([empty], "has no sound files (.wav"),
        ([str(made)], "nothing to compare with: give --reference, or captions of"),
        ([str(made), "--reference", empty], "argument --reference: "),
        ([str(made), "--reference", str(one)], "argument --reference: a distance needs at least 2 sounds"),
        ([str(one), "--reference", str(made)], "argument FOLDER: a distance needs at least 2 sounds"),
        ([str(made), "--paired"], "argument --paired: say with which folder"),
        ([str(made), "--reference", str(other), "--paired"], "no file has the same name in both"),
        ([str(made), "--captions", str(tmp_path / "t.csv")], "there is no file"),
        ([str(made), "--reference", str(other), "--device", "cuda:99"], "argument --device"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", *words, "--model", "tiny"])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    words = [
        "evaluate",
        str(made),
        "--reference",
        str(other),
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--quiet",
    ]
    write_wav(made / "0.wav", torch.zeros(9000), RATE)
    assert cli.main(words) == 1
    assert "0.wav is silent" in capsys.readouterr().err
    (made / "0.wav").write_bytes(b"RIFF0000WAVEjunk")
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "0.wav" in err
    assert err.count("\n") == 1
