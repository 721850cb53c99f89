"""From the command line's options to a sound file and an image of its spectrogram."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from itertools import combinations, pairwise
from pathlib import Path

from audioldm2.arguments import as_texts
from audioldm2.atomic import check_writable
from audioldm2.audio.file_types import FILE_FORMATS, SAMPLE_FORMATS, image_type, sound_type
from audioldm2.cli.commands import PROGRAM, hint, overview
from audioldm2.cli.editing import (
    add_editing_options,
    add_length_options,
    check_editing,
    check_prompt_file,
    edited,
    read_input,
)
from audioldm2.cli.loading import arguments_of, load_pipeline
from audioldm2.cli.memory import keep_freed_memory
from audioldm2.cli.messages import clean, print_error, say
from audioldm2.cli.options import (
    STANDARD_OUTPUT,
    Parser,
    add_model_options,
    add_quality_options,
    add_sound_options,
    check_quality,
    check_words,
    parse_options,
    suggestion,
)
from audioldm2.cli.process import give_up, print_line
from audioldm2.cli.profiling import Profile, check_trace_name
from audioldm2.cli.prompts import STANDARD_INPUT, add_weight_options, check_prompt_weights, read_prompt
from audioldm2.extras import install_hint
from audioldm2.quoting import shortened

MAX_TITLE = 100  # characters of the prompt that are drawn above a spectrogram
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

With --from, the model changes a sound: all of it (--strength), a part of it
(--replace), or what comes after its end (--extend).
"""
EXAMPLES = """\
examples:
  audioldm2 "A low steady tone" --model tiny
  audioldm2 "A rising sweep" --model tiny -o sweep.wav --spectrogram sweep.png
  audioldm2 "A hammer hits a wooden surface" -o hammer.wav
  audioldm2 "Techno with a strong beat" -o techno.wav --duration 20 --seed 7 \\
      --negative "Low quality"
  audioldm2 "Birds in a forest" -o birds.wav --candidates 3
  audioldm2 "Rain" -o rain.wav --model ./my-checkpoint --scheduler ddim
  echo "A slow scale" | audioldm2 - --model tiny -o - | aplay
  audioldm2 "A telephone rings" -o ring.wav --lora ./telephone-lora:0.8
  audioldm2 "Rain" -o rain.wav --quality draft
  audioldm2 "Rain" -o rain.wav --cache 3 --guidance-interval 0-0.75
  audioldm2 "Rain" --model tiny --steps 5 --profile trace.json.gz
  audioldm2 "Rain" --blend "a bell: 0.3" -o rain-and-bell.wav
  audioldm2 "A siren over rain" --word-weights "siren: 0.5" -o far-siren.wav

examples of editing:
  audioldm2 "A cat meows" --from dog.wav --strength 0.6 -o cat.wav
  audioldm2 "Rain" --from rain.wav --replace 2.5-4 -o rain-without-cough.wav
  audioldm2 "Rain" --from old.flac --replace-band 4000-8000 -o brighter.flac
  audioldm2 "A slow beat" --from beat.wav --extend 10 --loop -o loop.wav
  audioldm2 "A cat meows" --from dog.wav -o cat.wav --invert --skip 0.4 \\
      --source-prompt "A dog barks"

exit codes:
  0  success
  1  an error occurred; no partial file is left behind. If a file was written
     and only the message about it was not, standard error says so
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("", "[options] PROMPT", f"{DESCRIPTION}\n{overview()}", EXAMPLES)
    p.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="description of the sound, in quotes; - reads it from standard input",
    )
    add_options(p)
    return p


def add_options(p: argparse.ArgumentParser) -> None:
    """Add all options, but not the prompt."""
    p.add_argument(
        "--from-file",
        metavar="FILE",
        help="read the prompt from a text file of one line, in UTF-8; - is standard input",
    )
    p.add_argument(
        "-o",
        "--output",
        default="audio.wav",
        metavar="FILE",
        help="file to write, WAV by default; .flac, .ogg, .mp3 and others need soundfile "
        f"({install_hint('sound')}); - is standard output, as WAV (default: %(default)s)",
    )
    p.add_argument(
        "--format",
        "--sample-format",
        choices=SAMPLE_FORMATS,
        help="format of the samples, 16-bit integers or 32-bit floats, for types of files that have both "
        "(default: pcm16)",
    )
    p.add_argument(
        "--spectrogram",
        metavar="FILE",
        help="also save an image of the spectrogram, .png, .jpg, .svg or .pdf; needs matplotlib "
        f"({install_hint('plot')})",
    )
    p.add_argument(
        "--profile",
        metavar="FILE",
        help="also record where the generation's time goes: a trace, .json or .json.gz, for "
        "https://ui.perfetto.dev, and a table by stage on standard error. Recording makes a run slower, and "
        "its trace large: use few --steps",
    )
    add_sound_options(p)
    add_weight_options(p)
    add_editing_options(p)
    add_length_options(p)
    add_quality_options(p)
    add_model_options(p)


def parse(p: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    Args:
        p: from `parser`.
        arguments: without the program's name.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    for option, value in pairwise(arguments):
        if option == "--format" and value in FILE_FORMATS:
            p.error(f"argument --format: the type of a file is the suffix of its name: -o sound.{value}")
    options, rest = parse_options(p, arguments)
    if rest:
        if text := hint([options.prompt, *rest]):
            p.error(text)
        words = " ".join(rest)
        p.error(f'unrecognized arguments: {words}; put the prompt in quotes: "{options.prompt} {words}"')
    if re.match(r"--[\w-]+=", options.prompt or ""):  # to argparse, what has a space is not an option
        p.error(f"unrecognized argument: {options.prompt}{suggestion(options.prompt, p.names)}")
    if options.prompt is not None and options.from_file is not None:
        p.error("give the prompt or --from-file, not both")
    if options.prompt in STANDARD_INPUT:
        options.from_file = options.prompt
    try:
        if options.from_file is not None:
            check_prompt_file(p, options.from_file)
            options.prompt = read_prompt(options.from_file)
    except ValueError as error:
        p.error(str(error))
    if options.prompt is None:
        p.error(f'the prompt is missing; describe the sound: {PROGRAM} "Slow rain on a tin roof"')
    try:
        as_texts("the prompt", options.prompt)
    except ValueError as error:
        p.error(str(error))
    check_words(p, options)
    check_prompt_weights(p, options)
    check_editing(p, options)
    check_quality(p, options)
    return options


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Generate a sound and write it.

    Args:
        parser: for errors of arguments that are found here.
        options: as `options.parse` returns them.

    Returns:
        The exit code: 0, or 1 if the sound was written and the message about it was not.

    Raises:
        SystemExit: with code 2 for invalid arguments.
        Exception: the run failed; nothing was written, or the sound but not the image.
    """
    keep_freed_memory()
    # These checks come before PyTorch, which takes seconds to import.
    _check_files(parser, options)
    profile = Profile()

    import torch

    from audioldm2.audio.sound_file import check_can_write, write_sound
    from audioldm2.audio.wav import write_wav
    from audioldm2.editing.generations import with_prompts
    from audioldm2.plots import check_can_draw, save_spectrogram

    to_stdout = options.output in STANDARD_OUTPUT
    if not to_stdout:
        check_can_write(options.output, 16000, options.format)
    if options.spectrogram is not None:
        check_can_draw(options.spectrogram)
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")

    sound = read_input(options)

    with ExitStack() as stack:
        stdout = sys.stdout
        if to_stdout:  # whatever a library prints must not get into the sound
            stack.enter_context(redirect_stdout(sys.stderr))
        pipe = load_pipeline(parser, options)
        rate = pipe.vocoder.config.sampling_rate
        if not to_stdout:
            check_can_write(options.output, rate, options.format)
        with profile.recording() if options.profile is not None else nullcontext():
            arguments = {
                "transcription": options.transcription,
                "num_waveforms_per_prompt": options.candidates,
                "generator": torch.Generator(pipe.device).manual_seed(seed),
                **arguments_of(options, pipe.recommended),
            }
            arguments = edited(options, pipe, sound, arguments)
            result = pipe(
                **with_prompts(pipe, arguments, [options.prompt], [options.blend], [options.word_weights])
            )
    best = result[0][0]  # (samples,), the best candidate

    if to_stdout:
        try:
            write_wav(stdout.buffer, best, rate, format=options.format or "pcm16")
            stdout.flush()
        except OSError as error:
            give_up(stdout)
            raise OSError(f"the sound cannot be written to standard output: {error.strerror}") from error
    else:
        write_sound(options.output, best, rate, sample_format=options.format)
    name = "standard output" if to_stdout else options.output
    failure = _report(f"{name}: {len(best) / rate:.2f} s at {rate} Hz, seed {seed}", to_stdout)
    if options.spectrogram is not None:
        save_spectrogram(options.spectrogram, best, rate, title=clean(shortened(options.prompt, MAX_TITLE)))
        failure = _report(f"{options.spectrogram}: spectrogram of {name}", to_stdout) or failure
    if options.profile is not None:
        times = profile.save(options.profile)
        if not options.quiet:
            print(*times, sep="\n", file=sys.stderr)
        line = f"{options.profile}: trace of the generation, {profile.seconds:.2f} s"
        failure = _report(line, to_stdout) or failure
    if failure:
        print_error(f"{name} was written, but a message to standard output was not: {failure}")
    return 1 if failure else 0


