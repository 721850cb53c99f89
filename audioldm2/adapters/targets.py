"""Which layers adapters can update: diffusers' names of them, and where they are in this package's UNet.

Adapters name layers as diffusers' UNet does ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q").
The UNet's weight map says which of our weights each one is part of: a matrix of its own, some rows of a fused
one, or a 1x1 convolution that is a linear layer here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from audioldm2.checkpoints.operations import Shape
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.quoting import listed, quoted

# What PEFT calls all linear layers.
ALL_LINEAR = "all-linear"
_WEIGHT = ".weight"


class Target(NamedTuple):
    """A layer of diffusers' UNet, as a part of a layer of ours.

    Attributes:
        path: our layer's name in the UNet.
        first_row: the first row of its weight that is this layer's.
        rows: how many there are.
        shape: the shape of those rows in our weight.
        operation: how diffusers' weight becomes ours, "copy", "squeeze" or "concat" (see
            `checkpoints.operations`).
    """

    path: str
    first_row: int
    rows: int
    shape: Shape
    operation: str

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        """The shapes of A and B in diffusers' layer."""
        kernel = self.shape[2:] or ((1, 1) if self.operation == "squeeze" else ())
        return (rank, self.shape[1], *kernel), (self.rows, rank, *(1,) * len(kernel))


def targets(unet: nn.Module) -> dict[str, Target]:
    """All layers that an adapter can update, by diffusers' names, in the order of our UNet's modules."""
    weights = weight_map("unet.diffusers")
    found = {}
    for path, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        recipe = weights.recipes(path + _WEIGHT)[0]
        rows = len(layer.weight) // len(recipe.sources)
        for index, source in enumerate(recipe.sources):
            name = source.removesuffix(_WEIGHT)
            shape = (rows, *layer.weight.shape[1:])
            found[name] = Target(path, index * rows, rows, shape, recipe.operation)
    return found


def weight_of(unet: nn.Module, path: str) -> Tensor:
    """The weight of the UNet's layer at `Target.path`, a parameter."""
    weight: Tensor = unet.get_submodule(path).weight  # type: ignore[assignment]
    return weight


def ends_with(name: str, suffix: str) -> bool:
    """Whether a layer's name ends with a name as PEFT's `target_modules` has it, such as "to_q"."""
    return name == suffix or name.endswith(f".{suffix}")


def chosen(known: Mapping[str, Target], target_modules: Sequence[str] | str) -> list[str]:
    """The layers that `target_modules` names.

    Args:
        known: from `targets`.
        target_modules: the ends of layers' names, such as "to_q" or "attn2.to_k"; or "all-linear".

    Raises:
        TypeError: it is not a list of names.
        ValueError: it is empty, or no layer has such a name.
    """
    if target_modules == ALL_LINEAR:
        return [name for name, target in known.items() if len(target.shapes(1)[0]) == 2]
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"target_modules must be a list of names of layers, got {quoted(target_modules)}")
    for suffix in names:
        if not any(ends_with(name, suffix) for name in known):
            raise ValueError(
                f"target_modules has {quoted(suffix)}, but no layer of the UNet has a name that ends so; use "
                f'"{ALL_LINEAR}" or some of {listed(sorted({short_name(name) for name in known}))}'
            )
    if not names:
        raise ValueError(f'target_modules is empty; name layers, such as "to_q", or pass "{ALL_LINEAR}"')
    return [name for name in known if any(ends_with(name, suffix) for suffix in names)]


def short_name(name: str) -> str:
    """The end of a layer's name that says what it does: "to_q", "to_out.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def described(names: Collection[str], known: Collection[str]) -> list[str]:
    """Layers as PEFT's `target_modules`, shortened where all layers with the same ending are among them."""
    left_out = {short_name(name) for name in known if name not in names}
    return sorted({name if short_name(name) in left_out else short_name(name) for name in names})
