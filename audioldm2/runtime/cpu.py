"""Faster convolutions on a CPU, for the duration of a `with` block.

    with fast_convolutions(unet):
        noise = unet(latents, t, vectors, states, mask)

Inside the block the float32 convolutions of the given stages run through Winograd's minimal filtering
(`runtime.winograd`) or as matrix products, wherever that was measured to be faster than PyTorch's own
algorithm, and feature maps stay in the channels-last memory format. Anything else (another dtype or device,
gradients, autocast, tracing, compilation, tensor subclasses, modules of other stages, other threads) runs as
it does outside, and so does everything inside a `TorchFunctionMode` of the caller's, which would not see the
convolutions that are answered here.

Kernels are computed from the weights when a convolution is first called in the block, and are freed when it
ends. No module, parameter or global state changes, so nothing that is computed here can outlive the block or
become stale: a `torch.overrides.TorchFunctionMode`, which is local to a thread, intercepts `conv2d`, `conv1d`
and `conv_transpose1d`. It costs about 3 microseconds for each call of a torch function, 0.4 % of a UNet step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from audioldm2.runtime import winograd

# The smallest convolutions for which Winograd's filtering was faster than PyTorch's, in channels (of input
# and output alike).
MIN_CHANNELS_2D = 64
MIN_CHANNELS_1D = 128
MIN_CHANNELS_TRANSPOSED = 32  # of the output of a transposed convolution
# The same in pixels (batch · height · width), for each `torch.backends.cpu.get_cpu_capability()`. A kernel is
# 24/9 times as large as its weight and is read at each call. Where PyTorch's own convolutions are fast, that
# pays off only for large feature maps. Other CPUs were not measured and use PyTorch's own convolutions.
MIN_PIXELS_2D = {
    "AVX2": 256,
    "AVX512": 4096,
}
# Below this number of pixels, one matrix product is faster than either.
MAX_PIXELS_PRODUCT = 256


@contextmanager
def fast_convolutions(*stages: nn.Module) -> Iterator[FastConvolutions]:
    """Run the convolutions of `stages` faster inside the block, on this thread, where that pays.

    The results equal those of PyTorch's convolutions up to rounding, 1e-5 of the output's scale. Weights may
    change inside the block: a change that PyTorch counts (`weight.mul_`, an optimizer, `load_state_dict`,
    `weight.data = other`) is noticed. After one that it does not count (`weight.data.mul_`, NumPy writes, a
    replaced parameter) call `forget`.

    Args:
        stages: modules whose convolutions are to run faster. Those of other modules are left alone.

    Yields:
        The active mode, which has the method `forget`.

    Example:
        >>> with fast_convolutions(vae) as convolutions:
        ...     mel = vae.decode(latents)
        ...     vae.decoder.conv_out.weight.data.mul_(2)
        ...     convolutions.forget()
        ...     louder = vae.decode(latents)
    """
    mode = FastConvolutions(stages)
    if not mode.pays or _is_watched():
        yield mode
        return
    try:
        with mode:
            yield mode
    finally:
        mode.close()


def _is_watched() -> bool:
    """Whether a TorchFunctionMode of the caller's is active, other than the default device's."""
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, FastConvolutions | DeviceContext) for mode in modes)


class _Kernel(NamedTuple):
    """What Winograd's filtering uses in place of a weight."""

    weight: Tensor  # shares the weight's memory, and keeps its address from being given to another tensor
    state: tuple[Any, ...]  # of the weight when the kernel was computed
    kernel: Tensor


