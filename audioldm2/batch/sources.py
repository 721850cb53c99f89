"""The sounds that jobs edit: checked when a batch is planned, and found unchanged when they are used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from audioldm2.batch.jobs import Job
from audioldm2.editing.checks import OF_EDITS
from audioldm2.editing.edit import edit_of
from audioldm2.editing.sources import latent_samples
from audioldm2.pipeline import AudioLDM2Pipeline


class InputFile(NamedTuple):
    """The sound that a job edits.

    Attributes:
        path: an absolute path, as an engine may have another working directory.
        sha256: of the file.
        samples: what is used of it, at the checkpoint's rate.
        length: of the result, in seconds.
        strength: of the edit; None if the job has none.
    """

    path: str
    sha256: str
    samples: int
    length: float
    strength: float | None


def input_file(job: Job, pipe: AudioLDM2Pipeline) -> InputFile | None:
    """The sound of a job, checked with what the job does with it; None if the job has none.

    Raises:
        ValueError, TypeError: the sound cannot be read, or not be edited like this.
    """
    if job.audio is None:
        return None
    rate, row = pipe.part("vocoder").config.sampling_rate, latent_samples(pipe)
    try:
        settings = {name: getattr(job, name) for name in OF_EDITS}
        edit = edit_of(job.audio, None, **settings, loop=bool(job.loop))
        digest = sha256(job.audio)
    except OSError as error:
        raise ValueError(f"{job.audio}: {error.strerror or error}") from error
    except ImportError as error:  # without soundfile, a WAV file can be read all the same
        raise ValueError(str(error)) from error
    assert edit is not None
    samples = edit.waveforms(pipe.log_mel_config(), job.audio_length_in_s, shortest=row / rate).shape[1]
    length = edit.samples(samples, row, rate) / rate
    strength = None if job.extend is not None or job.invert is not None else edit.strength
    return InputFile(os.path.abspath(job.audio), digest, samples, length, strength)


def check_unchanged(source: InputFile | None) -> None:
    """Raise ValueError if the file of a source has changed since the batch was planned."""
    if source is not None and sha256(source.path) != source.sha256:
        raise ValueError(f"{source.path} has changed since the batch began; run the batch again")


def sha256(path: str | Path) -> str:
    """The SHA-256 digest of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
