"""`AdapterMethods`, the base class with which a pipeline has adapters; names and arguments are diffusers'."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audioldm2.adapters import writing
from audioldm2.adapters.layers import LowRank
from audioldm2.adapters.state import Adapter, Adapters, adapters_of, layers_for
from audioldm2.adapters.targets import chosen, targets
from audioldm2.arguments import check_count, check_flag, check_number
from audioldm2.models.unet import UNet
from audioldm2.quoting import listed, quoted
from audioldm2.runtime.foreign import unwrapped
from audioldm2.runtime.precision import check_dtype
from audioldm2.runtime.stages import StageRunner

# Of the attention, as in diffusers' and PEFT's examples.
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")


class AdapterMethods(StageRunner):
    """Loading, combining, fusing, training and saving adapters of `self.unet`."""

    unet: Any
    _name_or_path: str

    # --- which are active

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Have these adapters on, and all others off.

        Args:
            adapter_names: one or several; [] has all off, so that the UNet is bitwise the base.
            adapter_weights: how strongly, one number for all or one for each; 1 by default. 0 is off, and
                negative weights go the opposite way.

        Raises:
            ValueError, TypeError: a name or a weight that cannot be used.

        Example:
            >>> pipe.set_adapters(["dog", "rain"], [0.8, 0.3])
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, list | tuple):
            raise TypeError(f"adapter_names must be a list of names, got {quoted(adapter_names)}")
        weights = adapter_weights
        if not isinstance(weights, list | tuple):
            weights = [weights] * len(names)  # type: ignore[list-item]
        if len(weights) != len(names):
            raise ValueError(f"there are {len(weights)} adapter_weights for {len(names)} adapter_names")
        pairs = zip(names, weights, strict=True)
        by_name = {name: 1.0 if weight is None else weight for name, weight in pairs}
        if len(by_name) < len(names):
            raise ValueError(f"adapter_names has a name twice: {quoted(list(names))}")
        with self._changing() as (_, state):
            state.weights, state.enabled = _checked(by_name, state, "adapter_weights"), True

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that are on."""
        _, state = adapters_of(self.unet)
        return [*state.weights] if state.enabled else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all adapters, by the name of their stage, as in diffusers: {"unet": [...]}."""
        _, state = adapters_of(self.unet)
        return {"unet": [*state.known]}

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are fused into the UNet's weights."""
        _, state = adapters_of(self.unet)
        return {*state.fused}

    def disable_lora(self) -> None:
        """Have all adapters off, until `enable_lora` or `set_adapters`; the UNet is then bitwise the base.

        Raises:
            ValueError: adapters are fused.
        """
        self._set_enabled(False)

    def enable_lora(self) -> None:
        """Have the adapters on again that were on before `disable_lora`."""
        self._set_enabled(True)

    def _set_enabled(self, enabled: bool) -> None:
        with self._changing() as (_, state):
            if state.fused and not enabled:
                raise ValueError("adapters are fused into the UNet's weights; call unfuse_lora() instead")
            state.enabled = enabled

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters.

        Args:
            adapter_names: one or several.

        Raises:
            ValueError: there is no adapter of that name, or it is fused; nothing is deleted then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*dict.fromkeys(adapter_names)]
        with self._changing() as (unet, state):
            state.check_names(names)
            state.remove(unet, names)

    def unload_lora_weights(self) -> None:
        """Forget all adapters. As in diffusers, what is fused stays in the weights, from now on for good."""
        with self._changing() as (unet, state):
            state.forget(unet)

    # --- fusing

    def fuse_lora(
        self,
        lora_scale: float = 1.0,
        adapter_names: Sequence[str] | None = None,
        *,
        components: Sequence[str] = ("unet",),
        safe_fusing: bool = True,
    ) -> None:
        """Add adapters to the UNet's weights, which takes no time at each step and saves as a checkpoint.

        Copies of the weights from before are kept, so that `unfuse_lora` restores them exactly; they take as
        much memory as the weights that are updated. `unload_lora_weights` frees them and keeps what is fused.

        Args:
            lora_scale: a factor for all of them, besides their own weights.
            adapter_names: which ones; those that are on by default.
            components: accepted for diffusers: ["unet"].
            safe_fusing: accepted for diffusers: numbers that are not finite are always refused.

        Raises:
            ValueError, TypeError: an argument that cannot be used, or there is nothing to fuse.
        """
        check_number("lora_scale", lora_scale)
        check_flag("safe_fusing", safe_fusing)
        _check_components(components)
        with self._changing() as (unet, state):
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            active = [*state.weights] if state.enabled else []
            names = active if names is None else [*dict.fromkeys(names)]
            state.check_names(names)
            if not names:
                raise ValueError(
                    "there is nothing to fuse: no adapter is on; choose some with set_adapters()"
                )
            state.fuse(unet, names, float(lora_scale))

    def unfuse_lora(self, components: Sequence[str] = ("unet",)) -> None:
        """Give the UNet's weights their values from before `fuse_lora`, bitwise.

        The adapters are on again, as they were before they were fused.

        Args:
            components: accepted for diffusers: ["unet"].

        Raises:
            ValueError: nothing is fused; or weights have changed since, so that the old values do not fit.
        """
        _check_components(components)
        with self._changing() as (unet, state):
            if not state.fused:
                raise ValueError("no adapter is fused")
            state.unfuse(unet)

    # --- for the pipeline

    @contextmanager
    def _changing(self) -> Iterator[tuple[UNet, Adapters]]:
        """The UNet and its adapters, to be changed in the block; layers are arranged at its end."""
        with self.generation():
            unet, state = adapters_of(self.unet)
            self._bring_home()
            yield unet, state
            state.arrange(unet)

    def _bring_home(self) -> None:
        """With offload, have no stage on the device: parameters that come and go must not be left there."""
        if self._offload is not None:
            self._offload.release()

    @contextmanager
    def _adapters_of_call(
        self, weights: Mapping[str, float] | None, cross_attention_kwargs: Mapping[str, Any] | None
    ) -> Iterator[None]:
        """Have the adapters of one generation active in the block, and those from before afterwards.

        Args:
            weights: the pipeline's argument `adapters`.
            cross_attention_kwargs: the pipeline's argument.
        """
        scale = _scale_of(cross_attention_kwargs)
        if weights is None and scale is None:
            yield
            return
        unet, state = adapters_of(self.unet)
        if weights is None:
            chosen_weights = dict(state.weights) if state.enabled else {}
        elif not isinstance(weights, Mapping):
            raise TypeError(
                f'adapters must be weights by name, such as {{"dog": 0.8}}, got {quoted(weights)}'
            )
        elif state.fused:
            raise ValueError(
                f"adapters cannot be chosen for one call while {listed(map(quoted, state.fused))} is fused "
                "into the UNet's weights; call unfuse_lora() first"
            )
        else:
            chosen_weights = _checked(weights, state, "adapters")
        if scale is not None and not chosen_weights:
            warnings.warn(
                f"cross_attention_kwargs: scale = {scale} has no effect, as no adapter is on", stacklevel=6
            )
        scaled = {name: weight * (1.0 if scale is None else scale) for name, weight in chosen_weights.items()}
        with state.using(unet, scaled):
            try:
                yield
            finally:
                self._bring_home()

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Have the UNet as a checkpoint has it in the block, with a warning if adapters are left out."""
        inner = unwrapped(self.unet)
        if not isinstance(inner, UNet):
            yield
            return
        unet, state = adapters_of(inner)
        left_out = [name for name in state.known if name not in state.fused]
        if not left_out:
            yield
            return
        warnings.warn(
            f"the adapters {listed(map(quoted, left_out))} are not saved with the checkpoint: write them "
            "with save_lora_weights(), or add them to the weights with fuse_lora() first",
            stacklevel=4,
        )
        with state.using(unet, {}):
            yield

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
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, got {quoted(dropout)}")
        stable = check_flag("use_rslora", use_rslora)
        check_dtype(dtype)
        with self._changing() as (unet, state):
            _check_new(name, state)
            layers = layers_for(unet, chosen(targets(unet), target_modules))
            updates = {}
            for layer, target in layers.items():
                weight: Tensor = unet.get_submodule(target.path).weight  # type: ignore[assignment]
                # The kernel of a 1x1 convolution that is a linear layer here has no influence on the numbers.
                a, b = torch.empty(rank, *target.shape[1:]), torch.zeros(target.rows, rank)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
                b = b.view(*b.shape, *(1,) * (a.dim() - 2))
                updates[layer] = LowRank(
                    a.to(weight.device, dtype or weight.dtype),
                    b.to(weight.device, dtype or weight.dtype),
                    target.first_row,
                    alpha,
                    alpha / (math.sqrt(rank) if stable else rank),
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


def _check_components(components: Any) -> None:
    if components not in ("unet", ["unet"], ("unet",)):
        raise ValueError(f'components = {quoted(components)} is not supported; it may be ["unet"]')


def _check_new(name: Any, state: Adapters) -> None:
    """Raise ValueError unless an adapter can have this name."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the name of an adapter must be text, got {quoted(name)}")
    if name in state.known:
        raise ValueError(
            f"there is an adapter {quoted(name)} already; choose another name, or call delete_adapters first"
        )


def _checked(weights: Mapping[Any, Any], state: Adapters, argument: str) -> dict[str, float]:
    """Weights by the names of adapters.

    Raises:
        ValueError: there is no adapter of that name, or a weight is not a finite number.
    """
    state.check_names(weights)
    for name, weight in weights.items():
        check_number(f"{argument} ({quoted(name)})", weight)
    return {name: float(weight) for name, weight in weights.items()}


def _scale_of(cross_attention_kwargs: Mapping[str, Any] | None) -> float | None:
    """The `scale` of diffusers' `cross_attention_kwargs`, the only entry that has a meaning here.

    Raises:
        ValueError: another entry, or a scale that is not a finite number.
    """
    if not cross_attention_kwargs:
        return None
    if not isinstance(cross_attention_kwargs, Mapping) or [*cross_attention_kwargs] != ["scale"]:
        raise ValueError(
            f"cross_attention_kwargs = {quoted(cross_attention_kwargs)} is not supported: there are no "
            'attention processors; it may be {"scale": 0.5}, a factor for adapters'
        )
    check_number('cross_attention_kwargs["scale"]', cross_attention_kwargs["scale"])
    return float(cross_attention_kwargs["scale"])
