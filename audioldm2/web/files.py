"""The files of a result, a WAV file and a picture for each sound, and the files that visitors upload."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioldm2.batch.names import file_name
from audioldm2.web.studio import Sounds

MAX_NAME = 40  # characters of the prompt in a file's name
PICTURE_INCHES = (4.8, 3.6)  # small, so that its text is readable on a phone
PICTURE_DPI = 180


@dataclass(frozen=True)
class SavedSound:
    """A sound of a result.

    Attributes:
        wav: path of the WAV file.
        picture: path of the PNG file with its waveform and mel spectrogram; None if it was not drawn.
        score: CLAP's score; None if there is only one sound.
    """

    wav: str
    picture: str | None
    score: float | None


def save_sounds(sounds: Sounds, folder: Path, pictures: bool) -> list[SavedSound]:
    """Write the files of a result.

    Args:
        sounds: the result.
        folder: where each result gets a folder of its own, with a name that cannot be guessed.
        pictures: whether to draw them, which takes about half a second each.

    Returns:
        One entry for each sound, the best first.
    """
    from audioldm2.audio.wav import write_wav

    own = folder / secrets.token_hex(16)
    own.mkdir(parents=True)
    saved = []
    for number, audio in enumerate(sounds.audios, 1):
        path = own / f"{_name(sounds)}-{number}.wav"
        write_wav(path, audio, sounds.sampling_rate)
        picture = path.with_suffix(".png")
        if pictures:
            _draw(picture, audio, sounds.sampling_rate)
        score = sounds.scores[number - 1] if sounds.scores else None
        saved.append(SavedSound(str(path), str(picture) if pictures else None, score))
    return saved


def uploaded(value: Any, folder: Path) -> str | None:
    """The path of a file that a visitor uploaded.

    Args:
        value: a path from the page, Gradio's description of a file from the API, or None.
        folder: of temporary files; all others are refused.

    Raises:
        ValueError: it is not a file in the folder.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str) and "\0" not in path:
        found = Path(path).resolve()
        if found.is_relative_to(folder.resolve()) and found.is_file():
            return str(found)
    raise ValueError("the sound must be an uploaded file; with gradio_client, pass handle_file(path)")


def _name(sounds: Sounds) -> str:
    words = file_name(sounds.request.prompt[:MAX_NAME], spaces="-")
    return f"{words}-seed-{sounds.request.seed}"


def _draw(path: Path, audio: Any, sampling_rate: int) -> None:
    from audioldm2.plots import plot_sound

    figure = plot_sound(audio, sampling_rate)
    figure.set_size_inches(*PICTURE_INCHES)
    figure.savefig(path, dpi=PICTURE_DPI)
