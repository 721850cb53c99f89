"""The settings of a fine-tune, checked. Imports only the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from audioldm2.adapters.config import TARGET_MODULES
from audioldm2.arguments import (
    MAX_SEED,
    as_texts,
    check_choice,
    check_count,
    check_flag,
    check_length,
    check_number,
    check_share,
)
from audioldm2.quoting import quoted

PRECISIONS = ("float32", "bf16")
LATENTS = ("sampled", "mean")
STEP_SEEDS = 1_000_003  # between the seeds of the first steps of two runs with successive seeds
LORA_RATE, FULL_RATE = 1e-4, 1e-5  # learning rates by default
# They decide what is shown and when, not what is trained.
WITHOUT_EFFECT = ("sample_every", "sample_prompts", "save_every", "validate_every")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune a UNet.

    Args:
        full: train all weights of the UNet; by default an adapter (LoRA: Hu et al. 2022) is trained.
        rank: of the adapter's matrices; more can hold more, and makes larger files.
        alpha: the adapter's output is scaled by alpha / rank; None is `rank`.
        targets: the modules that get an adapter, by the ends of their names in diffusers' UNet.
        steps: number of training steps.
        batch_size: examples per step, of all processes together.
        accumulate: batches of that size whose gradients are averaged in a step.
        rate: the highest learning rate; None is 1e-4 for an adapter and 1e-5 for all weights.
        warmup: steps in which the learning rate rises; it falls along half a cosine afterwards.
        seed: of everything random.
        min_snr: gamma of min-SNR weighting (Hang et al. 2023); None weighs all timesteps equally.
        dropout: share of the examples that get the empty prompt, for guidance.
        ema: decay of the moving average of the weights, which is what is saved; 0 turns averaging off.
        precision: "bf16" computes in bfloat16 where PyTorch's autocast does; weights stay float32.
        gradient_checkpointing: compute activations again in the backward pass, which takes less memory and a
            third more time.
        duration: seconds of each example; None is the length that the checkpoint was trained on.
        excerpts: of each file longer than that, at most; they are spread evenly over it.
        keep_level: leave the level of the sounds as it is. By default each example is centered and scaled to
            a peak of 0.5, as in AudioLDM 2's training.
        latents: "sampled" draws the latents of an example anew each time from the VAE's posterior, as in
            AudioLDM 2's training, and "mean" takes its mean.
        rehearse: another table, of sounds that should not be forgotten: what the UNet predicts of them should
            stay what it was.
        rehearse_share: of each batch, drawn from that table.
        validation: share of the files that are held out to measure the loss on, or another table.
        validate_every: steps from one validation to the next.
        sample_every: steps from one set of samples to the next; None makes none.
        sample_prompts: what is generated then.
        save_every: seconds from one saved state to the next.

    Raises:
        TypeError, ValueError: a setting that cannot be used; the message names it.
    """

    full: bool = False
    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] = TARGET_MODULES
    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    rate: float | None = None
    warmup: int = 100
    seed: int = 0
    min_snr: float | None = 5.0
    dropout: float = 0.1
    ema: float = 0.99
    precision: str = "float32"
    gradient_checkpointing: bool = False
    duration: float | None = None
    excerpts: int = 1
    keep_level: bool = False
    latents: str = "sampled"
    rehearse: str | Path | None = None
    rehearse_share: float = 0.5
    validation: float | str | Path = 0.1
    validate_every: int = 100
    sample_every: int | None = None
    sample_prompts: Sequence[str] = ()
    save_every: float = 60.0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size", "accumulate", "excerpts", "validate_every"):
            check_count(name, getattr(self, name))
        check_count("warmup", self.warmup, lowest=0)
        check_count("seed", self.seed, lowest=0, highest=MAX_SEED // STEP_SEEDS - self.steps)
        for name in ("full", "gradient_checkpointing", "keep_level"):
            check_flag(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("latents", self.latents, LATENTS)
        for name in ("alpha", "rate", "min_snr"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                if value <= 0:
                    raise ValueError(f"{name} must be more than 0, got {quoted(value)}")
        shares = ["dropout", "ema", "rehearse_share"]
        if not isinstance(self.validation, str | Path):
            shares.append("validation")
        for name in shares:
            check_share(name, getattr(self, name))
        check_number("save_every", self.save_every)
        if self.duration is not None:
            check_length(self.duration)
        as_texts("targets", list(self.targets) if not isinstance(self.targets, str) else self.targets)
        if self.sample_every is not None:
            check_count("sample_every", self.sample_every)
            if not self.sample_prompts:
                raise ValueError("sample_every needs sample_prompts, what to generate")
        if self.sample_prompts:
            as_texts("sample_prompts", list(self.sample_prompts))

    @property
    def learning_rate(self) -> float:
        """The highest learning rate."""
        return self.rate or (FULL_RATE if self.full else LORA_RATE)

    def settings(self) -> dict[str, Any]:
        """What decides the result, but for the data and the checkpoint, as JSON can hold it."""
        names = [
            field.name
            for field in fields(self)
            if field.name not in (*WITHOUT_EFFECT, "rehearse", "validation")
        ]
        found = {name: getattr(self, name) for name in names} | {"rate": self.learning_rate}
        return {
            **found,
            "targets": ", ".join([self.targets] if isinstance(self.targets, str) else self.targets),
        }
