"""Weights of prompts and words as users write them, on the command line and in batches."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioldm2 import AudioLDM2Pipeline, batch, cli, read_wav
from audioldm2.batch.jobs import Job
from audioldm2.batch.planning import FileOptions, in_groups, plan
from audioldm2.batch.tables import parse_jobs
from audioldm2.prompt_weights import blend_of, check_weights, weights_of
from tests.helpers import load_pipeline, noise, seeded

FAST = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--quiet", "--seed", "1", "--duration", "0.64"]
SHORT = {"num_inference_steps": 2, "guidance_scale": 2.0, "audio_length_in_s": 0.64}


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def generated(pipe: AudioLDM2Pipeline, seed: int, **arguments: Any) -> np.ndarray:
    audio: np.ndarray = pipe(**{**SHORT, **arguments}, generator=seeded(seed)).audios[0]
    return audio


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a bell: 0.3", (("a bell", 0.3),)),
        ("a bell:.3,wind : 1e-1", (("a bell", 0.3), ("wind", 0.1))),
        ("Birds: near, a river: 0.25; a bell: 0.5,", (("Birds: near, a river", 0.25), ("a bell", 0.5))),
        ({"wind": 1, "rain": np.float64(0.5)}, (("wind", 1.0), ("rain", 0.5))),
        ([["wind", 2]], (("wind", 2.0),)),
        ([], ()),
    ],
)
def test_weights_are_text_mappings_or_pairs(value: Any, expected: Any) -> None:
    assert weights_of("blend", value) == expected


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("a bell", ValueError, "blend must be prompts and their weights, .*got 'a bell'"),
        ("a bell: much", ValueError, "got 'a bell: much'"),
        ("", ValueError, "blend must be prompts"),
        (": 0.5", ValueError, "blend must be prompts"),
        ("a: 0.1, a: 0.2", ValueError, "blend has 'a' twice"),
        (3, TypeError, "blend must be prompts and their weights"),
        ([["a"]], ValueError, "blend must be prompts"),
        ([["a", float("nan")]], ValueError, "blend must be prompts"),
        ({"": 0.5}, ValueError, "blend is empty"),
    ],
)
def test_other_weights_are_refused(value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        weights_of("blend", value)


def test_the_prompt_has_the_rest_of_the_weight() -> None:
    assert blend_of("Rain", (("a bell", 0.25), ("wind", 0.25))) == [
        ("Rain", 0.5),
        ("a bell", 0.25),
        ("wind", 0.25),
    ]
    for blend, words, message in (
        ((("a bell", 0.6), ("wind", 0.4)), (), "add up to less than 1.*they are 1 together"),
        ((("a bell", 0.0),), (), "weights above 0, but that of 'a bell' is 0"),
        ((("a bell", 0.5),), (("Rain", 2.0),), "leave out blend"),
        ((), (("Snow", 2.0),), "'Snow', which is not a word of"),
        ((), (("Rain", -1.0),), "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_weights("Rain", blend, words)
    with pytest.raises(ValueError, match="blend does not go with transcription"):
        check_weights("Rain", (("a bell", 0.5),), (), "Hello")


def test_the_options_of_the_command_line(
    tiny: AudioLDM2Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = copy.deepcopy(tiny)  # the command writes its progress bars to its own standard error
    monkeypatch.setattr(AudioLDM2Pipeline, "from_pretrained", lambda *_, **__: loaded)
    blend = tiny.blend([("A bell over rain", 0.6), ("wind", 0.1), ("a siren", 0.3)])
    for words, arguments in (
        (["--blend", "wind: 0.1", "--blend", "a siren: 0.3"], blend),
        (["--word-weights", "bell: 0.5, rain: 2"], {"word_weights": {"bell": 0.5, "rain": 2}}),
    ):
        given = {} if "prompt_embeds" in arguments else {"prompt": "A bell over rain"}
        command = ["A bell over rain", *FAST, *words, "-o", "out.wav", "--format", "float32"]
        assert cli.main(command) == 0
        expected = generated(tiny, 1, **given, **arguments)
        np.testing.assert_allclose(read_wav("out.wav")[0][0].numpy(), expected, atol=1e-5)
    capsys.readouterr()
    for words, message in (
        (["--blend", "wind"], "argument --blend: must be prompts and their weights, as in 'a bell: 0.3"),
        (["--blend", "wind: 1"], "--blend must have weights that add up to less than 1"),
        (["--word-weights", "snow: 2"], "--word-weights has 'snow', which is not a word of"),
        (["--word-weights", "bell: 2", "--blend", "wind: 0.5"], "so leave out --blend"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["A bell", *FAST, *words])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_the_columns_of_a_table(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    text = """prompt,blend,word_weights,seed
