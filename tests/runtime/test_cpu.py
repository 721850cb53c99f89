"""Fast convolutions: the numbers of PyTorch's, from the weights as they are, for as long as a block lasts."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.unet import UNet, UNetConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.runtime import cpu, winograd
from audioldm2.runtime.cpu import fast_convolutions
from tests.helpers import noise
from tests.reference import SMALL, assert_close, randomize

TOLERANCE = 1e-5


def conv_2d(channels_in: int = 64, channels_out: int = 72) -> nn.Module:
    return randomize(nn.Conv2d(channels_in, channels_out, 3, padding=1))


def conv_1d(taps: int = 7, dilation: int = 1) -> nn.Module:
    return randomize(nn.Conv1d(128, 136, taps, dilation=dilation, padding=dilation * (taps // 2)))


def conv_transpose_1d(taps: int = 5, stride: int = 2, padding: int = 1) -> nn.Module:
    return randomize(nn.ConvTranspose1d(128, 136, taps, stride=stride, padding=padding))


@pytest.fixture(params=["AVX2", "AVX512"], autouse=True)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The paths of both kinds of CPU, whichever this one is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return str(request.param)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our own algorithms, one for each call."""
    calls: list[str] = []

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: object) -> Tensor:
            calls.append(name)
            result: Tensor = original(*arguments)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(winograd, "conv_2d")
    watch(winograd, "conv_1d")
    watch(cpu, "conv_2d_by_product")
    watch(cpu, "conv_transpose_1d_by_products")
    return calls


def within(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad(), fast_convolutions(module):
        result: Tensor = module(*inputs)
    return result


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 64, 64, 64), "conv_2d"),
        ((3, 64, 65, 63), "conv_2d"),
        ((2, 64, 601, 7), "conv_2d"),
        ((1, 64, 5, 4), "conv_2d_by_product"),
        ((2, 64, 1, 1), "conv_2d_by_product"),
    ],
)
def test_two_dimensional_convolutions(shape: tuple[int, ...], expected: str, answered: list[str]) -> None:
    layer, x = conv_2d(), noise(*shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_close(within(layer, x.contiguous(memory_format=layout)), layer(x), TOLERANCE)
    assert answered == [expected] * 2


def test_the_kind_of_cpu_decides(capability: str, answered: list[str]) -> None:
    within(conv_2d(), noise(1, 64, 32, 32))
    assert answered == (["conv_2d"] if capability == "AVX2" else [])


def test_an_unknown_cpu_uses_pytorchs_own(monkeypatch: pytest.MonkeyPatch, answered: list[str]) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    layer, x = conv_2d(), noise(1, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(within(layer, x), layer(x))
    assert not answered


@torch.no_grad()
@pytest.mark.parametrize("taps", [3, 5, 7, 11])
@pytest.mark.parametrize("dilation", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 128, 200), (3, 128, 37), (2, 128, 1)])
def test_one_dimensional_convolutions(
    taps: int, dilation: int, shape: tuple[int, ...], answered: list[str]
) -> None:
    layer, x = conv_1d(taps, dilation), noise(*shape)
    assert_close(within(layer, x), layer(x), TOLERANCE)
    assert answered == ["conv_1d"]


# Taps that the stride divides, and that it does not; as few as the stride; and none that are left out.
@torch.no_grad()
@pytest.mark.parametrize(
    ("taps", "stride", "padding"), [(16, 5, 5), (16, 4, 6), (4, 2, 1), (3, 3, 0), (5, 1, 2)]
)
@pytest.mark.parametrize("shape", [(1, 128, 30), (3, 128, 7), (2, 128, 1)])
def test_transposed_convolutions(
    taps: int, stride: int, padding: int, shape: tuple[int, ...], answered: list[str]
) -> None:
    stage = nn.ModuleList([conv_transpose_1d(taps, stride, padding), conv_1d()])
    x = noise(*shape)
    expected = stage[0](x)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        with fast_convolutions(stage):
            y = stage[0](given)
        assert_close(y, expected, TOLERANCE)
        assert y.stride(1) == 1, "channels last"
    assert answered == ["conv_transpose_1d_by_products"] * 2


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"output_padding": 1}, {"groups": 2}, {"dilation": 2}, {"bias": False}])
def test_other_transposed_convolutions_are_pytorchs_own(changes: dict[str, Any], answered: list[str]) -> None:
    stage = nn.ModuleList([randomize(nn.ConvTranspose1d(256, 256, 4, stride=2, **changes)), conv_1d()])
    x = noise(2, 256, 9)
    with fast_convolutions(stage):
        y = stage[0](x)
    assert torch.equal(y, stage[0](x))
    assert not answered


