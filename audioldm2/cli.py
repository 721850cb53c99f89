"""The command line: `audioldm2 "a hammer hits wood" -o hammer.wav`.

PyTorch is imported only after the arguments have been checked, so that `--help` and mistakes are answered at
once. Results go to standard output, progress and messages to standard error.
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
from audioldm2.extras import install_hint
from audioldm2.schedulers import SAMPLERS

PROGRAM = "audioldm2"
DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Generate sound from a text description with AudioLDM 2.

Describe the sound in a sentence: what makes it, how, and where. For example:
"A hammer hits a wooden surface", "Slow rain on a tin roof, distant thunder".

The default model is downloaded from the Hugging Face Hub when it is first used
(about 5 GB). "--model tiny" selects a small model that is included in this
package. It knows only synthetic sounds: tones (low, middle, high), sweeps,
scales and arpeggios (rising, falling), pulses, clicks and drums (slow, fast),
sirens, bells, plucked and struck notes, noise, rain, wind, waves, engines and
birds. They can be loud or soft, and two can be mixed: "A bell over rain".
"""
EXAMPLES = """\
examples:
  audioldm2 "A low steady tone" --model tiny --guidance 2
  audioldm2 "A rising sweep" --model tiny --guidance 2 -o sweep.wav \\
      --spectrogram sweep.png
  audioldm2 "A hammer hits a wooden surface" -o hammer.wav
  audioldm2 "Techno with a strong beat" -o techno.wav --duration 20 --seed 7 \\
      --negative "Low quality"
  audioldm2 "Birds in a forest" -o birds.wav --candidates 3
  audioldm2 "Rain" -o rain.wav --model ./my-checkpoint --scheduler ddim

exit codes:
  0  success
  1  an error occurred; no partial file is left behind
  2  an argument is invalid
"""

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser(
        PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("prompt", help="description of the sound")
    p.add_argument(
        "-o", "--output", default="audio.wav", metavar="WAV", help="file to write (default: %(default)s)"
    )
    p.add_argument(
        "--format",
        choices=("pcm16", "float32"),
        default="pcm16",
        help="format of the samples, 16-bit integers or 32-bit floats (default: %(default)s)",
    )
    p.add_argument(
        "--spectrogram",
        metavar="PNG",
        help=f"also save an image of the spectrogram; needs matplotlib ({install_hint('plot')})",
    )

    sound = p.add_argument_group("sound")
    sound.add_argument(
        "--negative", metavar="TEXT", help='description of what to avoid, such as "Low quality"'
    )
    sound.add_argument("--transcription", metavar="TEXT", help="words to speak; only for speech checkpoints")
    sound.add_argument(
        "--duration",
        type=_seconds,
        metavar="SECONDS",
        help=f"length of the sound, at most {MAX_LENGTH_IN_S:g} (default: the length of the training clips, "
        "10.24, or 5.12 for tiny)",
    )
    sound.add_argument(
        "--candidates",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="generate N sounds and keep the one that matches the prompt best, as judged by CLAP "
        "(default: %(default)s)",
    )
    sound.add_argument(
        "--seed",
        type=_number(int, 0, 2**63 - 1),
        metavar="N",
        help="random seed; the same seed and options give the same sound (default: a new seed, which is "
        "printed)",
    )

    quality = p.add_argument_group("quality and speed")
    quality.add_argument(
        "--scheduler",
        choices=tuple(SAMPLERS),
        default="dpmsolver++",
        help="sampling algorithm; dpmsolver++ needs a tenth of ddim's steps (default: %(default)s)",
    )
    quality.add_argument(
        "--steps",
        type=_number(int, 1),
        metavar="N",
        help="number of denoising steps; more take longer and usually sound better (default: what the "
        "scheduler needs, 20 for dpmsolver++ and 200 for ddim)",
    )
    quality.add_argument(
        "--guidance",
        type=_number(float, 0),
        default=3.5,
        metavar="W",
        help="guidance scale; larger values follow the prompt more closely, and 1 or less disables guidance, "
        "which takes half the time (default: %(default)s; 2 suits tiny)",
    )

    machine = p.add_argument_group("model and device")
    machine.add_argument(
        "--model",
        default="cvssp/audioldm2",
        metavar="NAME",
        help="repository on the Hugging Face Hub (also cvssp/audioldm2-large and cvssp/audioldm2-music), "
        "path of a folder, or tiny (default: %(default)s)",
    )
    machine.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps or xpu (default: cuda if available, or cpu)"
    )
    machine.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of weights and computation (default: float16 with cuda, otherwise float32)",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile the model with torch.compile: minutes in the first run, then faster; best on a GPU",
    )
    machine.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    machine.add_argument("--debug", action="store_true", help="print the full traceback of an error")
    machine.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version and exit"
    )
    return p


def _number(kind: type[Number], low: Number, high: Number | None = None) -> Callable[[str], Number]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> Number:
        with suppress(ValueError):
            value = kind(text)
            if low <= value < float("inf") and (high is None or value <= high):  # also false for NaN
                return value
        what = "an integer" if kind is int else "a number"
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        check_length(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds, more than 0 and at most {MAX_LENGTH_IN_S:g}, got {text!r}"
        ) from None
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; by default, those of the process.

    Returns:
        The exit code: 0, or 1 after an error.

    Raises:
        SystemExit: with code 2 for invalid arguments, and with code 0 for --help and --version.
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
        return _failed("interrupted; no partial file was left", options.debug)
    except Exception as error:
        return _failed(_reason(error), options.debug)


def _run(p: Parser, options: argparse.Namespace) -> int:
    # This check comes before PyTorch, which takes seconds to import.
    output = Path(options.output)
    spectrogram = Path(options.spectrogram) if options.spectrogram else None
    if spectrogram is not None and spectrogram.resolve() == output.resolve():
        p.error("--output and --spectrogram are the same file")

    import torch

    from audioldm2.audio.spectrogram_image import check_can_draw, save_spectrogram
    from audioldm2.audio.wav import check_writable, write_wav
    from audioldm2.runtime.device import available_device

    check_writable(output)
    if spectrogram is not None:
        check_can_draw()
        check_writable(spectrogram)
    try:
        device = available_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        p.error(f"argument --device: {error}")
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")

    # transformers' advice is for users of its models. Errors of its tokenizers are raised all the same.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from audioldm2 import schedulers
    from audioldm2.pipeline import AudioLDM2Pipeline

    _say(f"loading {options.model}", options.quiet)
    pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    _, class_name = SAMPLERS[options.scheduler]
    sampler = schedulers.SCHEDULERS[class_name]
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
    if spectrogram is not None:
        save_spectrogram(spectrogram, best, rate, title=options.prompt)
        print(f"{spectrogram}: spectrogram of {output}")
    return 0


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(f"{PROGRAM}: {text}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """An error as one line."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try --dtype float16, a shorter --duration or fewer --candidates"
    if isinstance(error, OSError) and error.filename is not None:
        lines = [f"{error.filename}: {error.strerror}"]
    start = " ".join(lines[:2])
    return start if len(lines) <= 2 else f"{start} (and {len(lines) - 2} more lines; --debug prints them)"


def _failed(reason: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{PROGRAM}: error: {reason}", file=sys.stderr)
    return 1


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    from tqdm import tqdm

    tqdm.write(f"{PROGRAM}: warning: {message}", file=sys.stderr)  # does not break the progress bars
