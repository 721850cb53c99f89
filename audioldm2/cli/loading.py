"""From the options of a command to a pipeline."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from audioldm2.arguments import GUIDANCE
from audioldm2.batch.names import distinct
from audioldm2.cli.messages import say
from audioldm2.cli.options import Parser, quality_arguments, sampler_of
from audioldm2.quality_settings import fitting_defaults, preset_of
from audioldm2.runtime.garbage import without_garbage_collection
from audioldm2.schedulers import SAMPLERS, as_sampler, sampler_class

if TYPE_CHECKING:
    from audioldm2.pipeline import AudioLDM2Pipeline


@dataclass(frozen=True)
class Loader:
    """Loads a pipeline, in this process or in another one.

    Args:
        model: the checkpoint.
        dtype: the name of a dtype.
        device: of the stages.
        scheduler: the name of a sampler in `SAMPLERS`; None is the checkpoint's own.
        compile: whether to compile the stages.
        variant: weights of a variant, such as "fp16".
        revision: branch, tag or commit on the Hub.
        adapters: folders, files or repositories of adapters (LoRA), and their weights.
    """

    model: str
    dtype: str
    device: str
    scheduler: str | None
    compile: bool = False
    variant: str | None = None
    revision: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()

    def __call__(self) -> AudioLDM2Pipeline:
        """Load the checkpoint, and its adapters.

        Raises:
            CheckpointError: one cannot be found or read, or an adapter does not fit.
        """
        # transformers' advice is for users of its models. Errors of its tokenizers are raised all the same.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from audioldm2.pipeline import AudioLDM2Pipeline

        pipe = AudioLDM2Pipeline.from_pretrained(
            self.model,
            torch_dtype=self.dtype,
            device=self.device,
            variant=self.variant,
            revision=self.revision,
        )
        if self.scheduler is not None:
            pipe.scheduler = as_sampler(self.scheduler, pipe.scheduler)
        # Named after their folders.
        names = distinct(Path(folder).resolve().name for folder, _ in self.adapters)
        for name, (folder, _) in zip(names, self.adapters, strict=True):
            pipe.load_lora_weights(folder, adapter_name=name)
        if names:
            pipe.set_adapters(names, [weight for _, weight in self.adapters])
        if self.compile:
            pipe.compile()
        return pipe


def checked_device(parser: Parser, options: argparse.Namespace, default: str | None = None) -> str:
    """The device of --device, or a default, if this machine has it.

    Args:
        parser: for the error.
        options: of `add_model_options`.
        default: "cuda" or "cpu" by default, whichever there is.

    Raises:
        SystemExit: with code 2 if it is not available.
    """
    import torch

    from audioldm2.runtime.device import available_device

    device: str = options.device or default or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        available_device(device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    return device


def loader(parser: Parser, options: argparse.Namespace, has_gpu: bool | None = None) -> Loader:
    """What the options say about loading.

    Args:
        parser: for errors of arguments that are found here.
        options: of `add_model_options` and `add_quality_options`.
        has_gpu: whether there is a CUDA device where the pipeline will run; by default, on this machine.

    Raises:
        SystemExit: with code 2 for a device that is not available.
    """
    if has_gpu is None:
        device = checked_device(parser, options)
    else:
        device = options.device or ("cuda" if has_gpu else "cpu")
    return Loader(
        options.model,
        options.dtype or _default_dtype(device, here=has_gpu is None),
        device,
        sampler_of(options),
        options.compile,
        options.variant,
        options.revision,
        tuple(options.lora or ()),
    )


def _default_dtype(device: str, here: bool) -> str:
    """The name of the dtype for a device of this machine, or of others."""
    from audioldm2.runtime.capability import generation_dtype

    if not here and device == "cpu":
        # The machines of a cluster may have different CPUs, but all sounds of a batch have one dtype.
        return "float32"
    return str(generation_dtype(device)).removeprefix("torch.")


@without_garbage_collection()
def load_pipeline(
    parser: Parser, options: argparse.Namespace, load: Loader | None = None, of_rows: bool = False
) -> AudioLDM2Pipeline:
    """Load the checkpoint that the options name, with their sampler.

    Args:
        parser: for errors of arguments that are found here.
        options: of `add_sound_options`, `add_model_options` and `add_quality_options`.
        load: how; what the options say by default.
        of_rows: whether the options are defaults of the rows of a table, which may say what the words are.

    Raises:
        SystemExit: with code 2 for a device that is not available.
        CheckpointError: the checkpoint cannot be found or read.
        ValueError: an argument is out of range for this checkpoint.
    """
    load = load or loader(parser, options)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    say(f"loading {options.model}", options.quiet)
    check_revision(parser, options.model, options.revision)
    _check_with_checkpoint(options, of_rows)
    pipe = load()
    pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    return pipe


def check_revision(parser: Parser, model: str, revision: str | None) -> None:
    """Check that a revision is given only for a repository.

    Raises:
        SystemExit: with code 2 if it is given for another checkpoint.
    """
    from audioldm2.checkpoints.hub import TINY

    if revision is not None and (model == TINY or os.path.isdir(model)):
        parser.error(f"argument --revision: {model} is not a repository on the Hub; leave it out")


def arguments_of(options: argparse.Namespace, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of quality and speed, and those for which a checkpoint may recommend values.

    A preset takes precedence over the recommended number of steps.
    """
    from audioldm2.checkpoints.recommended import recommended_for

    given = {
        "audio_length_in_s": options.duration,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
    }
    recommended = recommended_for(recommended, SAMPLERS[sampler_of(options)][1])
    arguments = quality_arguments(options)
    preset = preset_of(vars(options))
    if preset.steps is not None:
        recommended.pop("num_inference_steps", None)
    if options.quality is not None:
        arguments["quality"] = preset
    defaults = fitting_defaults({**given, **arguments}, {"guidance_scale": GUIDANCE, **recommended})
    completed = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return {**completed, **arguments}