@torch.no_grad()
@pytest.mark.parametrize("make", [conv_2d, conv_1d, conv_transpose_1d])
def test_every_bias_counts(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = noise(1, 64, 64, 64) if make is conv_2d else noise(1, 128, 50)
    before = within(layer, x)
    layer.bias[5] += 1
    assert (within(layer, x) - before)[:, 5].min() > 0.9


STAGES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "unet": lambda: (
        UNet(UNetConfig.from_dict({**SMALL["unet"], "block_out_channels": [64, 64, 96], "in_channels": 4})),
        (noise(2, 4, 64, 32), torch.tensor(500), noise(2, 8, 16), noise(2, 5, 20)),
    ),
    "vae": lambda: (
        VAE(VAEConfig.from_dict({**SMALL["vae"], "block_out_channels": [64, 64, 64]})),
        (noise(1, 1, 128, 64),),
    ),
    "vocoder": lambda: (
        HifiGan(HifiGanConfig.from_dict({**SMALL["vocoder"], "upsample_initial_channel": 256})),
        (noise(2, 30, 16),),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STAGES)
def test_whole_stages(name: str, answered: list[str]) -> None:
    stage, inputs = STAGES[name]()
    randomize(stage)
    assert_close(within(stage, *inputs), stage(*inputs), TOLERANCE)
    assert len(answered) >= 5


# --- from the weights as they are


def multiply_data(layer: nn.Module) -> None:
    layer.weight.data.mul_(1.5)


def multiply(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.5)


def write_through_numpy(layer: nn.Module) -> None:
    layer.weight.detach().numpy()[...] *= 1.5


def replace_data(layer: nn.Module) -> None:
    layer.weight.data = 1.5 * layer.weight.data


def replace_parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(1.5 * layer.weight.detach())


def load_state(layer: nn.Module) -> None:
    layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()})


def optimize(layer: nn.Module) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layer.zero_grad()


def parametrize(layer: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)


CHANGES = [
    multiply_data,
    multiply,
    write_through_numpy,
    replace_data,
    replace_parameter,
    load_state,
    optimize,
    parametrize,
]
MAKES = pytest.mark.parametrize("make", [conv_2d, conv_1d])


def example(layer: nn.Module) -> Tensor:
    return noise(1, 64, 64, 64) if isinstance(layer, nn.Conv2d) else noise(1, 128, 50)


@MAKES
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_blocks(make: Callable[[], nn.Module], change: Callable[[nn.Module], None]) -> None:
    """Bit for bit what a new layer with the same weights gives."""
    layer = make()
    x = example(layer)
    before = within(layer, x)
    change(layer)
    after = within(layer, x)
    assert (after - before).abs().max() > 0.1
    fresh = make()
    fresh.load_state_dict({"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()})
    if change is parametrize:  # its weight is computed anew at each call, and left to PyTorch
        assert_close(after, within(fresh, x), TOLERANCE)
    else:
        assert torch.equal(after, within(fresh, x))


@MAKES
@pytest.mark.parametrize("change", CHANGES[:-1], ids=lambda change: change.__name__)
def test_a_change_within_a_block(make: Callable[[], nn.Module], change: Callable[[nn.Module], None]) -> None:
    """After `forget` any change counts."""
    layer = make()
    x = example(layer)
    with torch.no_grad(), fast_convolutions(layer) as convolutions:
        before = layer(x)
        with torch.enable_grad():
            change(layer)
        convolutions.forget()
        after = layer(x)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, within(layer, x))


@torch.no_grad()
def test_a_counted_change_within_a_block_needs_no_forget() -> None:
    layer, x = conv_2d(), noise(1, 64, 64, 64)
    with fast_convolutions(layer):
        layer(x)
        layer.weight.mul_(1.5)
        after = layer(x)
    assert torch.equal(after, within(layer, x))


# --- nothing is left


def test_nothing_outlives_the_block_nor_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[weakref.ref[Tensor]] = []
    original = winograd.kernel_2d

    def watched(weight: Tensor) -> Tensor:
        kernel = original(weight)
        kernels.append(weakref.ref(kernel))
        return kernel

    monkeypatch.setattr(winograd, "kernel_2d", watched)
    layer, x = conv_2d(), noise(1, 64, 64, 64)
    before = (type(layer), sorted(vars(layer)), layer.weight.stride())
    within(layer, x)

    def failing() -> None:
        with torch.no_grad(), fast_convolutions(layer):
            layer(x)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    gc.collect()
    assert len(kernels) == 2
    assert not any(kernel() is not None for kernel in kernels)
    assert torch._C._len_torch_function_stack() == 0
    assert (type(layer), sorted(vars(layer)), layer.weight.stride()) == before


def test_narrow_stages_do_not_enter_the_mode() -> None:
    stage = randomize(UNet(UNetConfig.from_dict(SMALL["unet"])))
    with fast_convolutions(stage) as convolutions:
        assert torch._C._len_torch_function_stack() == 0
        assert not convolutions.pays


@torch.no_grad()
def test_threads_with_a_model_each() -> None:
    layers = [randomize(nn.Conv2d(64, 64, 3, padding=1), seed) for seed in range(4)]
    x = noise(1, 64, 64, 64)
    expected = [within(layer, x) for layer in layers]

    def work(layer: nn.Module) -> list[Tensor]:
        return [within(layer, x) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(work, layers), expected, strict=True):
            assert all(torch.equal(result, wanted) for result in results)


@torch.no_grad()
def test_other_modules_are_left_alone(answered: list[str]) -> None:
    layer, other, x = conv_2d(), copy.deepcopy(conv_2d()), noise(1, 64, 64, 64)
    with fast_convolutions(layer):
        result = other(x)
    assert not answered
    assert torch.equal(result, other(x))


@torch.no_grad()
@pytest.mark.parametrize("make", [conv_1d, conv_2d])
def test_the_default_device_makes_no_difference(make: Callable[[], nn.Module], answered: list[str]) -> None:
    winograd.filter_matrices.cache_clear()
    layer = make()
    x = noise(1, *layer.weight.shape[1:2], *[64] * (layer.weight.dim() - 2))
    with torch.device("meta"):
        assert_close(within(layer, x), layer(x), TOLERANCE)
    assert_close(within(layer, x), layer(x), TOLERANCE)
    assert len(answered) == 2


# --- what is left to PyTorch


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, answered: list[str]) -> None:
    layer, x = conv_2d().to(dtype), noise(1, 64, 8, 8).to(dtype)
    with torch.no_grad():
        assert torch.equal(within(layer, x), layer(x))
    assert not answered