A bell,rain: 0.5,,1
A bell,wind: 0.5,,2
A bell,,bell: 2,3
A bell,,,4
A bell,wind: 2,,5
A bell,,rain: 2,6
A bell,loud,,7
"""
    jobs, failures = parse_jobs(io.StringIO(text, newline=""), "csv", "t")
    assert [str(failure).partition(": ")[2] for failure in failures] == [
        "blend must have weights that add up to less than 1, as the prompt has the rest; they are 2 together",
        "word_weights has 'rain', which is not a word of the prompt",
        "blend must be prompts and their weights, as in 'a bell: 0.3, wind: 0.1', got 'loud'",
    ]
    line = '{"prompt": "A bell", "blend": {"rain": 0.5}, "seed": 1}\n'
    assert parse_jobs(io.StringIO(line), "jsonl", "t")[0] == [jobs[0]]
    jobs = [job.with_defaults({"num_inference_steps": 2, "audio_length_in_s": 0.64}) for job in jobs]
    groups = in_groups(plan(jobs, tiny, FileOptions()), batch_size=8)
    # Blends of as many tokens together; the others have a prompt.
    assert [[request.index for request in group.requests] for group in groups] == [[0, 1], [2, 3]]
    report = batch.run(jobs, tiny, tmp_path)
    assert report.failures == []
    assert [sound.get("blend") for sound in report.sounds] == [{"rain": 0.5}, {"wind": 0.5}, None, None]
    for sound, arguments in zip(
        report.sounds,
        [
            tiny.blend([("A bell", 0.5), ("rain", 0.5)]),
            tiny.blend([("A bell", 0.5), ("wind", 0.5)]),
            {"prompt": "A bell", "word_weights": {"bell": 2}},
            {"prompt": "A bell"},
        ],
        strict=True,
    ):
        stored, _ = read_wav(tmp_path / sound["file"])
        assert np.abs(stored[0].numpy() - generated(tiny, sound["seed"], **arguments)).max() <= 1e-4
    # Only what has changed is generated again.
    again = [
        *jobs[:2],
        Job.of({**SHORT, "prompt": "A bell", "word_weights": {"bell": 3}, "seed": 3}),
        jobs[3],
    ]
    assert batch.run(again, tiny, tmp_path).generated == 1


def test_blends_and_inversion_together(tiny: AudioLDM2Pipeline) -> None:
    from audioldm2.editing.generations import with_inverted, with_prompts

    sound = (0.1 * noise(8000)).clamp(-1, 1)
    arguments = {"num_inference_steps": 2, "generator": seeded(), "guidance_scale": 2.0}
    arguments = with_inverted(tiny, arguments, sound, 16000, method="ddpm", source_prompt="", skip=0.5)
    mixed = tiny(**with_prompts(tiny, arguments, ["Rain"], [(("a bell", 0.5),)], [()])).audios
    plain = tiny(**with_prompts(tiny, arguments, ["Rain"], [()], [()])).audios
    assert mixed.shape == plain.shape == (1, 8000)
    assert np.abs(mixed - plain).max() > 1e-4
