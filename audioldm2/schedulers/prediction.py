"""From the network's output to the clean sample x_0 and the noise eps that it implies.

In: the network's output for a noisy sample x = alpha x_0 + sigma eps, and x; both (B, C, ...). Out: estimates
of x_0 and eps, same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def x0_and_eps(
    model_output: Tensor, sample: Tensor, alpha: float, sigma: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The estimates of x_0 and eps, which depend on what the network was trained to predict.

        epsilon       x_0 = (x - sigma out) / alpha     eps = out
        sample        x_0 = out                         eps = (x - alpha out) / sigma
        v_prediction  x_0 = alpha x - sigma out         eps = alpha out + sigma x

    v is Salimans & Ho 2022 ("Progressive distillation"), appendix D.

    Args:
        model_output: the network's output, (B, C, ...).
        sample: x, (B, C, ...).
        alpha: the factor of x_0 in x, sqrt(abar).
        sigma: the factor of eps in x, sqrt(1 - abar).
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        x_0 and eps, both (B, C, ...).
    """
    if prediction_type == "epsilon":
        return (sample - sigma * model_output) / alpha, model_output
    if prediction_type == "sample":
        return model_output, (sample - alpha * model_output) / sigma
    return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Dynamic thresholding of an estimate of x_0, (B, C, ...) -> same (Saharia et al. 2022, section 2.3).

    For each item of the batch, s is the quantile of |x_0| at `ratio`, clamped to [1, `max_value`]; x_0 is
    clipped to [-s, s] and divided by s. This brings values that guidance pushed out of [-1, 1] back into
    range without saturating all of them at its ends.

    Args:
        x0: the estimate, (B, C, ...).
        ratio: the quantile, from 0 to 1.
        max_value: the upper limit of s.
    """
    flat = x0.flatten(1)  # (B, C * ...)
    flat = flat.to(torch.promote_types(x0.dtype, torch.float32))  # quantile needs at least float32
    s = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=max_value)  # (B, 1)
    return (flat.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)
