"""Which timesteps of N lose least: a search by the distance from the samples of many steps.

The samples of a run are compared with those of 200 steps of DPM-Solver++ from the same noise: the root mean
square of the difference of the final latents over that of the latents, in percent. It is searched twice.

1. In a smooth family with two parameters. Step i of N is at s = 1 - i / N, and visits the timestep

       t(s) = T (1 - (1 - s^a)^b) - 1        rounded; T training steps

   a = b = 1 is "trailing" spacing. a > 1 spaces the steps more densely at the end, where noise is low,
   and b > 1 at the beginning. The curve is the distribution function of Kumaraswamy 1980.

2. From the best of the family, one timestep after the other is moved as long as the distance falls, by
   smaller and smaller amounts. Only the first one stays: a run begins at the noise it starts from.

The distance is measured on prompts and noise of its own (see `scripts/optimize_timesteps`), since a search on
few sounds finds what suits these sounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline
from audioldm2.conditioning import PromptInputs, condition
from audioldm2.guidance import guide
from audioldm2.sampling import Predict, predictor
from audioldm2.schedulers import as_sampler
from scripts.tiny.evaluate.generation import equal_length_batches, seeded_noise
from scripts.tiny.evaluate.prompts import Prompt

FAMILY_MOVES = (0.4, 0.2, 0.1)  # of log a and log b
TIMESTEP_MOVES = (32, 16, 8)

Progress = Callable[[], object]
Distance = Callable[[Sequence[int]], float]  # of a run over these timesteps


class Batch(NamedTuple):
    """Some prompts: the UNet with their conditioning, their noise, and the samples of many steps from it."""

    predict: Predict
    noise: Tensor
    reference: Tensor


class Curve(NamedTuple):
    """A member of the family, and its distance."""

    a: float
    b: float
    distance: float


# ------------------------------------------------------------ distances


@torch.inference_mode()
def make_batches(
    pipe: AudioLDM2Pipeline,
    prompts: Sequence[Prompt],
    *,
    guidance: float,
    size: int,
    steps: int,
    progress: Progress = lambda: None,
) -> list[Batch]:
    """The prompts in batches that need no padding, with their samples at `steps` steps of DPM-Solver++."""
    sampler = as_sampler("dpmsolver++", pipe.scheduler)
    sampler.set_timesteps(steps)
    batches = []
    for indices in equal_length_batches(pipe, prompts, size):
        texts = PromptInputs("prompt", [prompts[i].text for i in indices])
        conditioning = condition(pipe, texts, PromptInputs("negative_prompt", None))
        predict = predictor(pipe.unet, conditioning)
        noise = torch.cat([seeded_noise(pipe, prompts[i].seed) for i in indices])
        batches.append(Batch(predict, noise, sampled(sampler, predict, noise, guidance, progress)))
    return batches


def sampled(
    sampler: Any, predict: Predict, noise: Tensor, guidance: float, progress: Progress = lambda: None
) -> Tensor:
    """The samples of a run over the sampler's timesteps, (B, C, T, F)."""
    latents: Tensor = noise * sampler.init_noise_sigma
    for t in sampler.timesteps:
        latents = sampler.step(guide(predict(latents, t), guidance), t, latents).prev_sample
        progress()
    return latents


@torch.inference_mode()
def distance(sampler: Any, batches: Sequence[Batch], guidance: float) -> float:
    """How far the samples of the sampler's timesteps are from the references, in percent."""
    difference = power = 0.0
    for batch in batches:
        samples = sampled(sampler, batch.predict, batch.noise, guidance)
        difference += (samples - batch.reference).double().pow(2).sum().item()
        power += batch.reference.double().pow(2).sum().item()
    return 100 * math.sqrt(difference / power)


# ------------------------------------------------------------ the search


def curve_timesteps(a: float, b: float, number: int, total: int) -> list[int]:
    """N timesteps of the family, from T - 1 down; the module docstring has the formula."""
    timesteps: list[int] = []
    for i in range(number):
        t = round(total * (1 - (1 - (1 - i / number) ** a) ** b)) - 1
        highest = total - 1 if not timesteps else timesteps[-1] - 1
        timesteps.append(max(min(t, highest), number - 1 - i))  # different, and none is negative
    return timesteps


def search_family(measure: Distance, number: int, total: int, start: tuple[float, float]) -> Curve:
    """The best member of the family, by moves of one parameter at a time."""
    known: dict[tuple[float, float], float] = {}

    def at(log_a: float, log_b: float) -> float:
        point = round(log_a, 3), round(log_b, 3)
        if point not in known:
            known[point] = measure(curve_timesteps(math.exp(point[0]), math.exp(point[1]), number, total))
        return known[point]

    best = math.log(start[0]), math.log(start[1])
    for move in FAMILY_MOVES:
        moves = ((move, 0.0), (-move, 0.0), (0.0, move), (0.0, -move))
        while True:
            nearest = min(((best[0] + x, best[1] + y) for x, y in moves), key=lambda point: at(*point))
            if at(*nearest) >= at(*best):
                break
            best = nearest
    return Curve(math.exp(best[0]), math.exp(best[1]), at(*best))


def search_timesteps(measure: Distance, start: Sequence[int], known: float) -> tuple[list[int], float]:
    """Move one timestep at a time as long as the distance falls.

    Args:
        measure: the distance of a list of timesteps.
        start: the timesteps to begin with; the first one stays.
        known: their distance.

    Returns:
        The timesteps, and their distance.
    """
    best, lowest = list(start), known
    for size in TIMESTEP_MOVES:
        for i in range(1, len(best)):
            for move in (size, -size):
                while (moved := [*best[:i], best[i] + move, *best[i + 1 :]]) and falls(moved):
                    found = measure(moved)
                    if found >= lowest:
                        break
                    best, lowest = moved, found
    return best, lowest


def falls(timesteps: Sequence[int]) -> bool:
    """Whether each is lower than the one before, and none is negative."""
    return timesteps[-1] >= 0 and all(timesteps[i] > timesteps[i + 1] for i in range(len(timesteps) - 1))
