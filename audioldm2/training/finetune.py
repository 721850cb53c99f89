"""Fine-tuning: teach a checkpoint's UNet new sounds, from a table of files and captions.

    pipe = AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2", device="cuda")
    result = finetune(pipe, "data.csv", "my-sounds", FinetuneOptions(steps=2000, rank=16))
    audio = pipe("the sound of my door").audios[0]  # the pipeline has the adapter now

Only the UNet is trained, or an adapter in it (LoRA: Hu et al. 2022); the text encoders and the VAE stay as
they are, so latents and conditions are computed once. The loss is that of `losses`, the loop that of `loop`:
a run that was killed is resumed by starting it again with the same arguments.

The output folder holds the result, an adapter or a whole checkpoint, and `training/`, the files of the run:
its settings and state, the latents, plots of the losses, and samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audioldm2.atomic import check_folder_writable, replacing
from audioldm2.conditioning import speaks
from audioldm2.models.unet import UNet
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.quoting import listed, quoted
from audioldm2.runtime.precision import stage_device, stage_dtype
from audioldm2.training.data import (
    EncodedData,
    Excerpting,
    encode_items,
    training_samples,
    weights_digest,
)
from audioldm2.training.loop import Processes, Run, RunMismatchError, Watch, check_settings, train
from audioldm2.training.options import FinetuneOptions as FinetuneOptions
from audioldm2.training.processes import start_processes
from audioldm2.training.samples import SampleWriter
from audioldm2.training.task import VALIDATION, Items, Task

ADAPTER = "finetuned"  # the adapter's name in the pipeline
FOLDER = "training"  # of the run's files, in the output folder
SETTINGS = "settings.json"
NAME = "finetune"  # of the state and the plots
DIGITS = 16  # of a digest, in the settings


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune made.

    Attributes:
        folder: with the adapter, or with the checkpoint.
        parameters: number of trained numbers.
        examples: that it was trained on.
        seconds: that this call took.
        validation: the loss on held-out files before and after; None without a validation.
    """

    folder: Path
    parameters: int
    examples: int
    seconds: float
    validation: tuple[float, float] | None


def finetune(
    pipe: AudioLDM2Pipeline,
    table: str | Path,
    output: str | Path,
    options: FinetuneOptions | None = None,
    *,
    progress: bool | None = None,
) -> FinetuneResult:
    """Fine-tune a pipeline's UNet on sound files and captions, or resume a fine-tune that was stopped.

    Afterwards the pipeline holds what was trained: an adapter named "finetuned", or the new weights.

    Args:
        pipe: on the device to train on, its UNet in float32.
        table: of the files and captions; see `table.read_table`.
        output: the folder for the result. With the output of the same run, the run is resumed.
        options: how; all defaults if None.
        progress: whether to show progress bars; by default on a terminal or in a notebook.

    Returns:
        Where the result is, and what it cost.

    Raises:
        OSError, ValueError: a table, file or folder that cannot be used; the message names it.
        TypeError: the pipeline's UNet is not this package's.
        RunMismatchError: the folder holds another run.
        FloatingPointError: the loss is not finite.

    Example:
        >>> pipe = AudioLDM2Pipeline.from_pretrained("tiny")
        >>> result = finetune(pipe, "data.csv", "my-sounds", FinetuneOptions(steps=500, rate=1e-3))
        >>> pipe = AudioLDM2Pipeline.from_pretrained("tiny")
        >>> pipe.load_lora_weights("my-sounds")
    """
    start = time.monotonic()
    options = options or FinetuneOptions()
    output = Path(output).expanduser()
    _check_pipeline(pipe)
    processes = start_processes(pipe.device)
    if options.batch_size % processes.count:
        raise ValueError(
            f"batch_size = {options.batch_size} cannot be divided among {processes.count} processes"
        )
    items = Items.read(table, options)
    folder = output / FOLDER
    if processes.is_main:
        _check_output(output)
    data, settings = _prepared(pipe, items, options, processes, folder, progress)
    task = Task(pipe, data, items, options, processes)
    watches = []
    if items.validation:
        watches.append(Watch(options.validate_every, task.validate))
    if options.sample_every is not None:
        watches.append(Watch(options.sample_every, SampleWriter(pipe, options, folder / "samples")))
    with _trained_part(pipe, options) as trained:
        points = train(
            NAME,
            trained,
            task.loss,
            Run(folder, str(pipe.device), options.seed),
            steps=options.steps,
            rate=options.learning_rate,
            warmup=options.warmup,
            average=options.ema,
            accumulate=options.accumulate,
            watches=watches,
            settings=settings,
            processes=processes,
            save_interval=options.save_every,
            show=progress,
        )
        if processes.is_main:
            if options.full:
                pipe.save_pretrained(output)
            else:
                pipe.save_lora_weights(output, ADAPTER)
        processes.wait()
    seen = [value for _, value in points.get(VALIDATION, [])]
    return FinetuneResult(
        output,
        sum(p.numel() for p in trained.parameters()),
        len(task.train),
        time.monotonic() - start,
        (seen[0], seen[-1]) if seen else None,
    )


