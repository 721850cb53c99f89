"""How a generation's output looks in a notebook: HTML with a player and a plot for each sound.

IPython is not imported. Players contain their sound as a WAV file, plots are PNG images, and both are part of
the HTML, so that they stay in a saved notebook. The size of the HTML is bounded.
"""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from audioldm2.audio.wav import write_wav
from audioldm2.figures import png
from audioldm2.plots import plot_sound

MAX_SOUNDS = 8  # that are shown
MAX_SECONDS = 120.0  # of all players together, 5 MB of HTML at 16 kHz
PLOT_DPI = 70  # 630 pixels wide


def output_html(output: Any) -> str:
    """HTML with the sounds of a generation, in their order, each with its score if it was ranked.

    Plots are left out, with a line that says why, if matplotlib is missing. Sounds are left out, with a
    line that says how many, after the first 8 and after two minutes.

    Args:
        output: what the pipeline returned. Latents, and anything else that is not waveforms, are only
            described.

    Raises:
        TypeError, ValueError: waveforms that cannot be written, such as those with NaN.
    """
    audios, scores, rate = output.audios, output.scores, output.sampling_rate
    if getattr(audios, "ndim", None) != 2 or 0 in audios.shape:
        return _paragraph(repr(output))
    seconds = audios.shape[1] / rate
    shown = min(len(audios), MAX_SOUNDS, int(MAX_SECONDS / seconds))
    parts, missing = [], ""
    for number, audio in enumerate(audios[:shown]):
        heading = f"{number + 1} of {len(audios)}: {seconds:.2f} s"
        if scores is not None:
            heading += f", score {float(scores[number]):.3f}"
        parts.append(f"<div><p>{escape(heading)}</p>{_player(audio, rate)}")
        try:
            parts.append(_plot(audio, rate, f"waveform and spectrogram of sound {number + 1}"))
        except ImportError as error:
            missing = str(error)
        parts.append("</div>")
    if missing:
        parts.append(_paragraph(f"No plots: {missing}"))
    if shown < len(audios):
        parts.append(
            _paragraph(
                f"{len(audios) - shown} of {len(audios)} sounds, {seconds:.2f} s each, are not shown here; "
                "write_wav writes them to files."
            )
        )
    return f"<div>{''.join(parts)}</div>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _player(audio: Any, sampling_rate: int) -> str:
    file = io.BytesIO()
    write_wav(file, audio, sampling_rate)
    return f'<audio controls preload="metadata" src="{_data_url("audio/wav", file.getvalue())}"></audio>'


def _plot(audio: Any, sampling_rate: int, description: str) -> str:
    url = _data_url("image/png", png(plot_sound(audio, sampling_rate), PLOT_DPI))
    return f'<br><img alt="{escape(description)}" style="max-width: 100%" src="{url}">'


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
