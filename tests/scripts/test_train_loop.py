"""The training loop: it learns, resumes, and refuses the state of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from audioldm2.training.loop import Run, RunMismatchError, learning_rate_factor, train


def learn(run: Run, **options: float) -> nn.Module:
    """A line trained on points of y = 3 x + 1."""
    torch.manual_seed(0)
    line = nn.Linear(1, 1)

    def loss(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(32, 1, generator=generator)
        return {"loss": (line(x) - (3 * x + 1)).square().mean()}

    train("line", line, loss, run, steps=300, rate=0.1, warmup=10, **options)
    return line


def test_the_loop_learns_and_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    line = learn(Run(tmp_path), average=0.9)
    assert line.weight.item() == pytest.approx(3, abs=0.05)
    assert line.bias.item() == pytest.approx(1, abs=0.05)
    assert not line.training
    assert (tmp_path / "plots" / "line.png").is_file()
    curves = torch.load(tmp_path / "line.pt")["curves"]
    assert torch.equal(learn(Run(tmp_path), average=0.9).weight, line.weight)
    assert torch.load(tmp_path / "line.pt")["curves"] == curves


def test_the_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    learn(Run(tmp_path))
    with pytest.raises(RunMismatchError, match="run with seed 0, and this run has seed 1; remove it"):
        learn(Run(tmp_path, seed=1))


def test_a_loss_of_nan_stops_the_run(tmp_path: Path) -> None:
    line = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train(
            "line",
            line,
            lambda g: {"loss": line(torch.full((1, 1), torch.nan)).sum()},
            Run(tmp_path),
            steps=3,
            rate=1,
        )


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] < 0.01
