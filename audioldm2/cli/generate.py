"""From the command line's options to a sound file and an image of its spectrogram."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from audioldm2.atomic import check_writable
from audioldm2.audio.file_types import image_type, sound_type
from audioldm2.cli.messages import clean, print_error, say, shorten
from audioldm2.cli.options import GUIDANCE, STANDARD_OUTPUT, Parser
from audioldm2.cli.process import give_up, print_line
from audioldm2.schedulers import SAMPLERS

MAX_TITLE = 100  # characters of the prompt that are drawn above a spectrogram


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
    # These checks come before PyTorch, which takes seconds to import.
    _check_files(parser, options)

    import torch

    from audioldm2.audio.sound_file import check_can_write, write_sound
    from audioldm2.audio.spectrogram_image import check_can_draw, save_spectrogram
    from audioldm2.audio.wav import write_wav
    from audioldm2.runtime.device import available_device

    to_stdout = options.output in STANDARD_OUTPUT
    if not to_stdout:
        check_can_write(options.output, 16000, options.format)
    if options.spectrogram is not None:
        check_can_draw(options.spectrogram)
    try:
        device = available_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")

    # transformers' advice is for users of its models. Errors of its tokenizers are raised all the same.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from audioldm2 import schedulers
    from audioldm2.pipeline import AudioLDM2Pipeline

    _, class_name = SAMPLERS[options.scheduler]
    sampler = schedulers.SCHEDULERS[class_name]
    with ExitStack() as stack:
        stdout = sys.stdout
        if to_stdout:  # whatever a library prints must not get into the sound
            stack.enter_context(redirect_stdout(sys.stderr))
        say(f"loading {options.model}", options.quiet)
        _check_with_checkpoint(options, sampler)
        pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=dtype, device=device)
        rate = pipe.vocoder.config.sampling_rate
        if not to_stdout:
            check_can_write(options.output, rate, options.format)
        pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
        if not isinstance(pipe.scheduler, sampler):
            pipe.scheduler = sampler.from_config(pipe.scheduler.config)
        if options.compile:
            pipe.compile()
        result = pipe(
            options.prompt,
            transcription=options.transcription,
            num_waveforms_per_prompt=options.candidates,
            generator=torch.Generator(device).manual_seed(seed),
            **_recommended(options, pipe.recommended),
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
        save_spectrogram(options.spectrogram, best, rate, title=clean(shorten(options.prompt, MAX_TITLE)))
        failure = _report(f"{options.spectrogram}: spectrogram of {name}", to_stdout) or failure
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
    output, spectrogram = options.output, options.spectrogram
    for name, path in (("-o/--output", output), ("--spectrogram", spectrogram)):
        if path is not None and not path.strip():
            parser.error(f"argument {name}: the name of the file is empty")
    if spectrogram in STANDARD_OUTPUT:
        parser.error("argument --spectrogram: an image cannot be written to standard output")
    if spectrogram is not None and _same_file(output, spectrogram):
        parser.error("--output and --spectrogram are the same file")
    try:
        sound_type("" if output in STANDARD_OUTPUT else output, options.format)
    except ValueError as error:
        parser.error(f"argument -o/--output: {error}")
    try:
        image_type(spectrogram or "")
    except ValueError as error:
        parser.error(f"argument --spectrogram: {error}")
    if output not in STANDARD_OUTPUT:
        check_writable(output)
    elif sys.stdout is None or not hasattr(sys.stdout, "buffer"):
        raise OSError("standard output is closed; name a file with -o")
    elif sys.stdout.isatty():
        parser.error("argument -o/--output: standard output is a terminal; redirect it, or name a file")
    if spectrogram is not None:
        check_writable(spectrogram)


def _same_file(a: str, b: str) -> bool:
    if Path(a).resolve() == Path(b).resolve():
        return True
    return os.path.isfile(a) and os.path.isfile(b) and os.path.samefile(a, b)  # hard links, or upper case


def _check_with_checkpoint(options: argparse.Namespace, sampler: Any) -> None:
    """Check the arguments whose limits depend on the checkpoint. This reads its configs, not its weights.

    Raises:
        CheckpointError: the checkpoint cannot be found, or is not one of this pipeline.
        ValueError: an argument is out of range, or a transcription is missing or not possible; the message
            names the argument as the pipeline does.
    """
    from audioldm2.checkpoints.formats import INDEX, read_index
    from audioldm2.checkpoints.hub import Source, checkpoint_folder
    from audioldm2.checkpoints.tensors import read_json
    from audioldm2.conditioning import check_transcription
    from audioldm2.decoding import frames_and_samples

    names = ("scheduler", "unet", "vae", "vocoder")
    source = Source(options.model)
    folder = checkpoint_folder(source, ["", *names], first_file=INDEX, check=read_index, weights=False)
    speaks = read_index(folder)["text_encoder_2"] == "VitsModel"
    check_transcription(options.transcription, speaks)
    try:
        scheduler = sampler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        unet, vae, vocoder = (read_json(folder / name / "config.json") for name in names[1:])
        stand_ins = (
            SimpleNamespace(config=SimpleNamespace(sample_size=unet.get("sample_size"))),
            SimpleNamespace(downsampling=2 ** (len(vae["block_out_channels"]) - 1)),
            SimpleNamespace(
                hop_length=prod(vocoder["upsample_rates"]),
                config=SimpleNamespace(sampling_rate=vocoder["sampling_rate"]),
            ),
        )
    except Exception:
        return  # loading names the file and what is wrong with it
    if options.steps is not None:
        scheduler.set_timesteps(options.steps)
    if options.duration is not None:
        frames_and_samples(*stand_ins, options.duration)


def _recommended(options: argparse.Namespace, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for which a checkpoint may recommend values, unless the options say otherwise."""
    given = {
        "audio_length_in_s": options.duration,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
    }
    if options.scheduler != "dpmsolver++":  # the number of steps is meant for this sampler
        recommended = {name: value for name, value in recommended.items() if name != "num_inference_steps"}
    defaults = {"guidance_scale": GUIDANCE, **recommended}
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}
