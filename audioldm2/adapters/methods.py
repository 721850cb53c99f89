"""`AdapterMethods`, the base class with which a pipeline has adapters; names and arguments are diffusers'."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audioldm2.adapters import writing
from audioldm2.adapters.config import TARGET_MODULES, scaling
from audioldm2.adapters.layers import LowRank
from audioldm2.adapters.reading import open_adapter, read_adapter
from audioldm2.adapters.state import Adapter, Adapters, adapters_of, layers_for
from audioldm2.adapters.switches import AdapterSwitches
from audioldm2.adapters.targets import chosen, targets, weight_of
from audioldm2.arguments import check_count, check_flag, check_number, check_share, naming_unknown
from audioldm2.checkpoints.hub import check_subfolder
from audioldm2.checkpoints.options import load_options
from audioldm2.quoting import quoted
from audioldm2.runtime.precision import check_dtype


class AdapterMethods(AdapterSwitches):
    """Loading, switching, fusing, training and saving the adapters of `self.unet`."""

    _name_or_path: str

    # --- loading

    @naming_unknown(
        "load_lora_weights",
        {
            "hotswap": "delete_adapters(name), then load_lora_weights",
            "network_alphas": "alphas into the state dict, as LAYER.alpha",
            "use_auth_token": "token",
            "proxies": "the environment variable HTTPS_PROXY",
        },
    )
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Load an adapter (LoRA) of PEFT, diffusers or this package, and have it alone on.

        It is converted to the UNet's dtype. If anything in it does not fit, nothing is changed.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, "owner/name" on the Hub, or a state dict.
                In a folder or a repository, PEFT's adapter_model.safetensors (with adapter_config.json) is
                looked for first, then diffusers' pytorch_lora_weights.safetensors, then any other single
                file.
            weight_name: the weight file, if there are several.
            adapter_name: what to call it here; "default_0", "default_1" and so on by default.
            subfolder: of the folder or repository.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; the Hub client's default if None.
            token: for private repositories; None uses the stored login.
            local_files_only: use an earlier download, without asking the Hub.
            force_download: download again what was downloaded earlier.
            low_cpu_mem_usage: has no effect, as loading never needs more memory than the weights.

        Raises:
            CheckpointError: the adapter cannot be found or read, is of a kind that is not supported (DoRA,
                LoHa, trained biases, weights of a text encoder), or does not fit the UNet; the message lists
                what.
            ValueError, TypeError: an argument that cannot be used.

        Example:
            >>> pipe.load_lora_weights("telephone-lora", adapter_name="telephone")
            >>> audio = pipe("A telephone rings twice").audios[0]
        """
        given = pretrained_model_name_or_path_or_dict
        folder_in_it = check_subfolder(subfolder)
        if weight_name is not None and not isinstance(weight_name, str):
            raise TypeError(f"weight_name must be text, got {quoted(weight_name)}")
        check_flag("low_cpu_mem_usage", low_cpu_mem_usage)
        if not isinstance(given, str | os.PathLike | Mapping) or not given:
            raise TypeError(
                f"an adapter must be a folder, a file, a repository or a state dict, got {quoted(given)}"
            )
        options = load_options(
            "" if isinstance(given, Mapping) else given,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        source = dataclasses.replace(options.source, hint="")
        adapters_of(self.unet)  # an error about the UNet comes before a download
        opened = open_adapter(given, source, folder_in_it, weight_name)
        with self._changing() as (unet, state):
            if adapter_name is None:
                adapter_name = next(n for n in map("default_{}".format, count()) if n not in state.known)
            _check_new(adapter_name, state)
            state.known[adapter_name] = read_adapter(opened, unet)
            state.weights, state.enabled = {adapter_name: 1.0}, True

    # --- training

    @torch.inference_mode(False)
    def add_adapter(
        self,
        name: str,
        rank: int = 8,
        alpha: float | None = None,
        target_modules: Sequence[str] | str = TARGET_MODULES,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a new adapter to be trained, and make it the active one.

        As PEFT initializes them, A is random (uniform, He et al. 2015) and B is zero, so that nothing changes
        at first. Which of the UNet's own weights require gradients is not changed: call
        `pipe.unet.requires_grad_(False)` first to train the adapter alone.

        Args:
            name: of the adapter; a new one.
            rank: r, the rank of every update.
            alpha: updates are multiplied by alpha / rank; `rank` by default, which is no factor.
            target_modules: the layers to update, as in PEFT: the ends of diffusers' names of them, such as
                "to_q", "ff.net.2", "conv1", "attn2.to_k" or a whole name; or "all-linear".
            use_rslora: divide alpha by the square root of the rank (Kalajdzievski 2023).
            dropout: the share of each layer's input that is set to zero in training, for A only.
            dtype: of the adapter's parameters; that of the layers by default.
            generator: draws A.

        Raises:
            TypeError, ValueError: an argument that cannot be used; the message names it.

        Example:
            >>> pipe.unet.requires_grad_(False)
            >>> pipe.add_adapter("telephone", rank=8, target_modules=["to_q", "to_v"])
            >>> optimizer = torch.optim.AdamW(pipe.adapter_parameters("telephone"), lr=1e-4)
            >>> ...
            >>> pipe.save_lora_weights("telephone-lora", "telephone")
        """
        check_count("rank", rank)
        alpha = rank if alpha is None else alpha
        check_number("alpha", alpha)
        check_share("dropout", dropout)
        stable = check_flag("use_rslora", use_rslora)
        check_dtype(dtype)
        with self._changing() as (unet, state):
            _check_new(name, state)
            layers = layers_for(unet, chosen(targets(unet), target_modules))
            updates = {}
            for layer, target in layers.items():
                weight = weight_of(unet, target.path)
                # The kernel of a 1x1 convolution that is a linear layer here has no influence on the numbers.
                a, b = torch.empty(rank, *target.shape[1:]), torch.zeros(target.rows, rank)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                b = b.view(*b.shape, *(1,) * (a.dim() - 2))
                updates[layer] = LowRank(
                    a.to(weight.device, dtype or weight.dtype),
                    b.to(weight.device, dtype or weight.dtype),
                    target.first_row,
                    alpha,
                    scaling(alpha, rank, stable),
                    float(dropout),
                    weight.dtype,
                )
            paths = {layer: target.path for layer, target in layers.items()}
            state.known[name] = Adapter(updates, paths, stable)
            state.weights, state.enabled = {name: 1.0}, True

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter, A and B of each layer, for an optimizer.

        They stay the same objects while the adapter exists, also when it is off, moved or converted.

        Raises:
            ValueError: there is no adapter of that name.
        """
        _, state = adapters_of(self.unet)
        state.check_names([name], fused=True)
        return state.known[name].parameters

    # --- saving

    def save_lora_weights(
        self,
        folder: str | Path,
        adapter_name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write an adapter such that PEFT, diffusers and this package can load it.

        Three files are written: `adapter_config.json` and `adapter_model.safetensors`, PEFT's, and
        `pytorch_lora_weights.safetensors`, diffusers', with the config in its header.

        Args:
            folder: created if it does not exist; files of an earlier save are replaced.
            adapter_name: may be left out if there is only one.
            metadata: texts by name for the headers of the weight files, such as how it was trained.

        Raises:
            TypeError, ValueError: an argument that cannot be used; the message names it.
        """
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise TypeError(f"save_lora_weights() needs a folder, got {quoted(folder)}")
        path = Path(folder).expanduser()
        if path.is_file():
            raise ValueError(f"save_lora_weights() needs a folder; {quoted(str(path))} is a file")
        metadata = {} if metadata is None else metadata
        reserved = ("format", writing.DIFFUSERS_METADATA)
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str) or key in reserved:
                raise ValueError(
                    f"metadata must be texts by name, other than {' and '.join(reserved)}; got "
                    f"{quoted(key)}: {quoted(value)}"
                )
        with self.generation():
            unet, state = adapters_of(self.unet)
            if adapter_name is None:
                if len(state.known) != 1:
                    raise ValueError(f"save_lora_weights() needs an adapter_name; {state.described()}")
                (adapter_name,) = state.known
            state.check_names([adapter_name], fused=True)
            writing.write(state.known[adapter_name], targets(unet), path, self._name_or_path, metadata)


def _check_new(name: Any, state: Adapters) -> None:
    """Raise ValueError unless an adapter can have this name."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the name of an adapter must be text, got {quoted(name)}")
    if name in state.known:
        raise ValueError(
            f"there is an adapter {quoted(name)} already; choose another name, or call delete_adapters first"
        )
