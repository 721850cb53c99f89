"""The adapters of one UNet: which there are, which are active and how strongly, and which are fused.

They are kept on the UNet itself, so that pipelines that share a UNet share its adapters, and copies of it
have copies of them. Layers have updates only while an adapter is active. The rest of the time they are plain
layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from audioldm2.adapters.layers import LowRank, attach, can_have_updates
from audioldm2.adapters.targets import Target, targets, weight_of
from audioldm2.models.unet import UNet
from audioldm2.quoting import listed, quoted
from audioldm2.runtime.foreign import unwrapped
from audioldm2.runtime.precision import DTYPES
from audioldm2.tensors import NonFiniteError

STATE = "_adapters"  # the attribute of the UNet


@dataclass
class Adapter:
    """An adapter.

    Attributes:
        updates: by diffusers' name of the layer.
        paths: our name of that layer, by diffusers' name.
        use_rslora: whether alpha is divided by the square root of the rank.
    """

    updates: dict[str, LowRank]
    paths: dict[str, str]
    use_rslora: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [parameter for update in self.updates.values() for parameter in update.parameters()]


@dataclass
class _Fused:
    """A weight that updates were added to.

    Attributes:
        original: its values before.
        checksums: of its values after, for each dtype that it may be converted to.
    """

    original: Tensor
    checksums: dict[torch.dtype, int]


@dataclass
class Adapters:
    """The adapters of a UNet.

    Attributes:
        known: all of them, by name.
        weights: those that are set, and how strongly; the others are off.
        enabled: False while all are off.
        fused: those whose updates are in the UNet's weights, and the weights with which they were on.
        fused_weights: the UNet's weights that have changed by that, by their layers' names.
    """

    known: dict[str, Adapter] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    enabled: bool = True
    fused: dict[str, float | None] = field(default_factory=dict)
    fused_weights: dict[str, _Fused] = field(default_factory=dict)

    def described(self) -> str:
        """Which adapters there are, for an error message."""
        names = listed(map(quoted, self.known))
        return f"there {'is' if len(self.known) == 1 else 'are'} {names}" if names else "none is loaded"

    def check_names(self, names: Collection[str], fused: bool = False, argument: str = "") -> None:
        """Check that these are adapters.

        Args:
            names: what a caller passed.
            fused: whether they may be fused ones.
            argument: where they were passed, if the message should name it.

        Raises:
            ValueError: one is not; the message lists those that there are.
        """
        where = f"{argument}: " if argument else ""
        for name in names:
            if name not in self.known:
                raise ValueError(f"{where}there is no adapter {quoted(name)}; {self.described()}")
            if name in self.fused and not fused:
                raise ValueError(
                    f"the adapter {quoted(name)} is fused into the UNet's weights; call unfuse_lora() first"
                )

    def arrange(self, unet: UNet) -> None:
        """Give every layer the updates of the adapters that are on, and no others."""
        wanted: dict[str, list[LowRank]] = {
            path: [] for adapter in self.known.values() for path in adapter.paths.values()
        }
        for name, weight in self.weights.items() if self.enabled else ():
            adapter = self.known[name]
            if weight == 0:  # exactly the base
                continue
            for layer, update in adapter.updates.items():
                update.scale = weight * update.scaling
                wanted[adapter.paths[layer]].append(update)
        with torch.inference_mode(False):
            for path, updates in wanted.items():
                attach(unet.get_submodule(path), updates)

    def remove(self, unet: UNet, names: Collection[str]) -> None:
        """Forget adapters."""
        kept = {name: weight for name, weight in self.weights.items() if name not in names}
        self.weights = {}
        self.arrange(unet)
        for name in names:
            del self.known[name]
        self.weights = kept
        self.arrange(unet)

    @contextmanager
    def using(self, unet: UNet, weights: Mapping[str, float]) -> Iterator[None]:
        """Have these adapters active in the block, and no others; afterwards, those from before."""
        outer = self.weights, self.enabled
        try:
            self.weights, self.enabled = dict(weights), True
            self.arrange(unet)
            yield
        finally:
            self.weights, self.enabled = outer
            self.arrange(unet)

    # --- fusing

    def fuse(self, unet: UNet, names: Collection[str], scale: float) -> None:
        """Add the updates of adapters to the UNet's weights.

        Args:
            unet: whose adapters these are.
            names: of adapters that are not fused yet.
            scale: of all updates, besides the adapters' own weights.

        Raises:
            ValueError: weights were changed since other adapters were fused.
            NonFiniteError: a weight would become NaN or infinite; nothing has been changed then.
        """
        self._check_unchanged(unet)
        sums: dict[str, Tensor] = {}
        for name in names:
            adapter, factor = self.known[name], scale * self.weights.get(name, 1.0)
            for layer, update in adapter.updates.items() if factor else ():
                path = adapter.paths[layer]
                if path not in sums:
                    base = _weight(unet, path)
                    sums[path] = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
                rows = sums[path].narrow(0, update.first_row, len(update.b))
                rows.add_(update.product().to(rows), alpha=factor * update.scaling)
        fused = {path: total.to(_weight(unet, path).dtype) for path, total in sums.items()}
        for path, values in fused.items():
            if not bool(values.isfinite().all()):
                raise NonFiniteError(f"with {listed(map(quoted, names))} fused, {path} has NaN or infinity")
        for path, values in fused.items():
            weight = _weight(unet, path)
            known = self.fused_weights.get(path)
            original = weight.clone() if known is None else known.original
            weight.copy_(values)
            self.fused_weights[path] = _Fused(
                original, {dtype: _checksum(values.to(dtype)) for dtype in DTYPES}
            )
        self.fused |= {name: self.weights.get(name) for name in names}
        self.weights = {name: weight for name, weight in self.weights.items() if name not in names}
        self.arrange(unet)

    def unfuse(self, unet: UNet) -> None:
        """Give the UNet's weights the values from before, bitwise, and have the fused adapters off.

        Raises:
            ValueError: weights were changed in the meantime; nothing has been changed then.
        """
        self._check_unchanged(unet)
        for path, fused in self.fused_weights.items():
            _weight(unet, path).copy_(fused.original)
        self.weights |= {name: weight for name, weight in self.fused.items() if weight is not None}
        self.fused.clear()
        self.fused_weights.clear()

    def forget(self, unet: UNet) -> None:
        """Forget all adapters, and take fused weights for the base from now on."""
        self.remove(unet, [*self.known])
        self.fused.clear()
        self.fused_weights.clear()

    def _check_unchanged(self, unet: UNet) -> None:
        changed = []
        for path, fused in self.fused_weights.items():
            weight = _weight(unet, path)
            if _checksum(weight) != fused.checksums[weight.dtype]:
                changed.append(path)
        if changed:
            raise ValueError(
                f"{len(changed)} of the fused weights have changed since fuse_lora() ({listed(changed)}), so "
                "those from before do not fit any more; unload_lora_weights() keeps the weights as they are"
            )


def _weight(unet: UNet, path: str) -> Tensor:
    """A layer's weight, without gradients."""
    return weight_of(unet, path).detach()