def _report(line: str, to_stdout: bool) -> str | None:
    """Print a result; to standard error if the sound went to standard output. Returns why this failed."""
    if to_stdout:
        say(line)
        return None
    return print_line(clean(line))


def _check_files(parser: Parser, options: argparse.Namespace) -> None:
    """Check the names of the files, and that they can be written.

    Raises:
        SystemExit: with code 2 for names that cannot be used.
        OSError: a file cannot be written.
    """
    files = {
        "-o/--output": options.output,
        "--from": None if options.audio in STANDARD_INPUT else options.audio,
        "--spectrogram": options.spectrogram,
        "--profile": options.profile,
    }
    named = {name: path for name, path in files.items() if path is not None}
    for name, path in named.items():
        if not path.strip():
            parser.error(f"argument {name}: the name of the file is empty")
    for name in ("--spectrogram", "--profile"):
        if files[name] in STANDARD_OUTPUT:
            what = "an image" if name == "--spectrogram" else "a trace"
            parser.error(f"argument {name}: {what} cannot be written to standard output")
    for (name, path), (other, other_path) in combinations(named.items(), 2):
        if _same_file(path, other_path):
            instead = "; write the edited sound into another file" if "--from" in (name, other) else ""
            parser.error(f"{name} and {other} are the same file{instead}")
    output = options.output
    for name, check in (
        ("-o/--output", lambda path: sound_type("" if path in STANDARD_OUTPUT else path, options.format)),
        ("--spectrogram", image_type),
        ("--profile", check_trace_name),
    ):
        try:
            if name in named:
                check(named[name])
        except ValueError as error:
            parser.error(f"argument {name}: {error}")
    if output not in STANDARD_OUTPUT:
        check_writable(output)
    elif sys.stdout is None or not hasattr(sys.stdout, "buffer"):
        raise OSError("standard output is closed; name a file with -o")
    elif sys.stdout.isatty():
        parser.error("argument -o/--output: standard output is a terminal; redirect it, or name a file")
    for name in ("--spectrogram", "--profile"):
        if name in named:
            check_writable(named[name])


def _same_file(a: str, b: str) -> bool:
    if Path(a).resolve() == Path(b).resolve():
        return True
    return os.path.isfile(a) and os.path.isfile(b) and os.path.samefile(a, b)  # hard links, or upper case
