"""Small PNG files, for pictures that are committed."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from audioldm2.atomic import replacing


def save_small(picture: Path | IO[bytes], path: Path, colors: int) -> None:
    """Write a picture as a PNG file with few colors.

    Args:
        picture: a picture that Pillow reads.
        path: the PNG file.
        colors: how many, at most 256; 48 are enough for the eye in a spectrogram.
    """
    from PIL import Image

    few_colors = Image.open(picture).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    with replacing(path.resolve()) as temporary:
        few_colors.save(temporary, format="png", optimize=True)
