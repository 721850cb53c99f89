"""Generating for visitors: one generation at a time, one checkpoint in memory, and a stop within a step."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import audioldm2
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.editing.checks import strength_of
from audioldm2.quoting import one_line
from audioldm2.schedulers import as_sampler
from audioldm2.web.requests import Checkpoint, Limits, Request, in_words

if TYPE_CHECKING:
    import numpy as np

    from audioldm2.pipeline import AudioLDM2Pipeline

TICK_S = 0.25  # between two looks at whether the visitor is still there
CLOSE_S = 10.0  # to wait for the last step when the server ends
PACKAGE = str(Path(audioldm2.__file__).parent)


class Stopped(Exception):
    """The generation was stopped, by its visitor or with the server; there is no result."""


class Refused(Exception):
    """The generation is not possible; the message says why, in words for the visitor."""


@dataclass(frozen=True)
class Progress:
    """How far a generation is.

    Attributes:
        text: what is going on.
        step: sampler steps that are done.
        steps: of the sampler; 0 before and after it runs.
    """

    text: str
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Sounds:
    """The result of a generation.

    Attributes:
        request: what was asked for.
        audios: (candidates, samples), the best first.
        sampling_rate: in Hz.
        scores: CLAP's, one for each sound; () if there is only one sound.
        seconds: what the generation took.
        notes: warnings, such as that the prompt was cut.
    """

    request: Request
    audios: np.ndarray[Any, Any]
    sampling_rate: int
    scores: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...] = field(default=())


class Studio:
    """Runs generations for a page and its API.

    Args:
        load: loads the pipeline of a checkpoint, by name.
        checkpoints: those that can be chosen, by name; the first is the default.
        limits: the most that a request may ask for.
        log: receives a line about each generation, without its prompt.
    """

    def __init__(
        self,
        load: Callable[[str], AudioLDM2Pipeline],
        checkpoints: Mapping[str, Checkpoint],
        limits: Limits,
        log: Callable[[str], None],
    ):
        self.checkpoints = checkpoints
        self.limits = limits
        self._load = load
        self._log = log
        self._loaded: tuple[str, AudioLDM2Pipeline] | None = None
        self._device = threading.Lock()  # held by the generation that uses the device
        self._running: set[threading.Event] = set()

    def load(self, name: str) -> AudioLDM2Pipeline:
        """The pipeline of a checkpoint. It replaces the one in memory, which is dropped first."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            self._loaded = name, self._load(name)
        return self._loaded[1]

    @property
    def busy(self) -> bool:
        """Whether a generation uses the device."""
        return self._device.locked()

    def close(self) -> None:
        """Stop what is running, and wait for the end of its step."""
        for stop in tuple(self._running):
            stop.set()
        if self._device.acquire(timeout=CLOSE_S):
            self._device.release()

    def run(self, request: Request, stop: threading.Event) -> Iterator[Progress | Sounds]:
        """Generate in a thread of its own.

        Args:
            request: what to generate.
            stop: set it to stop the generation within a step. Closing the iterator does that, too.

        Yields:
            The progress, at least every `TICK_S` seconds, and last the sounds.

        Raises:
            Stopped: `stop` was set.
            Refused: the generation is not possible.
        """
        messages: queue.SimpleQueue[Progress | Sounds | Exception] = queue.SimpleQueue()
        self._running.add(stop)
        # A daemon, so that a step of minutes cannot keep a server alive that was told to end.
        threading.Thread(target=self._work, args=(request, stop, messages.put), daemon=True).start()
        progress = Progress("Waiting for the device")
        try:
            while True:
                yield progress
                try:
                    message = messages.get(timeout=TICK_S)
                    while isinstance(message, Progress) and not messages.empty():
                        message = messages.get()  # the newest
                except queue.Empty:
                    continue
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Sounds):
                    yield message
                    return
                progress = message
        finally:
            stop.set()
            self._running.discard(stop)

    def _work(self, request: Request, stop: threading.Event, put: Callable[[Any], None]) -> None:
        """Generate, and send the progress and the sounds, or the error that ended it."""
        begin = time.monotonic()
        try:
            with self._device:
                sounds = self._generate(request, stop, put)
        except Exception as error:
            # A new error, because this one's traceback would keep the tensors of the generation alive.
            put(self._explained(error, request))
        else:
            put(sounds)
            self._log(
                f"{request.checkpoint}: {len(sounds.audios)} x "
                f"{sounds.audios.shape[1] / sounds.sampling_rate:.3g} s, {request.steps} steps "
                f"in {time.monotonic() - begin:.1f} s"
            )

    def _generate(self, request: Request, stop: threading.Event, put: Callable[[Any], None]) -> Sounds:
        import torch

        from audioldm2.editing.generations import with_inverted, with_prompts
        from audioldm2.editing.variation import first_step

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
            check_stop()
            done = step + 1
            text = "Denoising" if done < steps else "Decoding"
            put(Progress(text, done, steps))

        def on_inversion(done: int, steps: int) -> None:
            check_stop()
            put(Progress("Inverting", done, steps))

        def check_stop() -> None:
            if stop.is_set():
                raise Stopped

        check_stop()
        sound, steps = None, request.steps
        if request.audio is not None:
            put(Progress("Reading the sound"))
            sound = self._read(request.audio, request.extend)
            steps = (
                request.taken_steps
                if request.invert
                else steps - first_step(steps, strength_of(request.edits))
            )
        if self._loaded is None or self._loaded[0] != request.checkpoint:
            put(Progress(f"Loading {request.checkpoint}"))
        pipe = self.load(request.checkpoint)
        check_stop()
        put(Progress("Encoding the prompt"))
        pipe.scheduler = as_sampler(request.sampler, pipe.scheduler)
        arguments: dict[str, Any] = {
            **request.edits,
            **request.sampling,
            "audio_length_in_s": request.duration,
            "transcription": request.speech,
            "num_waveforms_per_prompt": request.candidates,
            "generator": torch.Generator(pipe.device).manual_seed(request.seed),
        }
        begin = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if sound is not None and request.invert:
                arguments = with_inverted(
                    pipe,
                    arguments,
                    *sound,
                    method=request.invert,
                    source_prompt=request.source_prompt,
                    skip=request.skip,
                    callback=on_inversion,
                )
            elif sound is not None:
                arguments["audio"], arguments["sampling_rate"] = sound
            blend, word_weights = request.weights.values()
            output = pipe(
                negative_prompt=request.negative or None,
                callback_on_step_end=on_step_end,
                **with_prompts(pipe, arguments, [request.prompt], [blend], [word_weights]),
            )
        check_stop()
        # Other threads' warnings are caught, too.
        notes = [in_words(one_line(w.message)) for w in caught if w.filename.startswith(PACKAGE)]
        return Sounds(
            request,
            output.audios,
            output.sampling_rate,
            () if output.scores is None else tuple(float(score) for score in output.scores),
            time.monotonic() - begin,
            tuple(dict.fromkeys(notes)),
        )

    def _read(self, path: str, extend: float | None) -> tuple[Any, int]:
        """A sound to edit, (channels, samples), and its sampling rate.

        Raises:
            Refused: it cannot be read, or is too long.
        """
        from audioldm2.audio.sound_file import read_sound

        longest = self.limits.duration
        try:
            waveform, rate = read_sound(path, longest)
        except ImportError:
            raise Refused("this server reads only WAV files; convert the sound to WAV") from None
        except (OSError, ValueError) as error:
            raise Refused(one_line(error).replace(path, "the sound")) from error
        if waveform.shape[1] / rate + (extend or 0) > longest:
            raise Refused(f"the sound would become longer than {longest:g} s; add less time")
        return waveform, rate

    def _explained(self, error: Exception, request: Request) -> Exception:
        """An error for the visitor; what only the owner of the server should read goes to the log."""
        if isinstance(error, Stopped):
            self._log(f"{request.checkpoint}: stopped")
            return Stopped()
        if isinstance(error, Refused):
            return Refused(str(error))
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return Refused("the server is out of memory; choose a shorter length or fewer candidates")
        if isinstance(error, ValueError | TypeError) and not isinstance(error, CheckpointError):
            return Refused(in_words(one_line(error)))
        self._log(f"{request.checkpoint}: error: {type(error).__name__}: {one_line(error)}")
        loading = isinstance(error, CheckpointError)
        what = "the checkpoint cannot be loaded" if loading else "an error occurred"
        return Refused(f"{what}; the server's log says why")
