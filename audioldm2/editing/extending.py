"""Continuing a sound past its end, window by window.

Each window begins with the end of what there is. These rows of latents are kept while the rest of the window
is generated to fit them (see `inpainting`). So the length is not limited by the model, and a window is no
longer than the sounds that it was trained on.

A loop is extended back to its beginning: the last window also ends with the rows with which the sound begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from audioldm2.windows import Around, shifted


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
    def starts(self) -> list[int]:
        """The first row of each window.

        Half of a window is kept. The last one keeps more, so as not to go past the end; that of a loop keeps
        a quarter from the end or more, and a quarter from the beginning.

        Example:
            >>> Extension(40, 100, window=40, loop=False).starts
            [20, 40, 60]
            >>> Extension(40, 100, window=40, loop=True).starts  # the last one ends with the first 10 rows
            [20, 40, 70]
        """
        if self.window >= self.rows:
            return [0]
        overlap = self.window // 2
        beyond = overlap // 2 if self.loop else 0
        starts, end = [], self.known
        while end < self.rows:
            start = max(end - overlap, 0)
            if start + self.window >= self.rows:
                start = self.rows + beyond - self.window
            starts.append(start)
            end = start + self.window
        return starts

    def around(self) -> Around | None:
        """What wraps the predictor (see `denoise`): a loop that is a single window lies on a circle."""
        return shifted() if self.loop and self.window >= self.rows else None

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
        for start in self.starts:
            index = torch.arange(start, start + window, device=latents.device) % self.rows
            replaced = index >= end
            generated = generate(result[:, :, index], replaced[:, None])
            result[:, :, index[replaced]] = generated[:, :, replaced]
            end = min(start + window, self.rows)
            if stopped():
                break
        return result[:, :, :end]
