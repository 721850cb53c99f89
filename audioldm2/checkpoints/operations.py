"""The operations of a weight map: from checkpoint tensors to one parameter, and back.

* `concat` joins equal parts along the first axis: separate q, k and v matrices.
* `squeeze` drops the last two axes of a 1x1 convolution that is used as a linear map.
* `transpose` swaps the axes of a matrix: GPT-2's "Conv1D".
* `fold_weight_norm(g, v)` computes w = g v / |v| (Salimans and Kingma 2016, eq. 2), |v| per output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """How checkpoint tensors become one parameter, and how a parameter becomes checkpoint tensors again.

    Args:
        shape: from the shapes of the tensors to that of the parameter; raises ValueError if they do not fit.
        apply: from the tensors to the parameter.
        invert: from the parameter and the number of tensors to the tensors.
        takes: how many tensors there may be: at least, at most.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    apply: Callable[[Sequence[Tensor]], Tensor]
    invert: Callable[[Tensor, int], list[Tensor]]
    takes: tuple[int, int | None] = (1, 1)


def _concat_shape(shapes: Sequence[Shape]) -> Shape:
    if len(set(shapes)) != 1 or not shapes[0]:
        raise ValueError(f"cannot concatenate shapes {', '.join(map(str, shapes))}")
    return (len(shapes) * shapes[0][0], *shapes[0][1:])


def _concat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` in one thread.

    Memory limits it, not the number of threads. `torch.cat` would wait for all of PyTorch's threads once per
    tensor, which takes up to 10 ms where the cores are busy, with the import of the tokenizers for example.
    """
    if any(tensor.device.type != "cpu" or tensor.dtype != tensors[0].dtype for tensor in tensors):
        return torch.cat(list(tensors))
    joined = tensors[0].new_empty(_concat_shape([tuple(tensor.shape) for tensor in tensors]))
    np.concatenate([_bytes(tensor) for tensor in tensors], out=_bytes(joined))
    return joined


def _bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as an array; NumPy does not have all of PyTorch's types."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def _squeeze_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 4 or shape[2:] != (1, 1):
        raise ValueError(f"{shape} is not a 1x1 convolution")
    return shape[:2]


def _transpose_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 2:
        raise ValueError(f"{shape} is not a matrix")
    return shape[::-1]


def _weight_norm_shape(shapes: Sequence[Shape]) -> Shape:
    gain, direction = shapes
    if not direction or gain != (direction[0],) + (1,) * (len(direction) - 1):
        raise ValueError(f"gain {gain} does not match direction {direction}")
    return direction


def _norm_per_output(weight: Tensor) -> Tensor:
    """The norm over all axes but the first, which are kept with size 1, in float32."""
    norm: Tensor = weight.float().flatten(1).norm(dim=1)
    return norm.view(-1, *[1] * (weight.dim() - 1))


def _fold_weight_norm(tensors: Sequence[Tensor]) -> Tensor:
    gain, direction = tensors
    return (gain.float() * direction.float() / _norm_per_output(direction)).to(direction.dtype)


OPERATIONS = {
    "copy": Operation(lambda s: s[0], lambda t: t[0], lambda w, n: [w]),
    "concat": Operation(_concat_shape, _concat, lambda w, n: list(w.chunk(n)), takes=(2, None)),
    "squeeze": Operation(_squeeze_shape, lambda t: t[0][:, :, 0, 0], lambda w, n: [w[:, :, None, None]]),
    "transpose": Operation(_transpose_shape, lambda t: t[0].t(), lambda w, n: [w.t()]),
    "fold_weight_norm": Operation(
        _weight_norm_shape,
        _fold_weight_norm,
        lambda w, n: [_norm_per_output(w).to(w.dtype), w],
        takes=(2, 2),
    ),
}