class FastConvolutions(TorchFunctionMode):
    """Intercepts the convolutions of some stages while it is active; created by `fast_convolutions`.

    Args:
        stages: the modules whose convolutions it intercepts.
    """

    def __init__(self, stages: tuple[nn.Module, ...]):
        super().__init__()
        self._stages = stages
        self._min_pixels_2d = MIN_PIXELS_2D.get(torch.backends.cpu.get_cpu_capability())
        # By id, which no other tensor can get while this one is referenced here.
        self._weights: dict[int, Tensor] = {}
        self._kernels: dict[int, _Kernel] = {}
        self.forget()

    @property
    def pays(self) -> bool:
        """Whether any convolution of the stages can run faster on this CPU."""
        return any(_is_wide(weight) for weight in self._weights.values())

    def forget(self) -> None:
        """Compute all kernels anew from the stages' current parameters, each when it is next needed."""
        self._kernels.clear()
        self._weights.clear()
        if self._min_pixels_2d is None:
            return
        for stage in self._stages:
            self._weights |= {id(p): p for p in stage.parameters() if _can_be_watched(p)}

    def close(self) -> None:
        """Free all memory, and leave every convolution to PyTorch from now on."""
        self._stages = ()
        self.forget()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # The mode is disabled inside this method, so torch functions called from here are PyTorch's own.
        kwargs = kwargs or {}
        result = None
        if not torch.compiler.is_compiling():
            if func is torch.conv2d:
                result = self._conv_2d(*args, **kwargs)
            elif func is torch.conv1d:
                result = self._conv_1d(*args, **kwargs)
            elif func is torch.conv_transpose1d:
                result = self._conv_transpose_1d(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def _conv_2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """`torch.conv2d`, (B, C, H, W) -> (B, O, H', W') channels last; None if it is left to PyTorch."""
        if not self._intercepts(x, weight, bias, dim=4):
            return None
        keeps_size = (stride, padding, dilation) == ((1, 1), (1, 1), (1, 1))
        if keeps_size and groups == 1 and _is_wide(weight) and bias is not None and _match(x, weight, bias):
            pixels = x.shape[0] * x.shape[2] * x.shape[3]
            if self._min_pixels_2d is not None and pixels >= self._min_pixels_2d:
                return winograd.conv_2d(x, self._kernel(weight, winograd.kernel_2d), bias)
            if pixels < MAX_PIXELS_PRODUCT:
                return conv_2d_by_product(x, weight, bias)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def _conv_1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """`torch.conv1d`, (B, C, L) -> (B, O, L), channels last; None if it is left to PyTorch."""
        if not self._intercepts(x, weight, bias, dim=3) or not _is_wide(weight):
            return None
        if bias is None or not _match(x, weight, bias):
            return None
        taps = weight.shape[2]
        if (stride, groups) != ((1,), 1) or padding != (dilation[0] * (taps // 2),):
            return None
        return winograd.conv_1d(x, self._kernel(weight, winograd.kernel_1d), bias, taps, dilation[0])

    def _conv_transpose_1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        """`torch.conv_transpose1d`, (B, C, L) -> (B, O, L'); None if it is left to PyTorch.

        Channels last if the convolutions that follow run here, too.
        """
        if not self._intercepts(x, weight, bias, dim=3) or weight.shape[1] < MIN_CHANNELS_TRANSPOSED:
            return None
        if bias is None or not _match(x, weight.transpose(0, 1), bias):
            return None
        if (output_padding, groups, dilation) != ((0,), 1, (1,)):
            return None
        y = conv_transpose_1d_by_products(x, weight, bias, stride[0], padding[0])
        return y if weight.shape[1] >= MIN_CHANNELS_1D else y.contiguous()

    def _intercepts(self, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> bool:
        """Whether a call is a plain one with a weight of the stages. All others are left to PyTorch."""
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return (
            id(weight) in self._weights
            and not torch._C._get_tracing_state()
            and all(map(_is_plain, tensors))
            and x.dim() == weight.dim() == dim
            and x.numel() > 0
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and torch._C._len_torch_dispatch_stack() == 0
            and all(unpack_dual(t).tangent is None for t in tensors)
        )

    def _kernel(self, weight: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """The kernel of a weight, computed at its first call and whenever the weight has changed."""
        state = (weight.data_ptr(), weight._version, weight.shape, weight.stride())
        known = self._kernels.get(id(weight))
        if known is None or known.state != state:
            known = _Kernel(weight.detach(), state, transform(weight.detach()))
            self._kernels[id(weight)] = known
        return known.kernel


def conv_2d_by_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with a padding of 1 as one matrix product over the 9 C inputs of every output.

    Args:
        x: (B, C, H, W); fastest in the channels-last memory format.
        weight: (O, C, 3, 3).
        bias: (O,).

    Returns:
        (B, O, H, W) in the channels-last memory format.
    """
    padded = F.pad(rearrange(x, "b c h w -> b h w c"), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)
    # Rearranged to the weight's order, channels outermost, in two copies: a single one takes three times as
    # long.
    rows = rearrange(windows, "b h w c y x -> b h w (y x) c")
    rows = rearrange(rows, "b h w k c -> b h w (c k)")
    return rearrange(F.linear(rows, weight.flatten(1), bias), "b h w o -> b o h w")


def conv_transpose_1d_by_products(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """A transposed convolution as matrix products, which write each output once instead of adding it up.

    `stride` s outputs lie between two inputs. They are one row of s · O numbers, to which the input at their
    place and those before it contribute, each by a product with s of the taps.

    Args:
        x: (B, C, L); fastest where it lies in memory as (B, L, C).
        weight: (C, O, taps).
        bias: (O,).
        stride: s.
        padding: the number of outputs that are left out at each end.

    Returns:
        (B, O, (L - 1) s + taps - 2 padding), which lies in memory as (B, L', O).
    """
    batch, _, length = x.shape
    taps = weight.shape[2]
    parts = [rearrange(part, "c o s -> c (s o)") for part in weight.split(stride, dim=2)]
    before = len(parts) - 1
    rows = F.pad(rearrange(x, "b c l -> b l c"), (0, 0, before, before))
    y = bias.repeat(batch, length + before, stride)
    for q, part in enumerate(parts):
        given = rows[:, before - q : 2 * before - q + length]
        # The last product may have fewer taps than `stride`.
        y[:, :, : part.shape[1]].baddbmm_(given, part.expand(batch, -1, -1))
    y = rearrange(y, "b l (s o) -> b (l s) o", s=stride)
    return rearrange(y[:, padding : (length - 1) * stride + taps - padding], "b l o -> b o l")


def _is_plain(tensor: Any) -> bool:
    """Whether this is a dense float32 tensor on the CPU, and not of a subclass of Tensor."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _can_be_watched(weight: Tensor) -> bool:
    """Whether this can be a convolution's weight and counts its changes (inference tensors do not)."""
    return _is_plain(weight) and weight.dim() in (3, 4) and not weight.is_inference()


def _match(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the channels match; if they do not, PyTorch's convolution says so."""
    return x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]


def _is_wide(weight: Tensor) -> bool:
    """Whether one of the algorithms here applies to this weight, (O, C, 3, 3) or (O, C, taps)."""
    taps, channels = weight.shape[2:], min(weight.shape[:2])
    if len(taps) == 2:
        return taps == (3, 3) and channels >= MIN_CHANNELS_2D
    return taps[0] % 2 == 1 and taps[0] > 1 and channels >= MIN_CHANNELS_1D
