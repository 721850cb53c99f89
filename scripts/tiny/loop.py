"""The training loop that all stages share.

    def loss(generator):                     # of one step, on a batch drawn with the generator
        mel = library.mels(library.draw(run.batch_or(16), generator))
        return {"loss": ..., "another curve": ...}

    train("vae", vae, loss, run, steps=2000, rate=1e-3)

A run can be killed and started again. Its state is saved once a minute, and every random number depends only
on the seed and the index of the step, so a resumed run ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from audioldm2.atomic import replacing

SAVE_INTERVAL = 60.0  # s
Loss = Callable[[torch.Generator], dict[str, Tensor]]


class RunMismatchError(ValueError):
    """The folder holds the state of a run with other arguments."""


@dataclass(frozen=True)
class Run:
    """Where and how a training runs.

    Args:
        folder: for saved states, plots and the trained parts.
        device: "cpu" or "cuda".
        seed: of everything random.
        steps: of each stage; None is each stage's own number.
        batch: examples per step; None is each stage's own number.
        compile: compile the UNet first, which takes minutes and makes its steps a fifth faster.
        begin: a folder in the Hub's layout with the UNet to start from; None starts from random weights.
    """

    folder: Path
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None
    batch: int | None = None
    compile: bool = False
    begin: Path | None = None

    def steps_or(self, default: int) -> int:
        """The number of steps, `default` unless the run sets one."""
        return default if self.steps is None else self.steps

    def batch_or(self, default: int) -> int:
        """The number of examples per step, `default` unless the run sets one."""
        return default if self.batch is None else self.batch

    @property
    def checkpoint(self) -> Path:
        """Where the trained parts are written, in the Hub's layout."""
        return self.folder / "checkpoint"

    def generator(self, step: int) -> torch.Generator:
        """The random generator of a step, on the CPU; it depends on the seed and the step alone."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)


def cached(path: Path, sources: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `make`, which takes minutes: kept at `path` and made again when its sources change.

    Args:
        path: the file of the cache.
        sources: everything that the result depends on.
        make: computes the result.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source)
    if path.is_file():
        found: dict[str, Any] = torch.load(path, weights_only=True)
        if found.pop("sources", "") == digest.hexdigest():
            return found
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({**made, "sources": digest.hexdigest()}, temporary)
    return made


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
) -> None:
    """Train a module, resume a training that was killed, or load the result of one that is finished.

    Afterwards the module holds the averaged weights and is in evaluation mode. Optimized with AdamW
    (Loshchilov and Hutter 2019).

    Args:
        name: of the stage, for its saved state, plot and progress bar.
        module: holds all parameters to train.
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

    Raises:
        RunMismatchError: the folder holds the state of a run with another seed or number of steps.
        FloatingPointError: the loss is not finite.
    """
    steps = run.steps_or(steps)
    module.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in stubs
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=betas,
    )
    averaged = copy.deepcopy(module.state_dict())
    curves: dict[str, list[float]] = {}
    done = 0
    path = run.folder / f"{name}.pt"
    if path.is_file():
        state = torch.load(path, map_location=run.device, weights_only=True)
        if state["seed"] != run.seed or state["steps"] != steps:
            raise RunMismatchError(
                f"{path} belongs to a run with seed {state['seed']} and {state['steps']} steps, this run has "
                f"seed {run.seed} and {steps} steps; remove the file to train the stage from the beginning"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, curves, done = state["averaged"], state["curves"], state["done"]

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"averaged": averaged, "curves": curves, "done": done, "seed": run.seed, "steps": steps}
        with replacing(path) as temporary:
            torch.save(state, temporary)
        plot_losses(name, curves, run.folder / "plots" / f"{name}.png")

    saved = time.monotonic()
    with tqdm(total=steps, initial=done, desc=f"Training {name}", disable=None, mininterval=1.0) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(done, steps, min(warmup, steps))
            losses = loss(run.generator(done))
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            done += 1
            decay = min(average, done / (done + 10))  # a short memory at first: early weights are poor
            with torch.no_grad():
                for key, value in module.state_dict().items():
                    if value.is_floating_point():
                        averaged[key].lerp_(value, 1 - decay)
                    else:
                        averaged[key].copy_(value)
            for key, value in losses.items():
                curves.setdefault(key, []).append(value.item())
            if not math.isfinite(curves["loss"][-1]):
                raise FloatingPointError(f"{name}: the loss is {curves['loss'][-1]} at step {done}")
            bar.update()
            bar.set_postfix({key: f"{sum(c[-50:]) / len(c[-50:]):.4f}" for key, c in curves.items()})
            if time.monotonic() - saved > SAVE_INTERVAL:
                save()
                saved = time.monotonic()
    save()
    module.load_state_dict(averaged)
    module.eval()


def plot_losses(name: str, curves: dict[str, list[float]], path: Path) -> None:
    """Plot the losses over the steps, smoothed, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    for axes, (key, values) in zip(
        figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True
    ):
        window = max(1, len(values) // 100)
        means = torch.tensor(values, dtype=torch.float64).unfold(0, window, window).mean(1)
        axes.plot([window * (i + 1) for i in range(len(means))], means.tolist())
        axes.set(xlabel="step", ylabel=key, title=name)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
