"""The training loop that every stage shares.

    def loss(generator):                     # one step's loss, on what the generator draws
        mel = library.mels(library.draw(run.size(16), generator))
        return {"loss": ..., "another curve": ...}

    train("vae", vae, loss, run, steps=2000, rate=1e-3)

A run can be killed and started again: its state is written once a minute, and all that is drawn at random
depends on the seed and the number of the step alone, so a resumed run ends with the numbers of an
uninterrupted one.
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

SAVE_EVERY = 60.0  # s
Loss = Callable[[torch.Generator], dict[str, Tensor]]


class OtherRunError(ValueError):
    """What lies in the folder is of a run with other arguments."""


@dataclass(frozen=True)
class Run:
    """Where and how a training runs.

    Args:
        folder: for states to resume from, plots and the trained parts.
        device: "cpu" or "cuda".
        seed: of all that is drawn.
        steps: of each stage; None is each stage's own number.
        batch: of each step; None is each stage's own.
        compile: compile the UNet first, which takes minutes and makes its steps a fifth faster.
        begin: a folder in the Hub's layout with the UNet to begin with; None is one with random weights.
    """

    folder: Path
    device: str = "cpu"
    seed: int = 0
    steps: int | None = None
    batch: int | None = None
    compile: bool = False
    begin: Path | None = None

    def count(self, steps: int) -> int:
        """How many steps to go, where a stage's own number is `steps`."""
        return steps if self.steps is None else self.steps

    def size(self, batch: int) -> int:
        """How many examples a step, where a stage's own number is `batch`."""
        return batch if self.batch is None else self.batch

    @property
    def checkpoint(self) -> Path:
        """Where the trained parts go, in the Hub's layout."""
        return self.folder / "checkpoint"

    def generator(self, step: int) -> torch.Generator:
        """What is drawn at a step, always the same; on the CPU."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)


def kept(path: Path, of: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` makes, which takes minutes: kept at `path` until it is to be made of something else."""
    source = hashlib.sha256()
    for piece in of:
        source.update(piece)
    if path.is_file():
        found: dict[str, Any] = torch.load(path, weights_only=True)
        if found.pop("of", "") == source.hexdigest():
            return found
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({**made, "of": source.hexdigest()}, temporary)
    return made


def schedule(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied with: it rises linearly, then falls to 0 as half a cosine."""
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
    """Train a module, or take up a training that was killed, or take its result if it is finished.

    Afterwards the module holds the averaged weights, in evaluation mode.

    Args:
        name: of the stage: of its state, plot and progress bar.
        module: holds all parameters that are to learn (AdamW: Loshchilov and Hutter 2019).
        loss: of a step, from a generator on the CPU; "loss" is minimised, all entries are plotted.
        run: where and how.
        steps: unless `run` says otherwise.
        rate: learning rate at its highest.
        warmup: steps in which it rises.
        average: how much of the averaged weights stays at a step (Polyak and Juditsky 1992); 0 averages
            nothing.
        weight_decay: of matrices and kernels; gains and biases are left alone.
        betas: AdamW's.
        clip: longest gradient that is taken as it is.

    Raises:
        OtherRunError: what lies in the folder is of another run.
        FloatingPointError: the loss is no number any more.
    """
    steps = run.count(steps)
    module.to(run.device, memory_format=torch.channels_last).train()
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
            raise OtherRunError(
                f"{path} is of a run with seed {state['seed']} and {state['steps']} steps, not with "
                f"{run.seed} and {steps}; remove it to start anew"
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

    saved = time.monotonic()
    with tqdm(total=steps, initial=done, desc=f"Training {name}", disable=None, mininterval=1.0) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(done, steps, min(warmup, steps))
            losses = loss(run.generator(done))
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            done += 1
            keep = min(average, done / (done + 10))  # the first weights are soon forgotten
            with torch.no_grad():
                for key, value in module.state_dict().items():
                    if value.is_floating_point():
                        averaged[key].lerp_(value, 1 - keep)
                    else:
                        averaged[key].copy_(value)
            for key, value in losses.items():
                curves.setdefault(key, []).append(value.item())
            if not math.isfinite(curves["loss"][-1]):
                raise FloatingPointError(f"{name}: the loss is {curves['loss'][-1]} at step {done}")
            bar.update()
            bar.set_postfix({key: f"{sum(c[-50:]) / len(c[-50:]):.4f}" for key, c in curves.items()})
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                plot(name, curves, run.folder / "plots" / f"{name}.png")
                saved = time.monotonic()
    save()
    plot(name, curves, run.folder / "plots" / f"{name}.png")
    module.load_state_dict(averaged)
    module.eval()


def plot(name: str, curves: dict[str, list[float]], path: Path) -> None:
    """Draw the losses over the steps, smoothed, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    for axes, (key, values) in zip(
        figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True
    ):
        window = max(1, len(values) // 100)
        sums = torch.tensor(values, dtype=torch.float64).unfold(0, window, window).mean(1)
        axes.plot([window * (i + 1) for i in range(len(sums))], sums.tolist())
        axes.set(xlabel="step", ylabel=key, title=name)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
