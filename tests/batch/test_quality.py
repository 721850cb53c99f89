"""Presets, feature caching and settings of guidance in batches: each sound is that of a call with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioldm2 import QUALITIES, AudioLDM2Pipeline, FeatureCaching, Quality, batch, cli, read_wav
from audioldm2.batch.manifest import MANIFEST, read_manifest
from audioldm2.batch.planning import FileOptions, Plan, in_groups, plan
from audioldm2.quality_settings import NEUTRAL
from tests.helpers import load_pipeline, seeded

SHORT = {"duration": 0.64}
SPREAD = FeatureCaching(steps=(0, 1))


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def planned(tiny: AudioLDM2Pipeline, *jobs: dict[str, Any]) -> Plan:
    found = plan([batch.Job.of(job) for job in jobs], tiny, FileOptions())
    assert found.failures == []
    return found


def lines_of(folder: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8").splitlines()]


def test_each_sound_is_that_of_a_call_with_its_settings(
    tiny: AudioLDM2Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUALITIES, "draft", Quality("unipc", 3, feature_cache=3, guidance_interval=(0, 0.5)))
    jobs: list[dict[str, Any]] = [
        {"quality": "draft"},
        {"quality": "draft", "steps": 2, "cache": 1, "scheduler": "ddim"},
        {"cache": [0, 1], "timesteps": "900,500,20", "guidance_rescale": 0.7, "unconditional": "zeros"},
        {"quality": "draft", "guidance": 1},
    ]
    report = batch.run([{"prompt": "Rain", **SHORT, **job} for job in jobs], tiny, tmp_path)
    assert report.failures == []
    calls: list[dict[str, Any]] = [
        {"quality": "draft"},
        {"quality": replace(QUALITIES["draft"], sampler="ddim", num_inference_steps=2, feature_cache=False)},
        {
            "quality": Quality(timesteps=(900, 500, 20), feature_cache=SPREAD),
            "guidance_rescale": 0.7,
            "unconditional": "zeros",
        },
        {"quality": "draft", "guidance_scale": 1.0},
    ]
    for line, call in zip(lines_of(tmp_path), calls, strict=True):
        expected = tiny(
            "Rain",
            audio_length_in_s=0.64,
            generator=seeded(line["seed"]),
            **{"guidance_scale": 2.0, **call},
        ).audios[0]
        stored, _ = read_wav(tmp_path / line["file"])
        assert np.abs(stored[0].numpy() - expected).max() <= 1e-4
        assert stored.std() > 5e-4, "comparing silence proves nothing"
    whole = {"quality", "num_inference_steps", *NEUTRAL}
    assert [{name: line[name] for name in line if name in whole} for line in lines_of(tmp_path)] == [
        {"quality": "draft", "num_inference_steps": 3, "feature_cache": 3, "guidance_interval": [0.0, 0.5]},
        {"quality": "draft", "num_inference_steps": 2, "guidance_interval": [0.0, 0.5]},
        {
            "num_inference_steps": None,
            "feature_cache": [0, 1],
            "timesteps": [900, 500, 20],
            "guidance_rescale": 0.7,
            "unconditional": "zeros",
        },
        {"quality": "draft", "num_inference_steps": 3, "feature_cache": 3},
    ]
    monkeypatch.undo()  # what the preset stands for has changed
    again = plan([batch.Job.of({"prompt": "Rain", **SHORT, **job}) for job in jobs], tiny, FileOptions())
    records, _ = read_manifest(tmp_path / MANIFEST)
    same = [request.key == records[request.files[0]]["key"] for request in again.requests]
    assert same == [False, False, True, False]


def test_what_has_no_effect_makes_no_difference(tiny: AudioLDM2Pipeline) -> None:
    best = QUALITIES["best"]
    plain = {"prompt": "Rain", "scheduler": best.sampler, "timesteps": [*best.timesteps], **SHORT}
    neutral = {
        **plain,
        "cache": 1,
        "guidance_interval": "0-1",
        "guidance_rescale": 0,
        "unconditional": "text",
    }
    preset = {"prompt": "Rain", "quality": "best", **SHORT}
    requests = [planned(tiny, job).requests[0] for job in (plain, neutral, preset)]
    assert len({(request.key, request.job.seed) for request in requests}) == 1
    assert {*NEUTRAL, "quality"} & {*requests[1].stored} == {"timesteps"}
    assert requests[2].stored["quality"] == "best"


def test_sounds_with_other_settings_are_other_groups(tiny: AudioLDM2Pipeline) -> None:
    jobs = [{"prompt": prompt, "quality": "draft"} for prompt in ("Rain", "Wind")]
    jobs += [{"prompt": "Rain", "cache": 3}, {"prompt": "Rain", "cache": "0,2"}, {"prompt": "Rain"}]
    groups = in_groups(planned(tiny, *jobs), 8)
    assert [len(group.requests) for group in groups] == [2, 1, 1, 1]
    bad = plan([batch.Job("Rain", timesteps=(5000, 3))], tiny, FileOptions())
    assert "timesteps must be decreasing integers from at most 999" in bad.failures[0].reason


def test_the_pipelines_caching_is_the_default_and_can_be_off(tiny: AudioLDM2Pipeline) -> None:
    job, off = {"prompt": "Rain", "steps": 3}, {"prompt": "Rain", "steps": 3, "cache": 1}
    without = planned(tiny, job).requests[0]
    tiny.enable_feature_cache(3)
    try:
        cached, uncached = planned(tiny, job, off).requests
    finally:
        tiny.disable_feature_cache()
    assert cached.job.feature_cache == 3
    assert (uncached.key, uncached.job.feature_cache) == (without.key, None)
    assert cached.key != without.key


def test_options_are_the_defaults_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(QUALITIES, "draft", Quality("unipc", 2, feature_cache=2))
    Path("prompts.csv").write_text("prompt,quality,scheduler,steps\nRain,,,\nWind,,ddim,1\n", "utf-8")
    arguments = ["batch", "prompts.csv", "-o", "out", "--model", "tiny", "--device", "cpu", "--quiet"]
    options = ["--duration", "0.64", "--quality", "draft", "--guidance-interval", "0-0.5"]
    assert cli.main([*arguments, *options]) == 0
    rain, wind = lines_of(Path("out"))
    names = ("scheduler", "num_inference_steps", "feature_cache", "guidance_interval", "quality")
    assert [rain[name] for name in names] == ["UniPCMultistepScheduler", 2, 2, [0.0, 0.5], "draft"]
    assert [wind[name] for name in names] == ["DDIMScheduler", 1, 2, [0.0, 0.5], "draft"]
    capsys.readouterr()
    assert cli.main([*arguments, *options]) == 0
    assert capsys.readouterr().out == "out: 2 sounds, 0 new, 2 already there\n"


def test_a_rows_preset_says_more_than_options_for_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(QUALITIES, "draft", Quality("unipc", 2))
    Path("prompts.csv").write_text("prompt,quality\nRain,draft\nWind,\n", "utf-8")
    arguments = ["batch", "prompts.csv", "-o", "out", "--model", "tiny", "--device", "cpu", "--quiet"]
    options = ["--duration", "0.64", "--steps", "1", "--scheduler", "ddim", "--guidance", "2"]
    assert cli.main([*arguments, *options]) == 0
    names = ("scheduler", "num_inference_steps", "guidance_scale")
    expected = {"Rain": ["UniPCMultistepScheduler", 2, 2.0], "Wind": ["DDIMScheduler", 1, 2.0]}
    assert {line["prompt"]: [line[name] for name in names] for line in lines_of(Path("out"))} == expected
