"""`Stage`, the base class of the pipeline's neural networks: loading, saving, device and dtype.

A stage is a plain `nn.Module` that takes and returns tensors. It is built from a config dataclass (see
`models/config.py`) and adds four things to a module: its config, its device and dtype, and `from_pretrained`
and `save_pretrained`, which read and write the Hub's checkpoint format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import nn

from audioldm2.models.config import ConfigT

# typing.Self needs Python 3.11.
SelfT = TypeVar("SelfT", bound="Stage[Any]")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def refuse_return_dict(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError if a stage is called like one of diffusers or transformers, with `return_dict`."""
    if "return_dict" in arguments:
        raise TypeError(
            f"{name} returns plain tensors and takes no return_dict: leave it out, and use the result itself "
            "in place of result.sample or result[0]"
        )


def plain(method: MethodT) -> MethodT:
    """Decorator of a stage's methods that refuses `return_dict` as calling the stage does."""

    @functools.wraps(method)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_return_dict(f"{type(self).__name__}.{method.__name__}", kwargs)
        return method(self, *args, **kwargs)

    return cast(MethodT, refusing)


class Stage(nn.Module, Generic[ConfigT]):
    """Base class of the pipeline's stages, `class VAE(Stage[VAEConfig])`.

    A stage is called with tensors on its own device and in its own dtype, and returns tensors. Loading puts
    it in eval mode; `stage.train()` prepares it for training.

    Attributes:
        config: sizes and options, a frozen dataclass.
        float32_parameters: name patterns (fnmatch) of parameters that stay in float32 when the stage runs
            in float16, because their results exceed float16's range.

    Example:
        >>> from audioldm2 import VAE
        >>> vae = VAE.from_pretrained("cvssp/audioldm2", subfolder="vae", torch_dtype=torch.float16)
        >>> vae.config.latent_channels, vae.dtype, vae.device
        (8, torch.float16, device(type='cpu'))
        >>> vae.save_pretrained("my-vae")
        >>> vae = VAE.from_pretrained("my-vae")
    """

    config: ConfigT
    float32_parameters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(
        cls: type[SelfT],
        repo_or_folder: str | Path | None = None,
        subfolder: str | None = "",
        *,
        pretrained_model_name_or_path: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: torch.device | str | int | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        low_cpu_mem_usage: bool = True,
        **others: Any,
    ) -> SelfT:
        """Load the stage from a checkpoint, in eval mode.

        Args:
            repo_or_folder: a local folder, "owner/name" on the Hub (only the files of this stage are
                downloaded), or "tiny" for the checkpoint inside this package.
            subfolder: the stage's folder in the checkpoint, such as "unet"; "" if config.json is at the top.
            pretrained_model_name_or_path: `repo_or_folder`, under the name that it has in diffusers.
            torch_dtype: dtype of the weights, or its name as text; None keeps the checkpoint's own ("tiny" is
                loaded in float32), and "auto" that of the stored weights, but bfloat16 on a machine without
                an accelerator whose CPU multiplies bfloat16 in hardware.
            dtype: the same, under the name that it has in newer releases of diffusers.
            device: where the weights are placed; None is the CPU, and a number a CUDA device.
            device_map: the same; "balanced" and "auto" are this machine's accelerator, or its CPU.
            variant: weights of a variant, such as "fp16".
            use_safetensors: True reads safetensors files only, False `.bin` files only; None prefers
                safetensors.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; None is the Hub client's default.
            token: access token for private repositories; None uses the stored login.
            local_files_only: use earlier downloads only, without asking the Hub.
            force_download: download again what was downloaded earlier.
            low_cpu_mem_usage: has no effect, as loading never needs more memory than the weights.

        Returns:
            An instance of the class that this is called on.

        Raises:
            CheckpointError: the checkpoint cannot be found or read, or does not fit the stage.
            TypeError: an argument is not known.
            ValueError: an argument has a value that is not supported, such as a device that is not available.
        """
        from audioldm2.checkpoints.folder import load_pretrained_stage
        from audioldm2.checkpoints.options import load_options

        options = load_options(
            repo_or_folder,
            pretrained_model_name_or_path,
            torch_dtype=torch_dtype,
            dtype=dtype,
            device=device,
            device_map=device_map,
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            low_cpu_mem_usage=low_cpu_mem_usage,
            others=others,
        )
        return load_pretrained_stage(cls, options.source, subfolder, options.dtype, options.device)

    def save_pretrained(
        self,
        folder: str | Path | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        *,
        save_directory: str | Path | None = None,
        **others: Any,
    ) -> None:
        """Write config.json and the weights such that diffusers or transformers can load them.

        Args:
            folder: created if it does not exist. Files of an earlier save are replaced; its weights of the
                same variant are removed, also those in the other format.
            safe_serialization: False writes `.bin` files instead of safetensors.
            variant: goes into the names of the weight files: "fp16" writes model.fp16.safetensors.
            max_shard_size: larger weights are split into several files; bytes, or text such as "5GB".
            save_directory: `folder`, under the name that it has in diffusers.

        Raises:
            TypeError: the class is not registered in `audioldm2.checkpoints.formats.PARTS`, or an argument is
                not known.
            ValueError: an argument has a value that is not supported.
        """
        from audioldm2.checkpoints.folder import save_stage
        from audioldm2.checkpoints.options import save_options

        path, options = save_options(
            folder,
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **others,
        )
        save_stage(self, path, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_return_dict(type(self).__name__, kwargs)
        return super().__call__(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        from audioldm2.runtime.precision import stage_device

        return stage_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the stage works in: that of its parameters, except for `float32_parameters`."""
        from audioldm2.runtime.precision import stage_dtype

        return stage_dtype(self)