def test_gradients(answered: list[str]) -> None:
    layer, x = conv_2d().requires_grad_(), noise(1, 64, 64, 64)
    with fast_convolutions(layer):
        layer(x).square().mean().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().mean().backward()
    assert_close(found, layer.weight.grad, TOLERANCE)
    assert not answered


@torch.no_grad()
def test_autocast_vmap_and_tracing(answered: list[str]) -> None:
    layer, x = conv_2d(), noise(2, 1, 64, 64, 64)
    with fast_convolutions(layer):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x[0]).dtype == torch.bfloat16
        assert_close(torch.func.vmap(layer)(x)[1], layer(x[1]), TOLERANCE)
        answered.clear()
        traced = torch.jit.trace(layer, x[0], check_trace=False)
    assert not answered
    assert_close(traced(x[1]), layer(x[1]), TOLERANCE)


def test_a_function_mode_of_the_caller_sees_the_convolutions(answered: list[str]) -> None:
    class Halve(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            result = func(*args, **(kwargs or {}))
            return result / 2 if func is torch.conv2d else result

    layer, x = conv_2d(), noise(1, 64, 64, 64)
    with Halve():
        result = within(layer, x)
    assert not answered
    with torch.no_grad():
        assert torch.equal(result, layer(x) / 2)
    with torch.device("cpu"):
        within(layer, x)
    assert answered == ["conv_2d"]


def test_inference_mode(answered: list[str]) -> None:
    layer, x = conv_2d(), noise(1, 64, 64, 64)
    with torch.inference_mode():
        result = within(layer, x)
    assert answered == ["conv_2d"]
    with torch.no_grad():
        assert_close(result, layer(x), TOLERANCE)


def test_forward_mode_derivatives(answered: list[str]) -> None:
    layer, x, tangent = conv_2d(), noise(1, 64, 64, 64), noise(1, 64, 64, 64, seed=1)
    with torch.no_grad(), fast_convolutions(layer), forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert not answered
    assert_close(found, layer(tangent) - layer(0 * tangent), TOLERANCE)


@torch.no_grad()
def test_tensor_subclasses(answered: list[str]) -> None:
    class Mine(Tensor):
        pass

    layer, x = conv_2d(), noise(1, 64, 64, 64)
    result = within(layer, x.as_subclass(Mine))
    assert not answered
    assert type(result) is Mine
    assert torch.equal(result.as_subclass(Tensor), layer(x))


@torch.no_grad()
def test_dispatch_modes_see_the_convolution() -> None:
    layer, x, counts = conv_2d(), noise(1, 64, 64, 64), []
    for stage in (layer, conv_2d()):  # in a block of its own, and in that of another layer
        with fast_convolutions(stage), FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_wrong_shapes_raise_what_pytorch_raises() -> None:
    layer = conv_2d()
    with fast_convolutions(layer):
        with pytest.raises(RuntimeError, match="to have 64 channels, but got 63"):
            layer(noise(1, 63, 20, 16))
        layer.bias.data = noise(1)
        with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional with 72 elements"):
            layer(noise(1, 64, 20, 16))
        layer.bias.data = noise(72)
        assert layer(noise(64, 20, 16)).shape == (72, 20, 16)  # without a batch
        assert layer(noise(0, 64, 20, 16)).shape == (0, 72, 20, 16)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_other_convolutions(layer: nn.Module, answered: list[str]) -> None:
    stage, x = nn.Sequential(randomize(layer), conv_2d(64, 64)), noise(1, 64, 12, 12)
    assert_close(within(stage, x), stage(x), TOLERANCE)
    assert "conv_1d" not in answered
