"""scripts/optimize_timesteps: its search on distances with a known minimum, and a run of the script."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from audioldm2.schedulers import UniPCMultistepScheduler
from scripts.tiny.evaluate.spacing import (
    Batch,
    curve_timesteps,
    distance,
    falls,
    sampled,
    search_family,
    search_timesteps,
)
from tests.scripts.helpers import load_script, run_script


def distance_from(wanted: Sequence[int]):
    """A distance of lists of timesteps that is 0 at one of them."""
    return lambda timesteps: sum(abs(a - b) for a, b in zip(timesteps, wanted, strict=True))


def test_the_family_has_trailing_spacing_in_it() -> None:
    scheduler = UniPCMultistepScheduler(timestep_spacing="trailing")
    for number in (1, 2, 5, 8, 20, 50):
        scheduler.set_timesteps(number)
        assert curve_timesteps(1.0, 1.0, number, 1000) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("a", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("b", [0.2, 1.0, 5.0])
def test_all_curves_fall(a: float, b: float) -> None:
    for number in (1, 3, 20, 100):
        timesteps = curve_timesteps(a, b, number, 100)
        assert falls(timesteps)
        assert timesteps[0] == 99
    assert curve_timesteps(2.0, 1.0, 4, 1000)[1:] < curve_timesteps(1.0, 1.0, 4, 1000)[1:]


def test_the_search_in_the_family_finds_a_member() -> None:
    wanted = curve_timesteps(math.exp(0.8), math.exp(-0.4), 10, 1000)
    found = search_family(distance_from(wanted), 10, 1000, (1.0, 1.0))
    assert curve_timesteps(found.a, found.b, 10, 1000) == wanted
    assert found.distance == 0


def test_the_search_for_a_list_moves_single_timesteps_as_long_as_they_fall() -> None:
    start, wanted = [999, 600, 400, 200], [999, 696, 384, 8]
    measure = distance_from(wanted)
    assert search_timesteps(measure, start, measure(start)) == (wanted, 0)
    # The first stays, and none passes another.
    measure = distance_from([500, 900, 950, -100])
    found, lowest = search_timesteps(measure, start, measure(start))
    assert found[0] == 999
    assert falls(found)
    assert lowest == measure(found) < measure(start)


def test_the_distance_is_that_of_all_samples_together() -> None:
    sampler = UniPCMultistepScheduler(prediction_type="sample")
    sampler.set_timesteps(timesteps=[999, 400])

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Rows of uncond and cond, of which guidance 2 makes twice cond."""
        return torch.cat([torch.zeros_like(latents), torch.full_like(latents, 1.5)])

    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sampled(sampler, predict, noise, 2.0), torch.full((2, 3, 4), 3.0))
    batches = [
        Batch(predict, noise, torch.full((2, 3, 4), 4.0)),
        Batch(predict, noise[:1], torch.full((1, 3, 4), 3.0)),
    ]
    expected = math.sqrt(2 * 1.0 / (2 * 16 + 9))
    assert distance(sampler, batches, 2.0) == pytest.approx(100 * expected, rel=1e-5)


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    few = ("--prompts", "2", "--held-out", "2", "--reference", "10", "--threads", "1")
    result = run_script("optimize_timesteps", "--steps", "3", *few, "--json", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["training"]["list"] <= found["training"]["family"] < found["training"]["default"]
    assert ", ".join(map(str, found["list"])) in result.stdout
    given = ",".join(map(str, found["list"]))
    few = ("--held-out", "2", "--reference", "10", "--threads", "1")
    measured = run_script("optimize_timesteps", "--evaluate", given, *few, "--json", tmp_path / "given.json")
    assert f"{found['held out']['list']:.2f} %" in measured.stdout
    (again,) = json.loads((tmp_path / "given.json").read_text())
    assert again["list"] == found["list"]
    assert again["held out"]["list"] == pytest.approx(found["held out"]["list"])


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("optimize_timesteps")
    messages = {
        "--steps 1": "--steps must be at least 2",
        "--evaluate 999,5 --steps 4": "--steps is of the search",
        "--evaluate 999,5 --prompts 4": "--prompts is of the search",
    }
    for wrong in ("5,900", "2000,5", "5,5", "5,-1", "5,", "", "1.5"):
        messages[f"--evaluate={wrong}"] = "--evaluate must be integers that decrease, from 999 at most to 0"
    for words, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            script.arguments(words.split())
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert script.arguments(["--evaluate", "999,0"]).evaluate == [[999, 0]]
    assert (script.arguments([]).steps, script.arguments([]).prompts) == ([8], 12)
