"""What a fine-tune is trained on, and its losses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models.unet import UNet
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.schedulers.noise_schedule import mix_noise
from audioldm2.training.data import EncodedData
from audioldm2.training.loop import Processes
from audioldm2.training.losses import (
    diffusion_target,
    drop_conditions,
    min_snr_weights,
    prediction_type,
    spread_timesteps,
    weighted_mse,
)
from audioldm2.training.options import FinetuneOptions
from audioldm2.training.table import Item, hold_out, read_table

VALIDATION = "validation"  # the name of that loss
VALIDATION_TIMESTEPS = 8  # of each held-out example
VALIDATION_SEED = 0  # of their noise, whatever the run's seed is


@dataclass(frozen=True)
class Items:
    """The rows of all tables: to train on, to rehearse, and held out."""

    train: list[Item]
    rehearse: list[Item]
    validation: list[Item]

    @classmethod
    def read(cls, table: str | Path, options: FinetuneOptions) -> Items:
        """Read the tables that the options name.

        Raises:
            OSError, ValueError: one that cannot be used; the message names its line.
        """
        rows = read_table(table)
        rehearse = [] if options.rehearse is None else read_table(options.rehearse)
        if isinstance(options.validation, str | Path):
            return cls(rows, rehearse, read_table(options.validation))
        kept, held = hold_out(rows, options.validation, options.seed)
        return cls(kept, rehearse, held)

    @property
    def all(self) -> list[Item]:
        """All of them, in this order."""
        return [*self.train, *self.rehearse, *self.validation]


class Examples(NamedTuple):
    """B training examples: the UNet's arguments in their order, and what it should predict.

    Attributes:
        noisy: latents, (B, C, T, F).
        timesteps: (B,).
        vectors: GPT-2's.
        states: T5's.
        mask: of the states.
        target: (B, C, T, F).
    """

    noisy: Tensor
    timesteps: Tensor
    vectors: Tensor
    states: Tensor
    mask: Tensor
    target: Tensor

    def select(self, chosen: Tensor) -> Examples:
        """Some of them, by a boolean mask, (B,)."""
        return Examples(*(part[chosen] for part in self))


def frozen_copy(unet: UNet, share: bool) -> UNet:
    """A UNet as it is now, to learn from.

    Args:
        unet: the original, which will be trained.
        share: share its weights instead of copying them; right if only an adapter will be trained.
    """
    teacher = copy.deepcopy(unet, {id(p): p for p in unet.parameters()} if share else {})
    return teacher if share else teacher.requires_grad_(False)


class Task:
    """The losses of a fine-tune.

    What is rehearsed has as its target not the sound itself but what the UNet predicted of it before the
    fine-tune (Li and Hoiem 2016, "Learning without Forgetting"). So it stays as it was, also if it was
    trained in another way than this.

    Args:
        pipe: its UNet is trained, on the targets that its scheduler's config says.
        data: of all items.
        items: which of them are for what.
        options: of the fine-tune.
        processes: each computes the loss of its share of a batch, all of which draw the whole batch: so the
            result is the same for any number of processes, up to rounding.
    """

    def __init__(
        self,
        pipe: AudioLDM2Pipeline,
        data: EncodedData,
        items: Items,
        options: FinetuneOptions,
        processes: Processes,
    ):
        self.pipe, self.data, self.options, self.processes = pipe, data, options, processes
        self.kind = prediction_type(pipe.scheduler.config)
        self.abar = pipe.scheduler.alphas_cumprod.float().cpu()  # (T,)
        self.weights = torch.ones_like(self.abar)
        if options.min_snr is not None:
            self.weights = min_snr_weights(self.kind, self.abar, options.min_snr)
        ends = [len(items.train), len(items.train) + len(items.rehearse)]
        # An adapter leaves the UNet's own weights as they are.
        self.teacher = frozen_copy(pipe.unet, share=not options.full) if items.rehearse else None
        self.train = torch.nonzero(data.items < ends[0])[:, 0]
        self.rehearse = torch.nonzero((data.items >= ends[0]) & (data.items < ends[1]))[:, 0]
        self.validation = torch.nonzero(data.items >= ends[1])[:, 0]

    def loss(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of one batch: "loss", weighted by timestep, and "mse", not weighted."""
        options, batch = self.options, self.options.batch_size
        rehearsed = 0
        if len(self.rehearse):  # on average the share that was asked for, whatever the size of a batch
            rehearsed = int(options.rehearse_share * batch + torch.rand(1, generator=generator).item())
        rows = torch.cat(
            [
                part[torch.randint(len(part), (count,), generator=generator)]
                for part, count in ((self.train, batch - rehearsed), (self.rehearse, rehearsed))
                if count
            ]
        )
        texts = drop_conditions(self.data.items[rows], self.data.texts.uncond, options.dropout, generator)
        timesteps = spread_timesteps(batch, len(self.abar), generator)
        timesteps = timesteps[torch.randperm(batch, generator=generator)]
        clean = self.data.means[rows]
        if options.latents == "sampled":
            clean = clean + self.data.spreads[rows] * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        own = slice(self.processes.index, None, self.processes.count)
        examples = self._examples(clean[own], noise[own], timesteps[own], texts[own])
        predicted, target = self._predict(self.pipe.unet, examples), examples.target
        known = (torch.arange(batch) >= batch - rehearsed)[own].to(target.device)
        if self.teacher is not None and bool(known.any()):
            with torch.no_grad():
                target[known] = self._predict(self.teacher, examples.select(known))
        weights = self.weights[timesteps[own]].to(predicted.device)
        with torch.no_grad():
            mse = F.mse_loss(predicted, target)
        return {"loss": weighted_mse(predicted, target, weights), "mse": mse}

    def validate(self, done: int) -> dict[str, float]:
        """The mean squared error on the held-out examples, always with the same noise and timesteps."""
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        middle = (torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS
        timesteps = (middle * len(self.abar)).long()
        total = 0.0
        for rows in self.validation.split(self.options.batch_size):
            for timestep in timesteps:
                clean = self.data.means[rows]
                noise = torch.randn(clean.shape, generator=generator)
                same = timestep.expand(len(rows))
                examples = self._examples(clean, noise, same, self.data.items[rows])
                predicted = self._predict(self.pipe.unet, examples)
                total += len(rows) * F.mse_loss(predicted, examples.target).item()
        return {VALIDATION: total / (len(self.validation) * len(timesteps))}

    def _examples(self, clean: Tensor, noise: Tensor, timesteps: Tensor, texts: Tensor) -> Examples:
        """Clean latents with noise at timesteps, on the device."""
        device, abar = self.pipe.device, self.abar[timesteps]
        return Examples(
            mix_noise(clean, noise, abar).to(device),
            timesteps.to(device),
            *self.data.texts.select(texts, device),
            diffusion_target(self.kind, clean, noise, abar).to(device, copy=True),
        )

    def _predict(self, unet: nn.Module, examples: Examples) -> Tensor:
        """What a UNet predicts, (B, C, T, F) float32."""
        with torch.autocast(self.pipe.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            predicted: Tensor = unet(*examples[:-1])
        return predicted.float()
