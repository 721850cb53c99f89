"""What makes a stage fast on a CPU: memory layout and convolution algorithms, chosen by measurement.

A feature map (B, C, H, W) lies in memory as (B, H, W, C), "channels last": convolutions read whole channels
and transformers need no transposing. Convolutions in float32 without gradients go through Winograd's minimal
filtering (`runtime.winograd`) where that was faster, or through one matrix product where the map is too small
for it. Anything else (a GPU, half precision, training) takes PyTorch's own way.

Measured on two AVX2 cores (AMD Zen 3); `scripts/bench` tells of the machine that it is run on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from audioldm2.runtime import winograd

# Below these PyTorch's own convolutions were faster, or as fast.
LEAST_CHANNELS_2D = 64
LEAST_PIXELS_2D = 256  # of all maps of the batch; a matrix product is faster for fewer
LEAST_CHANNELS_1D = 128
FEW_ROWS = range(12, 97)  # of a linear map's input: a prompt's tokens


# --- weights in the form that an algorithm wants


@dataclass(frozen=True)
class _Prepared:
    """A prepared weight, good for as long as the weight that it was made from is there and unchanged."""

    owner: StorageWeakRef
    version: int
    kernel: Tensor


_prepared: dict[tuple[int, Callable[[Tensor], Tensor]], _Prepared] = {}


def _prepare(weight: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
    """`form(weight)`, made when it is first needed, and anew when the weight has changed.

    A weight that was made in inference mode does not tell when it changes: its form is made for every call.
    """
    if weight.is_inference():
        return form(weight)
    key = (weight.data_ptr(), form)
    found = _prepared.get(key)
    if found is None or found.owner.expired() or found.version != weight._version:
        for gone in [k for k, entry in _prepared.items() if entry.owner.expired()]:
            del _prepared[gone]
        kernel = form(weight.detach())
        found = _prepared[key] = _Prepared(StorageWeakRef(weight.untyped_storage()), weight._version, kernel)
    return found.kernel


def _as_matrix(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (O, 9 C), the places outermost as in a map whose channels lie last."""
    return rearrange(weight, "o c y x -> o (y x c)").contiguous()


# --- the convolutions, as operators that the compiler takes as they are


@torch.library.custom_op("audioldm2::conv_2d", mutates_args=())
def _conv_2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = x.shape
    if batch * height * width >= LEAST_PIXELS_2D:
        y = winograd.conv_2d(x, _prepare(weight, winograd.kernel_2d), bias)
    else:
        padded = F.pad(rearrange(x, "b c h w -> b h w c"), (0, 0, 1, 1, 1, 1))
        places = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, H, W, C, 3, 3)
        rows = rearrange(places, "b h w c y x -> b h w (y x c)")
        y = rearrange(F.linear(rows, _prepare(weight, _as_matrix), bias), "b h w o -> b o h w")
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("audioldm2::conv_1d", mutates_args=())
def _conv_1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: int) -> torch.Tensor:
    kernel = _prepare(weight, winograd.kernel_1d)
    y = winograd.conv_1d(x, kernel, bias, weight.shape[2], dilation)
    return rearrange(rearrange(y, "b o l -> b l o").contiguous(), "b l o -> b o l")


@_conv_2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


@_conv_1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], weight.shape[0]).transpose(1, 2)


# --- the layers


def _suits(x: Tensor, layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.Linear) -> bool:
    """Whether the algorithms here are for this call."""
    learns = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    trained = torch.is_grad_enabled() and (x.requires_grad or learns)
    return not trained and x.device.type == "cpu" and x.dtype == layer.weight.dtype == torch.float32


class Conv2d(nn.Conv2d):
    """A 3x3 convolution with the algorithm that suits the size of the map."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not _suits(x, self):
            return super().forward(x)
        # Called past the dispatcher where nothing is compiled: it costs as much as a small convolution.
        conv = _conv_2d if torch.compiler.is_compiling() else _conv_2d._init_fn
        return conv(x, self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """A convolution over time that keeps the length, by Winograd's minimal filtering."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not _suits(x, self):
            return super().forward(x)
        conv = _conv_1d if torch.compiler.is_compiling() else _conv_1d._init_fn
        return conv(x, self.weight, self.bias, self.dilation[0])


class ConvTranspose1d(nn.ConvTranspose1d):
    """A transposed convolution whose result lies in memory with channels last, as `Conv1d` wants it."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        y = super().forward(x, output_size)
        if not _suits(x, self):
            return y
        return rearrange(rearrange(y, "b c l -> b l c").contiguous(), "b l c -> b c l")


class Linear(nn.Linear):
    """A linear map that swaps its factors for few rows: W x^T is up to half as fast again as x W^T."""

    def forward(self, x: Tensor) -> Tensor:
        # Asked first: while it compiles, the number of rows may be none yet.
        if torch.compiler.is_compiling() or x.shape[:-1].numel() not in FEW_ROWS or not _suits(x, self):
            return super().forward(x)
        y = (self.weight @ x.flatten(0, -2).t()).t()
        y = y.contiguous() if self.bias is None else torch.add(y, self.bias, out=x.new_empty(y.shape))
        return y.view(*x.shape[:-1], -1)


def tune(stage: nn.Module) -> None:
    """Have a stage run as is fastest where it is; the numbers that come out stay the same up to rounding.

    The layers keep their parameters and their names, and stay `nn.Conv2d`, `nn.Linear` and so on.
    """
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            if type(module) is nn.Conv2d and _fits_2d(module):
                module.__class__ = Conv2d
            if type(module) is nn.Conv2d or module.weight.device.type != "cpu":
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif type(module) is nn.Conv1d and _fits_1d(module):
            module.__class__ = Conv1d
        elif type(module) is nn.ConvTranspose1d and module.out_channels >= LEAST_CHANNELS_1D:
            module.__class__ = ConvTranspose1d
        elif type(module) is nn.Linear:
            module.__class__ = Linear


def _fits_2d(conv: nn.Conv2d) -> bool:
    keeps = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1)
    wide = min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS_2D
    return keeps and wide and conv.groups == 1 and conv.bias is not None


def _fits_1d(conv: nn.Conv1d) -> bool:
    taps, dilation = conv.kernel_size[0], conv.dilation[0]
    keeps = conv.stride == (1,) and taps % 2 == 1 and conv.padding == (dilation * (taps // 2),)
    wide = min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS_1D
    return keeps and wide and taps > 1 and conv.groups == 1 and conv.bias is not None