def _checksum(weight: Tensor) -> int:
    data: Any = weight.cpu().contiguous().view(torch.uint8).numpy()
    return zlib.crc32(data)


def adapters_of(unet: Any) -> tuple[UNet, Adapters]:
    """The UNet in `pipe.unet`, and its adapters.

    Args:
        unet: this package's, perhaps inside a wrapper of PyTorch's.

    Raises:
        TypeError: it is of another class.
    """
    inner = unwrapped(unet)
    if not isinstance(inner, UNet):
        raise TypeError(
            f"adapters are for this package's UNet; pipe.unet is of class {type(inner).__name__}: use the "
            "methods of that class, or PEFT"
        )
    if not hasattr(inner, STATE):
        setattr(inner, STATE, Adapters())
    found: Adapters = getattr(inner, STATE)
    return inner, found


def layers_for(unet: UNet, names: Collection[str]) -> dict[str, Target]:
    """Where the layers of these names are in a UNet.

    Raises:
        TypeError: one is not a plain layer of PyTorch's, so that it cannot have updates.
    """
    known = targets(unet)
    for name in names:
        layer = unet.get_submodule(known[name].path)
        if not can_have_updates(layer):
            raise TypeError(
                f"{known[name].path} of pipe.unet is of class {type(layer).__name__}; adapters are for plain "
                "layers: load them before the UNet is changed"
            )
    return {name: known[name] for name in names}