def config_folder(model: str, variant: str | None = None, revision: str | None = None) -> Path:
    """The folder of a checkpoint's configs. From the Hub, these are downloaded without the weights.

    Args:
        model: the checkpoint.
        variant: weights of a variant, such as "fp16".
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: the checkpoint cannot be found, or is not one of this pipeline.
    """
    from audioldm2.checkpoints.formats import INDEX, read_index
    from audioldm2.checkpoints.hub import Source, checkpoint_folder

    folders = ["", "scheduler", "unet", "vae", "vocoder"]
    source = Source(model, variant, revision)
    return checkpoint_folder(source, folders, first_file=INDEX, check=read_index, weights=False)


def speaks(folder: Path) -> bool:
    """Whether a checkpoint is one of those that speak, from its configs."""
    from audioldm2.checkpoints.formats import read_index

    return read_index(folder)["text_encoder_2"] == "VitsModel"


def stand_ins(folder: Path) -> tuple[Any, Any, Any]:
    """UNet, VAE and vocoder for `decoding.frames_and_samples`, from their configs.

    Raises:
        Exception: a config is broken; loading the checkpoint names the file and what is wrong with it.
    """
    from audioldm2.checkpoints.tensors import read_json

    unet, vae, vocoder = (read_json(folder / name / "config.json") for name in ("unet", "vae", "vocoder"))
    return (
        SimpleNamespace(config=SimpleNamespace(sample_size=unet.get("sample_size"))),
        SimpleNamespace(downsampling=2 ** (len(vae["block_out_channels"]) - 1)),
        SimpleNamespace(
            hop_length=prod(vocoder["upsample_rates"]),
            config=SimpleNamespace(sampling_rate=vocoder["sampling_rate"]),
        ),
    )


def _check_with_checkpoint(options: argparse.Namespace, of_rows: bool) -> None:
    """Check the arguments whose limits depend on the checkpoint. This reads its configs, not its weights.

    Raises:
        CheckpointError: the checkpoint cannot be found, or is not one of this pipeline.
        ValueError: an argument is out of range, or a transcription is missing or not possible; the message
            names the argument as the pipeline does.
    """
    import torch

    from audioldm2.checkpoints.tensors import read_json
    from audioldm2.conditioning import check_transcription
    from audioldm2.decoding import frames_and_samples
    from audioldm2.sampling import set_timesteps

    sampler = sampler_class(sampler_of(options))
    folder = config_folder(options.model, options.variant, options.revision)
    if options.transcription is not None or not of_rows:
        check_transcription(options.transcription, speaks(folder))
    try:
        scheduler = sampler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        parts = stand_ins(folder)
    except Exception:
        return  # loading names the file and what is wrong with it
    if options.steps is not None or options.timesteps is not None:
        set_timesteps(scheduler, options.steps or 0, options.timesteps, torch.device("cpu"))
    if options.duration is not None:
        frames_and_samples(*parts, options.duration)