def _prepared(
    pipe: AudioLDM2Pipeline,
    items: Items,
    options: FinetuneOptions,
    processes: Processes,
    folder: Path,
    progress: bool | None,
) -> tuple[EncodedData, dict[str, Any]]:
    """The data of a run, and all settings that decide its result, checked against those in its folder.

    Args:
        pipe: the pipeline.
        items: the rows of all tables.
        options: of the fine-tune.
        processes: the first one writes the files, and the others wait until it has.
        folder: of the run's files.
        progress: whether to show progress bars; None is on a terminal or in a notebook.

    Raises:
        OSError, ValueError: a sound that cannot be used; the message names its line of the table.
        RunMismatchError: the folder holds another run.
    """
    if not processes.is_main:
        processes.wait()
    settings = {
        **options.settings(),
        "rehearsed": len(items.rehearse),
        "held out": len(items.validation),
        "model": weights_digest(pipe.unet)[:DIGITS],
    }
    if processes.is_main:
        _check_same_run(folder, settings)  # before anything of another run is overwritten
    how = Excerpting(
        pipe.part("vocoder").config.sampling_rate,
        training_samples(pipe, options.duration),
        options.excerpts,
        options.keep_level,
    )
    show = progress if processes.is_main else False
    data = encode_items(pipe, items.all, how, folder / "data.safetensors", show=show)
    settings["data"] = data.digest[:DIGITS]
    if processes.is_main:
        _check_same_run(folder, settings)
        _write_settings(folder, settings)
        processes.wait()
    return data, settings


# --- what is trained, and on what


def _check_pipeline(pipe: AudioLDM2Pipeline) -> None:
    """Raise TypeError or ValueError unless a pipeline's UNet can be trained."""
    if not isinstance(pipe.unet, UNet):
        raise TypeError(
            f"pipe.unet is a {type(pipe.unet).__name__}; finetune trains this package's UNet, as "
            "from_pretrained loads it"
        )
    if stage_dtype(pipe.unet) != torch.float32:
        raise ValueError(
            f"the UNet's weights are {str(stage_dtype(pipe.unet)).removeprefix('torch.')}; load the "
            "checkpoint with torch_dtype=torch.float32, and compute in bfloat16 with precision='bf16'"
        )
    if stage_device(pipe.unet) != pipe.device:
        raise ValueError("finetune keeps the UNet on its device; leave out enable_model_cpu_offload()")
    if on := pipe.get_adapter_weights():
        raise ValueError(
            f"the adapters {listed(map(quoted, on))} are on, and would be trained with; call "
            "unload_lora_weights(), or fuse_lora() first to train on top of them"
        )
    if ADAPTER in pipe.get_list_adapters()["unet"]:
        raise ValueError(f"there is an adapter {quoted(ADAPTER)} already; call delete_adapters({ADAPTER!r})")
    if speaks(pipe):
        raise ValueError("finetune has no transcriptions; speech checkpoints cannot be trained with it")


def _check_output(output: Path) -> None:
    """Raise OSError or ValueError unless a folder is new, empty or that of a fine-tune."""
    check_folder_writable(output)
    if output.is_dir() and any(output.iterdir()) and not (output / FOLDER).is_dir():
        raise ValueError(f"{output} is not empty and not the output of a fine-tune; name another folder")


def _check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise RunMismatchError if a folder is that of a run with other settings than these."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        check_settings(folder, {name: old.get(name) for name in settings}, settings)
    except (AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunMismatchError(f"{path} is broken; remove {folder} to train from the beginning") from error


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    with replacing(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _trained_part(pipe: AudioLDM2Pipeline, options: FinetuneOptions) -> Iterator[nn.Module]:
    """The UNet or a new adapter in it, to be trained in the block; after an error it is as it was."""
    unet = pipe.unet
    required = {p: p.requires_grad for p in unet.parameters()}
    before = {k: v.cpu().clone() for k, v in unet.state_dict().items()} if options.full else {}
    unet.requires_grad_(options.full)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        if options.full:
            yield unet
        else:
            pipe.add_adapter(
                ADAPTER,
                options.rank,
                options.alpha,
                options.targets,
                generator=torch.Generator().manual_seed(options.seed),
            )
            try:
                yield nn.ParameterList(pipe.adapter_parameters(ADAPTER))
            except BaseException:
                pipe.delete_adapters(ADAPTER)
                raise
    except BaseException:
        if options.full:
            unet.load_state_dict(before)
        raise
    finally:
        unet.disable_gradient_checkpointing()
        for parameter in unet.parameters() if options.full else ():
            # The loop prefers channels last, whose strides stay on kernels of one pixel in to().
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        for parameter in unet.parameters():
            parameter.requires_grad_(required.get(parameter, True))
        unet.eval()
