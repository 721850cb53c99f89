"""`AdapterSwitches`: which of a pipeline's adapters are on, for good or for one call, and fusing them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from audioldm2.adapters.state import STATE, Adapters, adapters_of
from audioldm2.arguments import check_flag, check_number
from audioldm2.models.unet import UNet
from audioldm2.quoting import listed, quoted
from audioldm2.runtime.foreign import unwrapped
from audioldm2.runtime.stages import StageRunner


class AdapterSwitches(StageRunner):
    """Switching, combining and fusing the adapters of `self.unet`; names and arguments are diffusers'."""

    unet: Any

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
        names = _listed_names(adapter_names)
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

    def get_adapter_weights(self) -> dict[str, float]:
        """The adapters that are on, by name, and how strongly; {} also for a UNet that cannot have any."""
        state = getattr(unwrapped(self.unet), STATE, None)
        return dict(state.weights) if state is not None and state.enabled else {}

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
            TypeError: `adapter_names` is something else.
            ValueError: there is no adapter of that name, or it is fused; nothing is deleted then.
        """
        names = [*dict.fromkeys(_listed_names(adapter_names))]
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
            active = [*state.weights] if state.enabled else []
            names = active if adapter_names is None else [*dict.fromkeys(_listed_names(adapter_names))]
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
            raise TypeError(f'adapters must be a dict such as {{"dog": 0.8}}, got {quoted(weights)}')
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


def _listed_names(adapter_names: Any) -> list[str]:
    """One name or several, as a list.

    Raises:
        TypeError: anything else.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a name or a list of names, got {quoted(adapter_names)}")
    return [*names]


def _check_components(components: Any) -> None:
    if components not in ("unet", ["unet"], ("unet",)):
        raise ValueError(f'components = {quoted(components)} is not supported; it may be ["unet"]')


def _checked(weights: Mapping[Any, Any], state: Adapters, argument: str) -> dict[str, float]:
    """Weights by the names of adapters.

    Raises:
        ValueError: there is no adapter of that name, or a weight is not a finite number.
    """
    state.check_names(weights, argument=argument)
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
