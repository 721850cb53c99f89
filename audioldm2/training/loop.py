"""The training loop that all trainings share, from the tiny checkpoint's stages to a fine-tune.

    def loss(generator):                     # of one step, on a batch drawn with the generator
        mel = sounds[torch.randint(len(sounds), (16,), generator=generator)]
        return {"loss": ..., "another curve": ...}

    train("vae", vae, loss, Run(folder), steps=2000, rate=1e-3)

A run can be killed and started again. Its state is saved once a minute, and every random number depends only
on the seed and the index of the step, so a resumed run ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from audioldm2.atomic import replacing
from audioldm2.figures import new_figure
from audioldm2.training.options import STEP_SEEDS

SAVE_INTERVAL = 60.0  # s
Loss = Callable[[torch.Generator], dict[str, Tensor]]
Curves = dict[str, list[float]]
Points = dict[str, list[tuple[int, float]]]


class RunMismatchError(ValueError):
    """The folder holds the state of a run with other arguments."""


@dataclass(frozen=True)
class Run:
    """Where and how a training runs.

    Args:
        folder: for saved states and plots.
        device: such as "cpu" or "cuda:1".
        seed: of everything random.
        steps: of each training; None is each one's own number.
    """

    folder: Path
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None

    def steps_or(self, default: int) -> int:
        """The number of steps, `default` unless the run sets one."""
        return default if self.steps is None else self.steps

    def generator(self, step: int) -> torch.Generator:
        """The random generator of a step, on the CPU; it depends on the seed and the step alone."""
        return torch.Generator().manual_seed(STEP_SEEDS * self.seed + step)


@dataclass(frozen=True)
class Watch:
    """What is done now and then with the averaged weights: a validation, a sample.

    Args:
        every: number of steps between two looks; there is one before the first step and after the last, too.
        look: called with the number of steps done, while the module holds the averaged weights and is in
            evaluation mode. What it returns is added to the curves.
    """

    every: int
    look: Callable[[int], Mapping[str, float]]

    def due(self, done: int, steps: int) -> bool:
        """Whether it is time for a look after `done` of `steps` steps."""
        return done % self.every == 0 or done == steps


@dataclass(frozen=True)
class Processes:
    """The processes of a run that share its batches, each with the same weights.

    Args:
        index: of this process; process 0 writes the files.
        count: number of processes.
        average: replaces gradients by their means over all processes.
        wait: returns when all processes have called it.
    """

    index: int = 0
    count: int = 1
    average: Callable[[Sequence[Tensor]], None] = lambda gradients: None
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.index == 0


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by: a linear rise, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(
    name: str,
    module: nn.Module,
    loss: Loss,
    run: Run,
    *,
    steps: int,
    rate: float,
    warmup: int = 100,
    average: float = 0.0,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    clip: float = 1.0,
    accumulate: int = 1,
    watches: Sequence[Watch] = (),
    settings: Mapping[str, str | int | float | bool] | None = None,
    processes: Processes | None = None,
    save_interval: float | None = None,
    show: bool | None = None,
) -> Points:
    """Train a module, resume a training that was killed, or load the result of one that is finished.

    Afterwards the module holds the averaged weights and is in evaluation mode. Optimized with AdamW
    (Loshchilov and Hutter 2019).

    Args:
        name: of the stage, for its saved state, plot and progress bar.
        module: holds all parameters to train, and only its tensors are saved: to train a few parameters of a
            large network, pass an nn.ParameterList of these.
        loss: computes one step's losses from a generator on the CPU. "loss" is minimized; all are plotted.
        run: where and how.
        steps: unless `run` sets another number.
        rate: the highest learning rate.
        warmup: steps in which the learning rate rises.
        average: decay of the exponential moving average of the weights (Polyak and Juditsky 1992); 0 turns
            averaging off.
        weight_decay: of matrices and kernels; gains and biases have none.
        betas: AdamW's.
        clip: maximum norm of the gradient.
        accumulate: calls of `loss` for each step, whose gradients are averaged.
        watches: what is done now and then with the averaged weights.
        settings: what else decides the result; a run with other settings is not resumed.
        processes: those that share the run; each computes `loss` of its share of a batch.
        save_interval: seconds from one saved state to the next; None is `SAVE_INTERVAL`.
        show: whether to show a progress bar; None is on a terminal or in a notebook.

    Returns:
        What the watches returned: for each name, the steps and the numbers.

    Raises:
        RunMismatchError: the folder holds the state of a run with another seed, number of steps or setting.
        FloatingPointError: the loss is not finite.
    """
    steps = run.steps_or(steps)
    processes = processes or Processes()
    settings = {"seed": run.seed, "steps": steps, **(settings or {})}
    module.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in stubs
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas)
    averaged = copy.deepcopy(module.state_dict())
    curves: Curves = {}
    points: Points = {}
    done = 0
    path = run.folder / f"{name}.pt"
    if path.is_file():
        state = torch.load(path, map_location=run.device, weights_only=True)
        check_settings(path, state["settings"], settings)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, curves, points, done = state["averaged"], state["curves"], state["points"], state["done"]

    def save() -> None:
        if not processes.is_main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"averaged": averaged, "curves": curves, "points": points, "done": done}
        with replacing(path) as temporary:
            torch.save({**state, "settings": settings}, temporary)
        write_losses(curves, points, run.folder / "plots" / f"{name}.csv")
        plot_losses(name, curves, points, run.folder / "plots" / f"{name}.png")

    def look() -> None:
        for watch in watches:
            if processes.is_main and watch.due(done, steps):
                with holding(module, averaged):
                    for key, number in watch.look(done).items():
                        points.setdefault(key, []).append((done, number))

    if done == 0:
        look()
    saved = time.monotonic()
    hidden = None if show is None and processes.is_main else not (show and processes.is_main)
    with tqdm(total=steps, initial=done, desc=f"Training {name}", disable=hidden, mininterval=1.0) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(done, steps, min(warmup, steps))
            optimizer.zero_grad(set_to_none=True)
            means = backward(loss, run.generator(done), accumulate, f"{name}: step {done + 1}")
            processes.average([p.grad for p in parameters if p.grad is not None])
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            done += 1
            update_average(averaged, module, min(average, done / (done + 10)))  # early weights are poor
            for key, mean in means.items():
                curves.setdefault(key, []).append(mean)
            bar.update()
            bar.set_postfix({key: f"{sum(c[-50:]) / len(c[-50:]):.4f}" for key, c in curves.items()})
            look()
            if time.monotonic() - saved > (SAVE_INTERVAL if save_interval is None else save_interval):
                save()
                saved = time.monotonic()
    save()
    processes.wait()
    module.load_state_dict(averaged)
    module.eval()
    return points


def backward(loss: Loss, generator: torch.Generator, accumulate: int, where: str) -> dict[str, float]:
    """Add a step's gradients to those of the parameters.

    Args:
        loss: see `train`.
        generator: of the step.
        accumulate: calls of `loss`, whose gradients are averaged.
        where: names the step in errors.

    Returns:
        The means of the losses.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    means: dict[str, float] = {}
    for _ in range(accumulate):
        losses = loss(generator)
        for key, value in losses.items():
            means[key] = means.get(key, 0.0) + value.item() / accumulate
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"{where}: the loss is {means['loss']}; try a lower learning rate")
        (losses["loss"] / accumulate).backward()
    return means


