"""Batches of edits: where sounds are read from, what changes with them, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from audioldm2 import AudioLDM2Pipeline, batch, cli, read_wav, write_wav
from audioldm2.batch import Job, read_jobs
from audioldm2.batch.planning import FileOptions, in_groups, plan
from audioldm2.batch.tables import parse_jobs
from tests.batch.test_running import fake_engine
from tests.helpers import load_pipeline, noise, seeded

RATE = 16000
TABLE = """\
prompt,from,strength,keep,extend,loop,steps,name,invert,source_prompt
Rain,in/a.wav,0.5,,,,2,,,
Wind,in/b.wav,0.5,,,no,2,,,
Rain,in/long.wav,0.5,,,,2,,,
Rain,in/a.wav,,"0-0.1, 0.3-",,,2,,,
Rain,in/a.wav,,,0.3,yes,2,,,
Rain,,,,,,2,plain,,
Rain,in/a.wav,,,,,2,inverted,ddpm,Wind
"""


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table, beside the folder of its sounds."""
    (tmp_path / "in").mkdir()
    for seed, (name, samples) in enumerate({"a": 6000, "b": 6000, "long": 8000}.items()):
        write_wav(tmp_path / "in" / f"{name}.wav", (0.1 * noise(samples, seed=seed)).clamp(-1, 1), RATE)
    path = tmp_path / "edits.csv"
    path.write_text(TABLE)
    return path


def test_cells_of_edits(tmp_path: Path) -> None:
    text = (
        "prompt,from,keep,replace_band,loop,exact_decoding,skip,invert,source_prompt\n"
        'Rain,a.wav,"0-2.5; 4-",1000-2000 4000-8000,0,False,,,\n'
        "Rain,/b.wav,,,,yes,0.4,ddpm,Wind\n"
        "Rain,,,,true,,,,\n"
        "Rain,a.wav,4,,,,,,\n"
        "Rain,,0-1,,,,,,\n"
        "Rain,a.wav,,,maybe,,,,\n"
        "Rain,a.wav,0-1,,true,,,,\n"
        "Rain,a.wav,,,,,0.4,,\n"
        "Rain,a.wav,0-1,,,,0.4,ddim,\n"
    )
    jobs, failures = parse_jobs(io.StringIO(text, newline=""), "csv", "t", tmp_path)
    assert jobs == [
        Job(
            "Rain",
            audio=str(tmp_path / "a.wav"),
            keep=((0.0, 2.5), (4.0, None)),
            replace_band=((1000.0, 2000.0), (4000.0, 8000.0)),
            exact_decoding=False,
        ),
        Job("Rain", audio="/b.wav", skip=0.4, invert="ddpm", source_prompt="Wind"),
        Job("Rain", loop=True),
    ]
    assert [str(failure).partition(": ")[2] for failure in failures] == [
        "keep must be seconds, as in 0-2.5 or 4-, got '4'",
        "keep goes with audio, the sound to edit, which is missing",
        "loop must be yes or no, got 'maybe'",
        "loop goes with audio and strength, or with extend; with keep, replace or replace_band, the seam "
        "would be in what is kept",
        "skip goes with invert, which is missing",
        "invert edits all of the sound, so leave out keep",
    ]
    job = Job.of({"prompt": "Rain", "audio": Path("a.wav"), "keep": [[0, 1], [np.float32(2), None]]})
    assert (job.audio, job.keep) == ("a.wav", ((0.0, 1.0), (2.0, None)))
    for values, reason in [
        ({"from": 3}, "from must be the path of a sound file, got 3"),
        ({"from": ""}, "from is empty; name a sound file"),
        ({"from": "a.wav", "strength": 2}, "strength must lie between 0"),
        ({"from": "a.wav", "extend": 1, "duration": 2}, "extend says how long the sound becomes"),
    ]:
        with pytest.raises((TypeError, ValueError), match=reason):
            Job.of({"prompt": "Rain", **values})


