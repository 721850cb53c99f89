"""Continuing a sound past its end, window by window.

Each window begins with the end of what there is. These rows of latents are kept while the rest of the window
is generated to fit them (see `inpainting`). So the length is not limited by the model, and a window is no
longer than the sounds that it was trained on.

A model whose clips fade out lets each window fade out, and the next one has to begin anew: on tiny, the level
jumps by 24 dB where windows meet. So the last quarter of a window is generated, but not used, except at the
end of the sound. The level then jumps by 2.0 dB where windows meet, and by 3.3 dB elsewhere.

A loop is extended back to its beginning: the last window also ends with the rows with which the sound begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from audioldm2.sampling import Around
from audioldm2.windows import around_predictor


@dataclass(frozen=True)
class Extension:
    """How latents are extended.

    Attributes:
        known: rows (T/4) that there are.
        rows: the length to reach.
        window: rows of each window.
        loop: whether the last row is followed by the first one.
    """

    known: int
    rows: int
    window: int
    loop: bool

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Of each window, the first row, and the row after the last one that is used.

        Half of a window is known. Its last quarter is not used, because there the model may let the sound
        end. The last window is used to its end, and more than half of it is known, so that it does not go
        past that; of a loop's, a quarter or more is the end, and a quarter is the beginning.

        Example:
            >>> Extension(40, 80, window=40, loop=False).windows
            [(20, 50), (30, 60), (40, 80)]
            >>> Extension(40, 80, window=40, loop=True).windows  # the last 10 rows of it are the first ones
            [(20, 50), (30, 60), (50, 80)]
        """
        if self.window >= self.rows:
            return [(0, self.rows)]
        quarter = self.window // 4
        windows, end = [], self.known
        while end < self.rows:
            start = max(end - self.window // 2, 0)
            end = start + self.window - quarter
            if start + self.window >= self.rows:
                start = self.rows - self.window + (quarter if self.loop else 0)
                end = self.rows
            windows.append((start, end))
        return windows

    def around(self) -> Around | None:
        """What wraps the predictor (see `denoise`): a loop that is a single window lies on a circle."""
        return around_predictor(None, loop=True) if self.loop and self.window >= self.rows else None

    def run(
        self, latents: Tensor, generate: Callable[[Tensor, Tensor], Tensor], stopped: Callable[[], bool]
    ) -> Tensor:
        """Extend latents.

        Args:
            latents: what there is, (B, channels, known, F/4).
            generate: called as generate(clean, replaced) with a window's latents, (B, channels, window, F/4),
                and which of its rows are not known, (window, 1), bool; returns the window with these
                generated.
            stopped: called after each window; whether to leave out the rest.

        Returns:
            (B, channels, rows, F/4), or fewer rows if it was stopped.
        """
        end = self.known
        added = latents.new_zeros(*latents.shape[:2], self.rows - end, latents.shape[3])
        result = torch.cat([latents, added], dim=2)
        window = min(self.window, self.rows)
        for start, next_end in self.windows:
            index = torch.arange(start, start + window, device=latents.device) % self.rows
            replaced = index >= end
            generated = generate(result[:, :, index], replaced[:, None])
            result[:, :, index[replaced]] = generated[:, :, replaced]
            end = next_end
            if stopped():
                break
        return result[:, :, :end]
