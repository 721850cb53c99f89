"""Classifier-free guidance: how strongly, at which steps, and how its result is scaled.

    noise = uncond + w (cond - uncond)                      (Ho and Salimans 2021, eq. 6; their 1 + w is w)

uncond and cond are the UNet's predictions without and with the prompt. At steps outside of an interval the
UNet runs for cond alone, in half of the time (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
Interval", eq. 5). Large weights make latents too large; rescaling brings their standard deviation back
towards that of cond (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
eqs. 15 and 16):

    noise' = phi std(cond) / std(noise) noise + (1 - phi) noise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audioldm2.arguments import check_choice, check_number, is_finite
from audioldm2.quoting import quoted

if TYPE_CHECKING:  # the command line checks its options before PyTorch is imported
    from torch import Tensor

ALL_STEPS = (0.0, 1.0)
# What guidance steers away from without a negative prompt: the empty text, or zeros for GPT-2's vectors.
UNCONDITIONAL = ("text", "zeros")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance.

    Attributes:
        scale: the weight w; 1 or less is no guidance.
        interval: the steps with guidance, as fractions of the run: step i of N has it if
            start <= i / N < end.
        rescale: the weight phi of the rescaled prediction, from 0 to 1.
    """

    scale: float
    interval: tuple[float, float] = ALL_STEPS
    rescale: float = 0.0

    def has_step(self, step: int, steps: int) -> bool:
        """Whether a step, counted from 0, is in the interval."""
        start, end = self.interval
        return start <= step / steps < end


def guide(noise: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Guide a prediction.

    Args:
        noise: the halves uncond and cond of a batch, (2 B, ...).
        scale: the weight w.
        rescale: the weight phi.

    Returns:
        (B, ...).
    """
    uncond, cond = noise.chunk(2)
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    axes = tuple(range(1, cond.dim()))
    # A constant prediction has no standard deviation to bring back.
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
    return rescale * ratio * guided + (1 - rescale) * guided


def guidance_of(scale: Any, interval: Any, rescale: Any, default: Any = None) -> Guidance:
    """The arguments of a generation, checked.

    Args:
        scale: `guidance_scale`.
        interval: `guidance_interval`.
        rescale: `guidance_rescale`.
        default: used if `interval` is None and there is guidance; None is all steps.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or has no effect without guidance.
    """
    check_number("guidance_scale", scale)
    if interval is None and scale > 1:
        interval = default
    if not is_finite(rescale) or not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be a number from 0 to 1, got {quoted(rescale)}")
    if interval is not None:
        if not isinstance(interval, list | tuple) or len(interval) != 2 or not all(map(is_finite, interval)):
            raise TypeError(
                "guidance_interval must be two fractions of the steps such as (0, 0.75), got "
                f"{quoted(interval)}"
            )
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (start, end) with 0 <= start < end <= 1, got {quoted(interval)}"
            )
    if not scale > 1:
        for name, given in (("guidance_interval", interval is not None), ("guidance_rescale", rescale != 0)):
            if given:
                raise ValueError(
                    f"{name} has no effect without guidance; pass a guidance_scale greater than 1"
                )
    start, end = ALL_STEPS if interval is None else interval
    return Guidance(float(scale), (float(start), float(end)), float(rescale))


def check_unconditional(unconditional: Any, guided: bool, has_negative: bool) -> None:
    """Check the argument `unconditional` of a generation.

    Args:
        unconditional: one of `UNCONDITIONAL`.
        guided: whether there is guidance.
        has_negative: whether there is a negative prompt.

    Raises:
        ValueError: it is something else, or "zeros" with a negative prompt or without guidance.
    """
    check_choice("unconditional", unconditional, UNCONDITIONAL)
    if unconditional == UNCONDITIONAL[0]:
        return
    if has_negative:
        raise ValueError(
            "unconditional = 'zeros' cannot be combined with a negative prompt; leave out one of them"
        )
    if not guided:
        raise ValueError("unconditional has no effect without guidance; pass a guidance_scale greater than 1")