def check_settings(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise RunMismatchError, which names the differences, unless a saved run has the same settings."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        kept, asked = (
            ", ".join(f"{name} {values.get(name, 'unset')}" for name in names) for values in (old, new)
        )
        raise RunMismatchError(
            f"{path} belongs to a run with {kept}, and this run has {asked}; remove it to train from the "
            "beginning"
        )


@torch.no_grad()
def update_average(averaged: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """One step of the exponential moving average of a module's tensors, in place."""
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            averaged[key].lerp_(value, 1 - decay)
        else:
            averaged[key].copy_(value)


@contextmanager
def holding(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block, a module holds other weights and is in evaluation mode, and nothing is trained."""
    own = {key: value.clone() for key, value in module.state_dict().items()}
    was_training = module.training
    module.load_state_dict(weights)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.load_state_dict(own)
        module.train(was_training)


def write_losses(curves: Curves, points: Points, path: Path) -> None:
    """Write the losses of each step, and what watches returned at some, into a CSV file."""
    found = {key: dict(pairs) for key, pairs in points.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves, *found])
        before = [""] * len(curves)  # the first step
        for step, values in enumerate([before, *zip(*curves.values(), strict=True)]):
            if step or found:
                writer.writerow([step, *values, *(pairs.get(step, "") for pairs in found.values())])


def plot_losses(name: str, curves: Curves, points: Points, path: Path) -> None:
    """Plot the losses over the steps, smoothed, into a PNG file, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    panels = {key: [*enumerate(values, 1)] for key, values in curves.items()}
    figure = new_figure(8, 3 * len(panels | points))
    grid = figure.subplots(len(panels | points), squeeze=False)[:, 0]
    for axes, (key, pairs) in zip(grid, (panels | points).items(), strict=True):
        window = max(1, len(pairs) // 100) if key in panels else 1
        means = torch.tensor(pairs, dtype=torch.float64).T.unfold(1, window, window)
        axes.plot(means[0, :, -1].tolist(), means[1].mean(1).tolist(), marker="" if key in panels else ".")
        axes.set(xlabel="step", ylabel=key, title=name)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
