"""The training loop: it learns, resumes, and refuses the state of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from audioldm2.training.loop import Run, RunMismatchError, Watch, learning_rate_factor, train


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
    with pytest.raises(FloatingPointError, match="line: step 1: the loss is nan"):
        train(
            "line",
            line,
            lambda g: {"loss": line(torch.full((1, 1), torch.nan)).sum()},
            Run(tmp_path),
            steps=3,
            rate=1,
        )


def test_watches_see_the_averaged_weights_and_gradients_accumulate(tmp_path: Path) -> None:
    """Two halves of a batch, accumulated, are the whole batch; the watch holds what the run ends with."""
    x = torch.linspace(-1, 1, 8)[:, None]
    lines = {}
    for parts in (1, 2):
        torch.manual_seed(0)
        line = lines[parts] = nn.Linear(1, 1)
        calls: list[int] = []

        def loss(
            generator: torch.Generator, line: nn.Linear = line, parts: int = parts, calls: list[int] = calls
        ) -> dict[str, torch.Tensor]:
            calls.append(1)
            half = x[len(calls) % 2 :: 2] if parts == 2 else x
            return {"loss": (line(half) - 3 * half).square().mean()}

        seen: dict[int, float] = {}

        def look(done: int, line: nn.Linear = line, seen: dict[int, float] = seen) -> dict[str, float]:
            assert not line.training
            seen[done] = line.weight.item()
            return {"weight": line.weight.item()}

        points = train(
            "line",
            line,
            loss,
            Run(tmp_path / str(parts)),
            steps=5,
            rate=0.1,
            warmup=1,
            average=0.9,
            accumulate=parts,
            watches=[Watch(2, look)],
        )
        assert [*seen] == [0, 2, 4, 5]
        assert points == {"weight": [*seen.items()]}
        assert seen[5] == line.weight.item()
        rows = (tmp_path / str(parts) / "plots" / "line.csv").read_text().splitlines()
        assert rows[0] == "step,loss,weight"
        assert len(rows) == 7
    torch.testing.assert_close(lines[1].weight, lines[2].weight, rtol=0, atol=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] < 0.01
