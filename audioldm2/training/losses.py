"""The diffusion loss: what a UNet should predict, and how much each noise level counts.

A training example is a latent x_0 with noise eps added at a timestep t (Ho et al. 2020, algorithm 1):

    x_t = alpha x_0 + sigma eps        alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), SNR = alpha^2 / sigma^2

and the loss is the mean squared error of the prediction, times a weight for its timestep. What is predicted
is the checkpoint's: its scheduler's `prediction_type` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from audioldm2.arguments import check_choice
from audioldm2.schedulers.prediction import PREDICTION_TYPES

# What a scheduler's config leaves out (diffusers' default).
DEFAULT_PREDICTION = "epsilon"


def prediction_type(config: Mapping[str, Any]) -> str:
    """What the network of a checkpoint predicts, from its scheduler's config.

    Raises:
        ValueError: it is not one of `PREDICTION_TYPES`.
    """
    kind: str = config.get("prediction_type", DEFAULT_PREDICTION)
    check_choice("prediction_type", kind, PREDICTION_TYPES)
    return kind


def diffusion_target(kind: str, clean: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the network should predict.

        epsilon       eps
        sample        x_0
        v_prediction  v = alpha eps - sigma x_0     (Salimans and Ho 2022, appendix D)

    Args:
        kind: one of `PREDICTION_TYPES`.
        clean: x_0, (B, ...).
        noise: eps, (B, ...).
        alphas_cumprod: abar of each example's timestep, (B,).

    Returns:
        (B, ...).
    """
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    level = alphas_cumprod.reshape(-1, *[1] * (clean.dim() - 1))  # (B, 1, ...)
    return level.sqrt() * noise - (1 - level).sqrt() * clean


def min_snr_weights(kind: str, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """The weight of each timestep's loss by min-SNR-gamma (Hang et al. 2023, "Efficient Diffusion Training
    via Min-SNR Weighting Strategy", section 3.4), (T,) -> (T,).

    The paper's weight of an error in x_0 is min(SNR, gamma): timesteps with little noise, of which a network
    has little to learn, do not crowd out the others. As a weight of an error in what is predicted, it is

        epsilon       min(SNR, gamma) / SNR
        sample        min(SNR, gamma)
        v_prediction  min(SNR + 1, gamma) / (SNR + 1)

    The paper's for v has SNR in place of SNR + 1 in the minimum, which gives pure noise (SNR = 0) no weight;
    a checkpoint whose last timestep is pure noise has to learn it, too. diffusers' training scripts add the 1
    in the same place.

    Args:
        kind: one of `PREDICTION_TYPES`.
        alphas_cumprod: abar of the training steps, (T,).
        gamma: the paper's is 5.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if kind == "sample":
        return snr.clamp(max=gamma)
    if kind == "v_prediction":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))  # also where SNR = 0


def drop_conditions(rows: Tensor, uncond: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Replace some captions by the empty one, which teaches the UNet what guidance subtracts (Ho and Salimans
    2022, algorithm 1).

    Args:
        rows: of the captions, (B,).
        uncond: the row of the empty prompt for each of all captions, (n,).
        probability: of a replacement.
        generator: decides which.

    Returns:
        The rows of what the UNet attends to, (B,).
    """
    dropped = torch.rand(len(rows), generator=generator) < probability
    return torch.where(dropped, uncond[rows], rows)


def spread_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Timesteps spread evenly over all, so that every batch has all levels of noise, (count,).

    There is one in each of `count` equal parts of the range, all shifted by one random number, which makes
    each uniformly distributed (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).

    Args:
        count: B.
        total: T.
        generator: draws the shift.
    """
    shift = torch.rand(1, generator=generator)
    return ((torch.arange(count) + shift) * (total / count)).long().clamp(max=total - 1)


def weighted_mse(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The mean over the batch of each example's mean squared error, times its weight.

    Args:
        predicted: (B, ...).
        target: (B, ...).
        weights: (B,).

    Returns:
        A number, in float32.
    """
    errors = reduce((predicted.float() - target.float()).square(), "b ... -> b", "mean")
    return (weights * errors).mean()
