"""The command line: `audioldm2 "a hammer hits wood" -o hammer.wav`.

Nothing heavy is imported before the arguments are read, so that `--help` and a slip answer at once.
Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from audioldm2 import __version__
from audioldm2.arguments import MAX_LENGTH_IN_S, as_texts, check_length

PROGRAM = "audioldm2"
SCHEDULERS = {"ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}
DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Make sound from a description with AudioLDM 2.

The description works best as a sentence that says what is heard, how and where: "A hammer hits a wooden
surface", "Slow rain on a tin roof, far thunder". What is not wanted goes into --negative.

--model tiny takes the small checkpoint that lies in this package and needs no download. It knows synthetic
sounds only: tones (low, middle, high), sweeps, scales and arpeggios (rising, falling), pulses, clicks and
drums (slow, fast), sirens, bells, plucked and struck notes, noise, rain, wind, waves, engines and birds; loud
or soft, and one over another: "A bell over rain".
"""
EXAMPLES = """\
examples:
  audioldm2 "A low steady tone" --model tiny
  audioldm2 "A rising sweep" -o sweep.wav --model tiny --spectrogram sweep.png
  audioldm2 "A hammer hits a wooden surface" -o hammer.wav
  audioldm2 "Techno with a strong beat" -o techno.wav --negative "Low quality" --duration 20 --seed 7
  audioldm2 "Birds in a wood" -o birds.wav --candidates 3 --spectrogram birds.png
  audioldm2 "Rain" -o rain.wav --model ./my-checkpoint --scheduler ddim --steps 200

exit codes: 0 done, 2 an argument is wrong, 1 anything else. Nothing half-written is left behind.
"""

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong argument gets one line and not the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help explains\n")


