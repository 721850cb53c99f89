"""Jobs and the tables that they are read from."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from audioldm2 import FeatureCaching
from audioldm2.batch import Job, read_jobs
from audioldm2.batch.tables import parse_jobs
from audioldm2.quality_settings import as_plain, cache_of


def parsed(text: str, kind: str) -> tuple[list[Job], list[str]]:
    jobs, failures = parse_jobs(io.StringIO(text, newline=""), kind, "table")
    return jobs, [str(failure) for failure in failures]


def test_a_csv_file_has_the_columns_of_options_and_of_arguments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "\ufeffprompt,negative,duration,seed,name,num_inference_steps,guidance,candidates,scheduler\r\n"
        'Rain,"low, quality",2.5,7,rain.flac,10,2,3,ddim\r\n'
        "A bell,,,,,,,,\r\n",
        encoding="utf-8",
    )
    jobs, failures = read_jobs(path)
    assert failures == []
    assert jobs == [
        Job("Rain", "rain.flac", "low, quality", None, 2.5, 10, 2.0, 3, scheduler="ddim", seed=7),
        Job("A bell"),
    ]
    assert [job.where for job in jobs] == [f"{path}:2", f"{path}:3"]


def test_the_other_formats() -> None:
    assert parsed("prompt\tseed\nRain, heavy\t3\n", "tsv") == ([Job("Rain, heavy", seed=3)], [])
    lines = '{"prompt": "Rain", "duration": 1, "seed": null}\n\n"A bell"\n'
    assert parsed(lines, "jsonl") == ([Job("Rain", audio_length_in_s=1.0), Job("A bell")], [])
    lines = "Rain\n\n  A bell | ding.wav \r\nWind|\n"
    jobs, failures = parsed(lines, "txt")
    assert jobs == [Job("Rain"), Job("A bell", "ding.wav")]
    assert failures == ["table:4: name is empty; without one, the file is named after the prompt"]


def test_bad_rows_are_reported_by_their_first_line_and_stop_no_other() -> None:
    jobs, failures = parsed(
        'prompt,duration,steps,seed\n"two\nlines",1,2,0\nRain,long,,\nRain,0,,\nRain,,2.5,\nRain,,,-1\n'
        'Rain,1\n,1,,\n"Rain" now,1,,\nA bell,,,\n"Rain\n\n',
        "csv",
    )
    assert [job.prompt for job in jobs] == ["two\nlines", "A bell"]
    assert failures == [
        "table:4: duration must be a number, got 'long'",
        "table:5: duration must be from 0 to 3600 seconds, got 0.0",
        "table:6: steps must be an integer, got '2.5'",
        "table:7: seed must be an integer from 0 to 9223372036854775807, got -1",
        "table:8: the row has 2 cells, and the header 4",
        "table:9: the prompt is missing",
        "table:10: ',' expected after '\"'",
        "table:12: unexpected end of data",
    ]
    jobs, failures = parsed('{"prompt": "Rain", "sed": 1}\n{"prompt": 3}\n[1]\n{"prompt"\n"Rain"\n', "jsonl")
    assert jobs == [Job("Rain")]
    assert failures[0] == "table:1: unknown column 'sed'; did you mean seed?"
    assert failures[1] == "table:2: prompt must be text, got 3"
    assert failures[2] == "table:3: each line is a JSON object or a string, got [1]"
    assert failures[3].startswith("table:4: not JSON: ")


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"text\nRain\n", "csv", "one of them prompt"),
        (b"prompt,sed\nRain,1\n", "csv", "unknown column 'sed'; did you mean seed?"),
        (b"prompt,steps,num_inference_steps\nRain,1,2\n", "csv", "two columns of the same setting"),
        (b"Prompt;name\n", "csv", r"separated by commas"),
        (b"prompt,name\nRain,\n", "txt", "looks like that of a csv table"),
        (b'{"prompt": "Rain"}\n', "txt", "looks like that of a jsonl table"),
        (b"\n\n", "txt", "has no prompts"),
        (b"prompt\n\xff\xfe\n", "csv", "is not UTF-8 text"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, kind: str, reason: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_jobs(path, kind)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown type of table; use \.csv"):
        read_jobs(path)


def test_jobs_are_checked_and_hold_pythons_numbers() -> None:
    job = Job.of({"prompt": "Rain", "steps": np.int64(3), "guidance": np.float32(2)})
    assert (type(job.num_inference_steps), type(job.guidance_scale)) == (int, float)
    for value, reason in [
        ({"prompt": "Rain", "candidates": 0}, "candidates must be an integer from 1 to 1000, got 0"),
        ({"prompt": "R\0a\0i\0n\0"}, "prompt has a NUL character; the text is perhaps UTF-16"),
        ({"prompt": "Rain", "guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"prompt": "Rain", "scheduler": "euler"}, "scheduler must be one of ddim, dpmsolver"),
        ({"prompt": "Rain", "name": "x" * 1001}, "name has 1001 characters; at most 1000"),
        ({"prompt": "Rain", "steps": 1, "num_inference_steps": 2}, "two names of the same setting"),
        ({"seed": 1}, "the prompt is missing"),
        (3, "a job is a prompt, a mapping or a Job, got 3"),
    ]:
        with pytest.raises((TypeError, ValueError), match=reason):
            Job.of(value)


def test_cells_of_quality_and_speed() -> None:
    jobs, failures = parsed(
        "prompt\tquality\tcache\tguidance_interval\tguidance_rescale\tunconditional\ttimesteps\n"
        "Rain\tdraft\t3\t0 - 0.75\t0.7\tzeros\t\n"
        "Rain\t\t0,1,5\t\t\ttext\t900, 500,20,10,5,0\n"
        "Rain\tfast\t\t\t\t\t\nRain\t\toften\t\t\t\t\nRain\t\t\t1-0\t\t\t\nRain\t\t\t\t2\t\t\n"
        "Rain\t\t\t\t\tnoise\t\nRain\t\t\t\t\t\t1,2\n"
        "Rain\t\t0,9\t\t\t\t9,5\n",
        "tsv",
    )
    first = Job(
        "Rain",
        quality="draft",
        feature_cache=3,
        guidance_interval=(0.0, 0.75),
        guidance_rescale=0.7,
        unconditional="zeros",
    )
    second = Job(
        "Rain",
        feature_cache=FeatureCaching(steps=(0, 1, 5)),
        unconditional="text",
        timesteps=(900, 500, 20, 10, 5, 0),
    )
    assert jobs == [first, second]
    assert (second.num_inference_steps, second.steps) == (None, 6)
    for failure, reason in zip(
        failures,
        (
            "table:4: quality must be one of draft, normal, best; got 'fast'",
            "table:5: cache must be an interval such as 3, or a list of the steps",
            "table:6: guidance_interval must be START-END, two fractions",
            "table:7: guidance_rescale must be a number from 0 to 1, got 2.0",
            "table:8: unconditional must be one of text, zeros; got 'noise'",
            "table:9: timesteps must be decreasing integers of at least 0, such as 999,700,300",
            "table:10: cache lists step 9, but the last of the run's 2 steps is 1",
        ),
        strict=True,
    ):
        assert failure.startswith(reason)
    line = (
        '{"prompt": "Rain", "quality": "draft", "cache": %s, "guidance_interval": [0, 0.75],'
        '"guidance_rescale": 0.7, "unconditional": "zeros"}\n'
        '{"prompt": "Rain", "cache": [0, 1, 5], "unconditional": "text",'
        '"timesteps": [900, 500, 20, 10, 5, 0]}'
    )
    assert parsed(line % "3", "jsonl") == ([first, second], [])
    assert parsed(line % '{"interval": 3, "level": 0}', "jsonl") == ([first, second], [])
    assert Job("Rain", feature_cache=False).feature_cache == 1
    for value in (True, 0, 2.5, {"every": 3}, []):
        with pytest.raises(ValueError, match="feature_cache must be an interval such as 3"):
            Job("Rain", feature_cache=value)
    for caching in (3, 1, FeatureCaching(3, level=1, power=1.5), FeatureCaching(steps=(0, 2), level=1)):
        assert cache_of("cache", json.loads(json.dumps(as_plain(caching)))) == caching
    assert as_plain(FeatureCaching(steps=(0, 2))) == [0, 2]


def test_settings_that_do_not_go_together_and_defaults_that_give_way() -> None:
    for fields, reason in (
        ({"timesteps": [9, 5], "num_inference_steps": 2}, "cannot be used together"),
        ({"audio": "a.wav", "invert": "ddpm", "quality": "best"}, "quality cannot be used with invert"),
        ({"audio": "a.wav", "invert": "ddpm", "timesteps": [9]}, "timesteps cannot be used with invert"),
        ({"guidance_interval": (0, 0.5), "guidance_scale": 1}, "guidance_interval has no effect without"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_rescale has no effect without"),
        ({"unconditional": "zeros", "guidance_scale": 1}, "unconditional has no effect without"),
        ({"unconditional": "zeros", "negative_prompt": "x"}, "cannot be combined with a neg"),
    ):
        with pytest.raises(ValueError, match=reason):
            Job("Rain", **fields)
    options = {
        "num_inference_steps": 4,
        "guidance_interval": (0, 0.5),
        "guidance_rescale": 0.5,
        "unconditional": "zeros",
        "quality": "draft",
    }
    for fields, left in (
        ({}, {*options}),
        ({"timesteps": (9, 5)}, {*options} - {"num_inference_steps"}),
        ({"guidance_scale": 1.0}, {"num_inference_steps", "quality"}),
        ({"negative_prompt": "x"}, {*options} - {"unconditional"}),
        ({"audio": "a.wav", "invert": "ddpm"}, {*options} - {"quality"}),
    ):
        job = Job("Rain", **fields).with_defaults(options)
        assert {name for name in options if getattr(job, name) is not None} == left
    job = Job("Rain", unconditional="zeros").with_defaults({"negative_prompt": "x"})
    assert job.negative_prompt is None
