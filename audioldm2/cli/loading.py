"""From the options of a command to a pipeline."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from audioldm2.cli.messages import say
from audioldm2.cli.options import GUIDANCE, Parser
from audioldm2.schedulers import SAMPLERS

if TYPE_CHECKING:
    from audioldm2.pipeline import AudioLDM2Pipeline


def load_pipeline(parser: Parser, options: argparse.Namespace) -> AudioLDM2Pipeline:
    """Load the checkpoint that the options name, with their sampler.

    Args:
        parser: for errors of arguments that are found here.
        options: of `add_model_options` and `add_quality_options`.

    Raises:
        SystemExit: with code 2 for a device that is not available.
        CheckpointError: the checkpoint cannot be found or read.
        ValueError: an argument is out of range for this checkpoint.
    """
    import torch

    from audioldm2.runtime.device import available_device

    try:
        device = available_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))

    # transformers' advice is for users of its models. Errors of its tokenizers are raised all the same.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from audioldm2 import schedulers
    from audioldm2.pipeline import AudioLDM2Pipeline

    _, class_name = SAMPLERS[options.scheduler]
    sampler = schedulers.SCHEDULERS[class_name]
    say(f"loading {options.model}", options.quiet)
    _check_with_checkpoint(options, sampler)
    pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    if not isinstance(pipe.scheduler, sampler):
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    if options.compile:
        pipe.compile()
    return pipe


def arguments_of(options: argparse.Namespace, recommended: Mapping[str, Any]) -> dict[str, Any]:
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