def parser() -> Parser:
    """The options, and the help that explains them."""
    p = Parser(
        PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("prompt", help="what to hear")
    p.add_argument("-o", "--output", default="audio.wav", metavar="WAV", help="the sound file (%(default)s)")
    p.add_argument(
        "--format",
        choices=("pcm16", "float32"),
        default="pcm16",
        help="of the samples in the file: 16-bit, or 32-bit floats (%(default)s)",
    )
    p.add_argument("--spectrogram", metavar="PNG", help="also draw the sound (needs audioldm2[plot])")

    sound = p.add_argument_group("the sound")
    sound.add_argument("--negative", metavar="TEXT", help='what to steer away from, such as "Low quality"')
    sound.add_argument(
        "--transcription", metavar="TEXT", help="the words to say; for speech checkpoints only"
    )
    sound.add_argument(
        "--duration",
        type=_seconds,
        metavar="SECONDS",
        help=f"up to {MAX_LENGTH_IN_S:g}; as long as the sounds of the training where not given (10.24, or "
        "5.12 with tiny)",
    )
    sound.add_argument(
        "--candidates",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="make N sounds and keep the one that CLAP finds nearest to the prompt (%(default)s)",
    )
    sound.add_argument(
        "--seed",
        type=_number(int, 0, 2**63 - 1),
        metavar="N",
        help="the same seed gives the same sound; one is drawn and told where not given",
    )

    quality = p.add_argument_group("quality against time")
    quality.add_argument(
        "--scheduler",
        choices=tuple(SCHEDULERS),
        default="dpmsolver++",
        help="the sampler; dpmsolver++ needs a tenth of ddim's steps (%(default)s)",
    )
    quality.add_argument(
        "--steps", type=_number(int, 1), metavar="N", help="20 for dpmsolver++, 200 for ddim where not given"
    )
    quality.add_argument(
        "--guidance",
        type=_number(float, 0),
        default=3.5,
        metavar="W",
        help="how closely to follow the prompt; 1 or less is no guidance, in half the time (%(default)s)",
    )

    machine = p.add_argument_group("the machine")
    machine.add_argument(
        "--model",
        default="cvssp/audioldm2",
        metavar="NAME",
        help="a repository on the Hugging Face Hub (also cvssp/audioldm2-large, cvssp/audioldm2-music), a "
        "folder, or tiny, which needs no download (%(default)s)",
    )
    machine.add_argument("--device", help="cpu, cuda, cuda:1, mps; the GPU if there is one where not given")
    machine.add_argument(
        "--dtype", choices=DTYPES, help="float16 on a GPU, float32 elsewhere where not given"
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile every stage: minutes at the first start, faster after; for long work on a GPU",
    )
    machine.add_argument("--quiet", action="store_true", help="no progress bars")
    machine.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    machine.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return p


def _number(kind: type[Number], low: Number, high: Number | None = None) -> Callable[[str], Number]:
    """A type for argparse: a finite number of a range."""

    def parse(text: str) -> Number:
        with suppress(ValueError):
            value = kind(text)
            if low <= value < float("inf") and (high is None or value <= high):  # false of NaN, too
                return value
        what = "a whole number" if kind is int else "a number"
        upper = f" to {high}" if high is not None else " or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} of {low}{upper}")

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        check_length(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds, more than 0 and up to {MAX_LENGTH_IN_S:g}"
        ) from None
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad arguments, 1 for everything else.

    Args:
        arguments: without the program's name; None is what the program was called with.
    """
    p = parser()
    options = p.parse_args(arguments)
    try:
        as_texts("the prompt", options.prompt)
        if options.transcription is not None:
            as_texts("--transcription", options.transcription)
        if options.negative is not None:
            as_texts("--negative", options.negative, empty=True)
    except ValueError as error:
        p.error(str(error))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(p, options)
    except KeyboardInterrupt:
        return _failed("stopped; nothing half-written is left", options.debug)
    except Exception as error:
        return _failed(_reason(error), options.debug)


def _run(p: Parser, options: argparse.Namespace) -> int:
    # What can be refused without the seconds that PyTorch takes to import comes first.
    output = Path(options.output)
    picture = Path(options.spectrogram) if options.spectrogram else None
    if picture is not None and picture.resolve() == output.resolve():
        p.error("--output and --spectrogram name the same file")

    import torch

    from audioldm2.audio.spectrogram_image import check_can_draw, save_spectrogram
    from audioldm2.audio.wav import check_writable, write_wav
    from audioldm2.runtime.device import available_device

    check_writable(output)
    if picture is not None:
        check_can_draw()
        check_writable(picture)
    try:
        device = available_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        p.error(f"argument --device: {error}")
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")

    # Its advice is for its own users; what goes wrong with a tokenizer is raised.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from audioldm2 import schedulers
    from audioldm2.pipeline import AudioLDM2Pipeline

    _say(f"loading {options.model}", options.quiet)
    pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    sampler = getattr(schedulers, SCHEDULERS[options.scheduler])
    if not isinstance(pipe.scheduler, sampler):
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    if options.compile:
        pipe.compile()

    result = pipe(
        options.prompt,
        transcription=options.transcription,
        audio_length_in_s=options.duration,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        negative_prompt=options.negative,
        num_waveforms_per_prompt=options.candidates,
        generator=torch.Generator(device).manual_seed(seed),
    )
    best = result[0][0]  # (samples,), the best candidate
    rate = pipe.vocoder.config.sampling_rate
    write_wav(output, best, rate, format=options.format)
    print(f"{output}: {len(best) / rate:.2f} s at {rate} Hz, seed {seed}")
    if picture is not None:
        save_spectrogram(picture, best, rate, title=options.prompt)
        print(f"{picture}: its spectrogram")
    return 0


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(f"{PROGRAM}: {text}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    if type(error).__name__ == "OutOfMemoryError":
        return "the device has too little memory; try --dtype float16, less --duration or fewer --candidates"
    if isinstance(error, OSError) and error.filename is not None:
        lines = [f"{error.filename}: {error.strerror}"]
    shown = " ".join(lines[:2])
    return shown if len(lines) <= 2 else f"{shown} (and {len(lines) - 2} more; --debug shows all)"


def _failed(reason: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{PROGRAM}: error: {reason}", file=sys.stderr)
    return 1


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    from tqdm import tqdm

    tqdm.write(f"{PROGRAM}: warning: {message}", file=sys.stderr)  # between the progress bars