def test_each_sound_is_that_of_a_call_with_its_seed(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, failures = read_jobs(table)
    assert failures == []
    groups = in_groups(plan(jobs, tiny, FileOptions()), batch_size=8)
    # Sounds of equal length, with equal settings.
    assert [[request.index for request in group.requests] for group in groups] == [
        *([0, 1], [2], [3], [4], [5], [6])
    ]
    report = batch.run(jobs, tiny, tmp_path / "out")
    assert report.failures == []
    *edits, plain, inverted = report.sounds
    assert "audio" not in plain
    assert "strength" not in plain
    monkeypatch.chdir(tmp_path)
    generator = seeded(inverted["seed"])
    found = tiny.invert("in/a.wav", prompt="Wind", num_inference_steps=2, generator=generator)
    for sound, arguments in zip(
        [*edits, inverted],
        [
            {"audio": "in/a.wav", "strength": 0.5},
            {"audio": "in/b.wav", "strength": 0.5},
            {"audio": "in/long.wav", "strength": 0.5},
            {"audio": "in/a.wav", "keep": [(0, 0.1), (0.3, None)]},
            {"audio": "in/a.wav", "extend": 0.3, "loop": True},
            {"inverted": found},
        ],
        strict=True,
    ):
        alone = tiny(
            sound["prompt"],
            num_inference_steps=None if sound is inverted else 2,
            guidance_scale=2.0,
            generator=generator if sound is inverted else seeded(sound["seed"]),
            **arguments,
        ).audios[0]
        stored, _ = read_wav(tmp_path / "out" / sound["file"])
        assert stored.shape[1] == len(alone)
        assert np.abs(stored[0].numpy() - alone).max() <= 1e-4
        assert stored.std() > 5e-4, "comparing silence proves nothing"


def test_a_changed_sound_is_edited_again_and_a_moved_one_is_not(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    def generated(path: Path) -> int:
        jobs, _ = read_jobs(path)
        report = batch.run(jobs, tiny, tmp_path / "out", engine=fake_engine)
        assert (report.failures, len(report.sounds)) == ([], len(jobs))
        return report.generated

    assert [generated(table), generated(table)] == [7, 0]
    a = tmp_path / "in" / "a.wav"
    content = a.read_bytes()
    a.write_bytes(content[:-2] + b"\x01\x02")
    assert generated(table) == 4
    a.write_bytes(content)
    assert generated(table) == 4
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "in").rename(moved / "in")
    assert generated(table.rename(moved / "edits.csv")) == 0


def test_a_sound_that_cannot_be_edited_fails_its_row_alone(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "no.wav").write_text("This is not a sound.")
    write_wav(tmp_path / "in" / "silent.wav", np.zeros(6000, np.float32), RATE)
    rows = {
        "none.wav,": "none.wav: No such file",
        ",": "in: Is a directory",
        "no.wav,": "no.wav is not a sound file",
        "silent.wav,": "silent.wav is silent",
        "a.wav,0.5-": "keep has the span from 0.5 s on, but the sound is 0.375 s long",
    }
    lines = [f"Rain,in/{row}" for row in rows]
    table.write_text("\n".join(["prompt,from,keep", *lines, "Wind,in/b.wav,0-0.2", ""]))
    arguments = ["batch", str(table), "-o", str(tmp_path / "out"), "--model", "tiny", "--quiet"]
    assert cli.main([*arguments, "--steps", "2", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "1 sound, 1 new" in out
    for number, reason in enumerate(rows.values(), 2):
        (found,) = {line for line in err.splitlines() if f"error: {table}:{number}: " in line}
        assert reason in found
    assert [path.name for path in (tmp_path / "out").glob("*.wav")] == ["Wind.wav"]


def test_a_sound_that_changes_during_a_batch_is_not_edited(
    tiny: AudioLDM2Pipeline, table: Path, tmp_path: Path
) -> None:
    jobs, _ = read_jobs(table)
    (group, *_) = in_groups(plan(jobs, tiny, FileOptions()), batch_size=8)
    write_wav(tmp_path / "in" / "a.wav", noise(6000).clamp(-1, 1), RATE)
    result = batch.generating.generate(tiny, group)
    assert [sound.index for sound in result.sounds] == [1]
    assert "a.wav has changed since the batch began" in str(*result.failures)


def test_adapters_are_on_by_default_or_by_row(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    assert Job.of({"prompt": "Rain", "adapters": "dog:0.8, C:/x:-1, rain"}).adapters == (
        *(("C:/x", -1.0), ("dog", 0.8)),
        ("rain", 1.0),
    )
    assert Job("Rain", adapters={}).adapters == ()
    for value in ("dog:loud", ":1", {"dog": None}, 3):
        with pytest.raises((TypeError, ValueError), match="adapters must"):
            Job.of({"prompt": "Rain", "adapters": value})
    settings = {"prompt": "Rain", "duration": 0.64, "steps": 2, "seed": 1}
    jobs = [settings, {**settings, "adapters": {}}, {**settings, "adapters": "dog:0.5"}]
    plain = batch.run(jobs[:1], tiny, tmp_path / "plain").sounds[0]
    tiny.add_adapter("dog", rank=2)
    try:
        for parameter in tiny.adapter_parameters("dog"):
            parameter.data = 0.1 * noise(*parameter.shape)
        report = batch.run([*jobs, {**settings, "adapters": "dgo"}], tiny, tmp_path / "out")
    finally:
        tiny.unload_lora_weights()
    (failure,) = report.failures
    assert failure.reason == "adapters: 'dgo' is not loaded; did you mean dog?"
    on, off, _ = report.sounds
    assert [sound.get("adapters") for sound in report.sounds] == [{"dog": 1.0}, {}, {"dog": 0.5}]
    assert off["sha256"] == plain["sha256"]
    assert len({sound["sha256"] for sound in report.sounds}) == 3
    assert on["key"] != plain["key"]
