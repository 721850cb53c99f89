"""Windows and circles of time: wrappers of what predicts the noise, for sounds of any length and for loops.

A predictor maps latents (B, C, T, F) and a timestep to the noise in them. Each wrapper returns another
predictor, so the sampler, guidance and callbacks are as without it.

MultiDiffusion (Bar-Tal et al. 2023, eq. 5): latents longer than the window are predicted in overlapping
windows of time, and each row is the mean of the predictions of all windows that contain it. The paper weighs
all of them alike. Here a window's weight falls towards its ends, where it has the least context.

Loops: the latents lie on a circle, and so do the windows. Latents no longer than a window are predicted
twice, cut at opposite points. At each evaluation the windows begin at other rows. With a single cut, even one
that moves, the fades that tiny's clips have at their ends leave gaps of 3 to 13 dB in steady sounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audioldm2.arguments import MAX_LENGTH_IN_S, is_finite
from audioldm2.quoting import quoted
from audioldm2.runtime.foreign import setting, trained_rows
from audioldm2.sampling import Around, Predict

# What the VAE sees beyond the ends of a loop. The convolutions of AudioLDM 2's decoder reach over 17 rows of
# latents, those of its encoder over 13.
CONTEXT_ROWS = 20
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly over [0, 1)


def window_starts(rows: int, window: int, overlap: int, circular: bool = False) -> list[int]:
    """Where windows of equal length begin that cover all rows, spread evenly.

    Args:
        rows: length of what is covered, at least `window`.
        window: rows of each window.
        overlap: rows that neighbors share at least, less than `window`.
        circular: whether row 0 follows the last row; windows then continue there.

    Example:
        >>> window_starts(100, 40, 20)
        [0, 20, 40, 60]
        >>> window_starts(100, 40, 20, circular=True)
        [0, 20, 40, 60, 80]
    """
    if circular:
        count = math.ceil(rows / (window - overlap))
        return [i * rows // count for i in range(count)]
    steps = math.ceil((rows - window) / (window - overlap))
    return [i * (rows - window) // max(steps, 1) for i in range(steps + 1)]


def fading_weights(window: int, overlap: int, device: torch.device | None = None) -> Tensor:
    """Weights of a window's rows, (window,): 1 in its middle, rising and falling linearly over `overlap`."""
    from_start = torch.arange(1, window + 1, dtype=torch.float32, device=device)
    distance = torch.minimum(from_start, from_start.flip(0))
    return (distance / (overlap + 1)).clamp(max=1.0)


def averaged(
    f: Callable[[Tensor], Tensor], x: Tensor, window: int, overlap: int, circular: bool = False
) -> Tensor:
    """Compute f(x) in overlapping windows of the time axis, one at a time, and average where they overlap.

    All windows have the same shape, and beyond x and the result, memory does not grow with the length.

    Args:
        f: maps (B, C, h, W) to (B', C', k h, W') for any h.
        x: (B, C, H, W). If it is no longer than a window and not circular, the result is f(x).
        window: rows of a window.
        overlap: rows that neighbors share at least, less than `window`.
        circular: whether x's last row is followed by the first one. There are two windows at least, which are
            x cut at opposite points if it is no longer than a window.

    Returns:
        (B', C', k H, W').
    """
    rows = x.shape[2]
    if circular:
        window = min(window, rows)
        overlap = min(overlap, window // 2)
    elif rows <= window:
        return f(x)
    result, weight = torch.empty(0), torch.empty(0)
    for start in window_starts(rows, window, overlap, circular):
        part = f(x[:, :, torch.arange(start, start + window, device=x.device) % rows])
        scale = part.shape[2] // window
        if len(weight) == 0:
            result = part.new_zeros((*part.shape[:2], rows * scale, part.shape[3]), dtype=torch.float32)
            weight = result.new_zeros((rows * scale, 1))
            weights = fading_weights(window * scale, overlap * scale, part.device)[:, None]
        index = torch.arange(start * scale, (start + window) * scale, device=part.device) % len(weight)
        result[:, :, index] += weights * part
        weight[index] += weights
    return result.div_(weight).to(part.dtype)


def in_windows(window: int | None, circular: bool = False) -> Around:
    """Predict latents in windows that overlap by half; see `averaged`.

    Args:
        window: rows of a window; None is the whole length.
        circular: whether the latents' last row is followed by the first one.

    Returns:
        A wrapper of predictors.
    """

    def around(predict: Predict) -> Predict:
        def windowed(latents: Tensor, t: Tensor) -> Tensor:
            rows = window or latents.shape[2]
            return averaged(lambda part: predict(part, t), latents, rows, rows // 2, circular)

        return windowed

    return around


def shifted() -> Around:
    """Predict latents on a circle, which is cut at another row each time that a predictor is wrapped.

    The shifts are the multiples of the golden ratio, so a run needs no random numbers for them.

    Returns:
        A wrapper of predictors, for one run.
    """
    cuts = itertools.count()

    def around(predict: Predict) -> Predict:
        share = next(cuts) * GOLDEN_RATIO % 1

        def on_a_circle(latents: Tensor, t: Tensor) -> Tensor:
            shift = int(share * latents.shape[2])
            return predict(latents.roll(-shift, 2), t).roll(shift, 2)

        return on_a_circle

    return around


def around_predictor(window: int | None, loop: bool) -> Around | None:
    """What wraps the predictor of one run (see `denoise`); None if nothing does.

    Args:
        window: rows of the windows in which longer latents are denoised; None denoises them at once.
        loop: whether the last row is followed by the first one.
    """
    if not loop:
        return None if window is None else in_windows(window)
    circle, windows = shifted(), in_windows(window, circular=True)
    return lambda predict: circle(windows(predict))


def window_rows(unet: Any, seconds: Any, row: float) -> int:
    """The length of a window in rows of latents.

    Args:
        unet: the window is rounded to a multiple of its downsampling, so that all feature maps fit.
        seconds: as the caller passes it; None is the length of the sounds that the UNet was trained on.
        row: seconds of a row.

    Raises:
        ValueError: not a number of seconds, or out of range; or None, and the UNet does not state a length.
    """
    multiple: int = 2 ** (len(setting(unet, "block_out_channels", (1,))) - 1)
    if seconds is None:
        rows = trained_rows(unet)
        if rows is None:
            raise ValueError("pass window, in seconds: this checkpoint does not say how long its sounds are")
        return rows
    shortest = 2 * multiple * row
    if not is_finite(seconds) or not shortest <= float(seconds) <= MAX_LENGTH_IN_S:
        raise ValueError(
            f"window must be from {shortest:g} to {MAX_LENGTH_IN_S:g} seconds, got {quoted(seconds)}"
        )
    return round(float(seconds) / (row * multiple)) * multiple


def wrap(x: Tensor, context: int, axis: int) -> Tensor:
    """Put what a circle has beyond its ends before and after it: `context` elements of an axis each."""
    length = x.shape[axis]
    return x.index_select(axis, torch.arange(-context, length + context, device=x.device) % length)


def unwrap(x: Tensor, context: int, axis: int) -> Tensor:
    """Remove what `wrap` added."""
    return x.narrow(axis, context, x.shape[axis] - 2 * context)
