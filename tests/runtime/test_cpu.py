"""What makes stages fast on a CPU gives the convolutions' own numbers: Winograd's filters and tuned layers.

The suite's tiny checkpoints are too narrow for the tuned layers, so stages of 64 channels and more are made
here.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.unet import UNet, UNetConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.runtime import cpu, winograd
from audioldm2.runtime.cpu import tune
from tests.reference import assert_close, ours, randomize

TUNED = (cpu.Conv2d, cpu.Conv1d, cpu.ConvTranspose1d, cpu.Linear)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """As a part of the expected output's largest value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# --- minimal filters


@pytest.mark.parametrize(("outputs", "taps"), [(2, 3), (4, 3), (4, 4)])
def test_a_minimal_filter_is_exact(outputs: int, taps: int) -> None:
    a, g, b = winograd.filter_matrices(outputs, taps)
    points = outputs + taps - 1
    assert [tuple(m.shape) for m in (a, g, b)] == [(outputs, points), (points, taps), (points, points)]
    x, f = noise(points, dtype=torch.float64), noise(taps, seed=1, dtype=torch.float64)
    expected = torch.stack([(f * x[i : i + taps]).sum() for i in range(outputs)])
    assert (a @ ((g @ f) * (b @ x)) - expected).abs().max() <= 1e-12


# float64 tells whether the algorithm is right, float32 what its rounding costs.
PRECISIONS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


@PRECISIONS
@pytest.mark.parametrize("scratch", [None, 1, 5000], ids=["one block", "a row a block", "a few rows a block"])
@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 16, 8), (2, 17, 7), (3, 5, 1), (1, 1, 9), (1, 1, 1), (2, 18, 3), (1, 43, 6)],
)
def test_conv_2d(
    batch: int,
    height: int,
    width: int,
    scratch: int | None,
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also maps that tiles of 4x2 do not divide, and temporaries that hold a part of the map."""
    if scratch is not None:
        monkeypatch.setattr(winograd, "SCRATCH", scratch)
    x, bias = noise(batch, 5, height, width, dtype=dtype), noise(7, seed=2, dtype=dtype)
    weight = noise(7, 5, 3, 3, seed=1, dtype=dtype) / math.sqrt(45)
    actual = winograd.conv_2d(x, winograd.kernel_2d(weight), bias)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert actual.dtype == dtype
    assert largest_difference(actual, expected) <= bound


@PRECISIONS
@pytest.mark.parametrize(
    "scratch", [None, 1, 600], ids=["one block", "a tile a block", "a few tiles a block"]
)
@pytest.mark.parametrize("dilation", [1, 3, 5])
@pytest.mark.parametrize("taps", [3, 5, 7, 11])
def test_conv_1d(
    taps: int,
    dilation: int,
    scratch: int | None,
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also lengths shorter than the filter reaches, and that tiles of 4 · dilation do not divide."""
    if scratch is not None:
        monkeypatch.setattr(winograd, "SCRATCH", scratch)
    weight, bias = noise(6, 4, taps, seed=1, dtype=dtype) / math.sqrt(4 * taps), noise(6, seed=2, dtype=dtype)
    kernel = winograd.kernel_1d(weight)
    for batch, length in ((1, 1), (2, 3), (1, 20), (3, 61), (1, 120), (2, 133)):
        x = noise(batch, 4, length, dtype=dtype)
        actual = winograd.conv_1d(x, kernel, bias, taps, dilation)
        expected = F.conv1d(
            x.double(),
            weight.double(),
            bias.double(),
            padding=taps // 2 * dilation,
            dilation=dilation,
        )
        assert actual.dtype == dtype
        assert largest_difference(actual, expected) <= bound, (batch, length)


def test_rounding_is_as_documented() -> None:
    """At the model's widths too: about 2e-6 of the output's scale, says the module."""
    x, weight, bias = noise(1, 256, 64, 16), noise(128, 256, 3, 3, seed=1) / 48, noise(128, seed=2)
    actual = winograd.conv_2d(x, winograd.kernel_2d(weight), bias)
    assert largest_difference(actual, F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) <= 4e-6
    x, weight = noise(1, 128, 500), noise(128, 128, 11, seed=1) / 37
    actual = winograd.conv_1d(x, winograd.kernel_1d(weight), bias, 11, 3)
    expected = F.conv1d(x.double(), weight.double(), bias.double(), padding=15, dilation=3)
    assert largest_difference(actual, expected) <= 4e-6


# --- layers


def conv_2d(**options: object) -> nn.Conv2d:
    sizes = {"in_channels": 64, "out_channels": 72, "kernel_size": 3, "padding": 1, **options}
    return randomize(nn.Conv2d(**sizes))


def conv_1d(**options: object) -> nn.Conv1d:
    sizes = {"in_channels": 128, "out_channels": 136, "kernel_size": 11, "padding": 5, **options}
    return randomize(nn.Conv1d(**sizes))


FITS = {
    "3x3": conv_2d,
    "3x3, just wide enough": lambda: conv_2d(in_channels=64, out_channels=64),
    "11 taps": conv_1d,
    "11 taps, just wide enough": lambda: conv_1d(in_channels=128, out_channels=128),
    "7 taps, dilated": lambda: conv_1d(kernel_size=7, padding=9, dilation=3),
    "3 taps": lambda: conv_1d(kernel_size=3, padding=1),
    "transposed": lambda: nn.ConvTranspose1d(8, 128, 4, 2),
    "linear": lambda: nn.Linear(5, 7),
}
MISFITS = {
    "stride": lambda: conv_2d(stride=2),
    "no padding": lambda: conv_2d(padding=0),
    "padding as a word": lambda: conv_2d(padding="same"),
    "dilation": lambda: conv_2d(dilation=2),
    "groups": lambda: conv_2d(groups=8),
    "few channels in": lambda: conv_2d(in_channels=63),
    "few channels out": lambda: conv_2d(out_channels=63),
    "no bias": lambda: conv_2d(bias=False),
    "1x1": lambda: conv_2d(kernel_size=1, padding=0),
    "5x5": lambda: conv_2d(kernel_size=5, padding=2),
    "1d: stride": lambda: conv_1d(stride=2),
    "1d: no padding": lambda: conv_1d(padding=0),
    "1d: padding for another dilation": lambda: conv_1d(dilation=3),
    "1d: groups": lambda: conv_1d(groups=8),
    "1d: one tap": lambda: conv_1d(kernel_size=1, padding=0),
    "1d: few channels in": lambda: conv_1d(in_channels=127),
    "1d: few channels out": lambda: conv_1d(out_channels=127),
    "1d: no bias": lambda: conv_1d(bias=False),
    "1d: even taps": lambda: conv_1d(kernel_size=12, padding=6),
    "transposed: few channels out": lambda: nn.ConvTranspose1d(8, 127, 4, 2),
}


@pytest.mark.parametrize("make", FITS.values(), ids=FITS)
def test_what_fits_is_tuned(make: Callable[[], nn.Module]) -> None:
    plain = make()
    names = list(plain.state_dict())
    stage = nn.Sequential(copy.deepcopy(plain))
    tune(stage)
    tuned = stage[0]
    assert isinstance(tuned, TUNED)
    assert isinstance(tuned, type(plain))
    assert list(tuned.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), plain.parameters(), strict=True))
    kind = type(tuned)
    tune(stage)
    assert type(stage[0]) is kind, "a second time changes nothing"
    again = copy.deepcopy(stage)
    assert type(again[0]) is kind
    assert again[0].weight is not tuned.weight


@pytest.mark.parametrize("make", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_stays(make: Callable[[], nn.Module]) -> None:
    layer = make()
    expected = type(layer)
    tune(layer)
    assert type(layer) is expected


def test_a_subclass_of_somebody_else_stays() -> None:
    class Mine(nn.Conv2d):
        pass

    layer = Mine(64, 64, 3, padding=1)
    tune(layer)
    assert type(layer) is Mine


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each algorithm ran since."""
    counts: Counter[str] = Counter()

    def counting(name: str, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: object) -> Tensor:
            counts[name] += 1
            return f(*arguments)

        return counted

    monkeypatch.setattr(winograd, "conv_2d", counting("2d", winograd.conv_2d))
    monkeypatch.setattr(winograd, "conv_1d", counting("1d", winograd.conv_1d))
    monkeypatch.setattr(cpu, "_prepare", counting("prepared", cpu._prepare))
    return counts


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        ((2, 64, 13, 11), "2d"),
        ((1, 64, 16, 16), "2d"),
        ((1, 64, 15, 17), "matrix"),
        ((2, 64, 3, 1), "matrix"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_tuned_2d_layer_equals_the_plain_one(
    shape: tuple[int, ...], algorithm: str, layout: torch.memory_format, used: Counter[str]
) -> None:
    plain = conv_2d()
    tuned = copy.deepcopy(plain)
    tune(tuned)
    x = noise(*shape).to(memory_format=layout)
    actual = tuned(x)
    assert (used["2d"], used["prepared"]) == (int(algorithm == "2d"), 1)
    assert largest_difference(actual, plain.double()(x.double())) <= 1e-5
    assert actual.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize(("taps", "dilation", "channels"), [(11, 1, 128), (7, 3, 150), (3, 5, 128)])
def test_a_tuned_1d_layer_equals_the_plain_one(
    taps: int, dilation: int, channels: int, used: Counter[str]
) -> None:
    plain = conv_1d(
        in_channels=channels,
        out_channels=channels + 4,
        kernel_size=taps,
        dilation=dilation,
        padding=taps // 2 * dilation,
    )
    tuned = copy.deepcopy(plain)
    tune(tuned)
    x = noise(2, channels, 77)
    actual = tuned(x)
    assert used["1d"] == 1
    assert largest_difference(actual, plain.double()(x.double())) <= 1e-5


@pytest.mark.parametrize("length", [1, 9])
def test_a_transposed_layer_equals_the_plain_one(length: int) -> None:
    plain = randomize(nn.ConvTranspose1d(8, 128, 7, stride=3, padding=2))
    tuned = copy.deepcopy(plain)
    tune(tuned)
    with torch.no_grad():
        y = tuned(noise(2, 8, length))
        assert torch.equal(y, plain(noise(2, 8, length)))
    assert y.transpose(1, 2).is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (3, 32), (1, 97), (2, 3, 4, 5), (1, 1)])
def test_a_tuned_linear_map_equals_the_plain_one(shape: tuple[int, ...], bias: bool) -> None:
    plain = randomize(nn.Linear(40, 56, bias=bias))
    tuned = copy.deepcopy(plain)
    tune(tuned)
    y = tuned(noise(*shape, 40))
    assert y.is_contiguous()
    assert largest_difference(y, plain.double()(noise(*shape, 40).double())) <= 1e-5
    transposed = nn.Parameter(noise(40, 56).t())  # as GPT-2's lie in the file
    tuned.weight, plain.weight = transposed, nn.Parameter(transposed.double())
    assert largest_difference(tuned(noise(*shape, 40)), plain(noise(*shape, 40).double())) <= 1e-5


LAYERS = pytest.mark.parametrize(
    ("make", "shape"),
    [(conv_2d, (1, 64, 20, 16)), (conv_2d, (1, 64, 4, 4)), (conv_1d, (1, 128, 50))],
    ids=["Winograd 2d", "matrix product", "Winograd 1d"],
)


@LAYERS
def test_operators_are_what_the_compiler_takes_them_for(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Shapes, strides and what is written to, as the compiler was told."""
    layer = make()
    arguments: tuple = (noise(*shape), layer.weight.detach(), layer.bias.detach())
    if isinstance(layer, nn.Conv1d):
        arguments += (1,)
    torch.library.opcheck(cpu._conv_2d if isinstance(layer, nn.Conv2d) else cpu._conv_1d, arguments)


# --- prepared weights are never stale


def step(layer: nn.Module) -> None:
    """An optimizer's, which writes to the weight where it lies."""
    with torch.enable_grad():
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.SGD([layer.weight], lr=0.1).step()


def load(layer: nn.Module) -> None:
    layer.load_state_dict({"weight": layer.weight + 0.1, "bias": layer.bias + 1})


def write(layer: nn.Module) -> None:
    layer.weight.copy_(layer.weight.flip(0))


def write_a_part(layer: nn.Module) -> None:
    layer.weight[0].zero_()


def write_in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight * 2)


def replace_data(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * 2


CHANGES = [step, load, write, write_a_part, write_in_inference_mode, replace, replace_data]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@LAYERS
def test_a_changed_weight_counts_at_once(
    make: Callable[[], nn.Module], shape: tuple[int, ...], change: Callable[[nn.Module], None]
) -> None:
    layer = make()
    tune(layer)
    x = noise(*shape)
    before = layer(x)
    change(layer)
    plain = make()
    plain.load_state_dict(layer.state_dict())
    expected = plain(x)
    assert largest_difference(before, expected) > 1e-2, "nothing was changed"
    assert largest_difference(layer(x), expected) <= 1e-5


@torch.no_grad()
@LAYERS
def test_a_new_weight_where_an_old_one_lay(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Memory that was freed is given out again: its address and a version of 0 say nothing."""
    x = noise(*shape)
    memory = make().weight.numpy().copy()
    for seed in range(3):
        layer, plain = make(), randomize(make(), seed)
        memory[:] = plain.weight.numpy()
        layer.weight, layer.bias = nn.Parameter(torch.from_numpy(memory)), plain.bias
        tune(layer)
        assert (layer.weight.data_ptr(), layer.weight._version) == (memory.ctypes.data, 0)
        assert largest_difference(layer(x), plain(x)) <= 1e-5
        del layer


@torch.no_grad()
def test_what_was_prepared_goes_with_its_weight() -> None:
    layer = conv_2d()
    tune(layer)
    layer(noise(1, 64, 20, 16))
    address = (layer.weight.data_ptr(), winograd.kernel_2d)
    assert address in cpu._prepared
    del layer
    other = conv_1d()
    tune(other)
    other(noise(1, 128, 20))
    assert address not in cpu._prepared


@torch.no_grad()
def test_maps_of_both_sizes_take_turns() -> None:
    """One weight is kept in two forms."""
    layer, plain = conv_2d(), conv_2d()
    tune(layer)
    for size in (20, 5, 20, 5):
        x = noise(1, 64, size, size)
        assert largest_difference(layer(x), plain(x)) <= 1e-5


@torch.no_grad()
def test_a_weight_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    prepare = winograd.kernel_2d
    monkeypatch.setattr(winograd, "kernel_2d", lambda weight: made.append(1) or prepare(weight))
    layer = conv_2d()
    tune(layer)
    for _ in range(3):
        layer(noise(1, 64, 20, 16))
    assert len(made) == 1


# --- gradients, precisions, modes


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_plain_layers(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain = make().to(dtype)
    tuned = copy.deepcopy(plain)
    tune(tuned)
    results = []
    for layer in (plain, tuned):
        x = noise(*shape, dtype=dtype).requires_grad_()
        layer(x).square().sum().backward()
        results.append((x.grad, layer.weight.grad, layer.bias.grad))
    for mine, reference in zip(*results[::-1], strict=True):
        # PyTorch's own algorithm sums in another order where the weight lies in memory in another way.
        assert largest_difference(mine, reference) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (conv_2d, (1, 64, 20, 16)),
        (conv_2d, (1, 64, 4, 4)),
        (conv_1d, (1, 128, 50)),
        (lambda: nn.Linear(5, 7), (20, 5)),
    ],
    ids=["Winograd 2d", "matrix product", "Winograd 1d", "linear"],
)
def test_one_parameter_learns_alone(make: Callable[[], nn.Module], shape: tuple[int, ...], name: str) -> None:
    """As where biases alone are tuned."""
    layer = make().requires_grad_(False)
    tune(layer)
    parameter = layer.get_parameter(name).requires_grad_()
    layer(noise(*shape)).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().max() > 0


@LAYERS
def test_a_gradient_reaches_the_input_of_frozen_weights(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    layer = make().requires_grad_(False)
    tune(layer)
    x = noise(*shape).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@torch.no_grad()
@LAYERS
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bound: float,
    used: Counter[str],
) -> None:
    plain = make()
    tuned = copy.deepcopy(plain).to(dtype)
    tune(tuned)
    actual = tuned(noise(*shape).to(dtype))
    assert actual.dtype == dtype
    assert not used, "the algorithms here are for float32"
    assert_close(actual, plain(noise(*shape)), bound)


@LAYERS
def test_weights_made_in_inference_mode(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """They do not tell when they are written to."""
    with torch.inference_mode():
        layer, plain = make(), make()
        assert layer.weight.is_inference()
        tune(layer)
        x = noise(*shape)
        assert largest_difference(layer(x), plain(x)) <= 1e-5
        layer.weight.mul_(2)
        plain.weight.mul_(2)
        assert largest_difference(layer(x), plain(x)) <= 1e-5


# --- whole stages

UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 64, 96],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": [[None, 12, 20]] * 3,
    "attention_head_dim": 4,
}
VAE_CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [64, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
}
# 128 channels after the first step, which are tuned, and 64 after the second.
VOCODER = {
    "model_in_dim": 16,
    "upsample_initial_channel": 256,
    "upsample_rates": [5, 2],
    "upsample_kernel_sizes": [16, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "normalize_before": False,
}


@cache
def unets() -> tuple[nn.Module, UNet]:
    theirs = randomize(AudioLDM2UNet2DConditionModel(**UNET), seed=5)
    with torch.no_grad():
        for layer in (theirs.time_embedding.linear_1, theirs.time_embedding.linear_2):
            layer.weight.mul_(2 / layer.in_features**0.5)  # else the time drowns all else
    return theirs, ours(UNet, UNetConfig, "unet.diffusers", theirs, UNET)


@cache
def vaes() -> tuple[nn.Module, VAE]:
    theirs = randomize(AutoencoderKL(**VAE_CONFIG), seed=6)
    return theirs, ours(VAE, VAEConfig, "vae.diffusers", theirs, VAE_CONFIG)


@cache
def vocoders() -> tuple[nn.Module, HifiGan]:
    theirs = randomize(SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER)), seed=7)
    return theirs, ours(HifiGan, HifiGanConfig, "vocoder.transformers", theirs, VOCODER)


def tuned_copy(stage: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(stage)
    tune(tuned)
    return tuned


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 32, 16), (1, 37, 9)])
def test_a_tuned_unet(batch: int, height: int, width: int, used: Counter[str]) -> None:
    theirs, plain = unets()
    given = {
        "sample": noise(batch, 4, height, width),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": noise(batch, 5, 12, seed=1),
        "encoder_hidden_states_1": noise(batch, 7, 20, seed=2),
    }
    actual = tuned_copy(plain)(**given)
    assert 0 < used["2d"] < used["prepared"], "both algorithms are needed"
    assert_close(actual, plain(**given), 1e-5)
    assert_close(actual, theirs(**given).sample, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "frames", "bands"), [(2, 64, 16), (1, 36, 12)])
def test_a_tuned_vae(batch: int, frames: int, bands: int, used: Counter[str]) -> None:
    theirs, plain = vaes()
    tuned, mel = tuned_copy(plain), noise(batch, 1, frames, bands)
    latents = noise(batch, 4, frames // 4, bands // 4, seed=1)
    mean, decoded = tuned.encode(mel).mean, tuned.decode(latents)
    assert 0 < used["2d"] < used["prepared"], "both algorithms are needed"
    assert_close(mean, plain.encode(mel).mean, 1e-5)
    assert_close(decoded, plain.decode(latents), 1e-5)
    assert_close(mean, theirs.encode(mel).latent_dist.mean, 1e-4)
    assert_close(decoded, theirs.decode(latents).sample, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "frames"), [(2, 13), (1, 1)])
def test_a_tuned_vocoder(batch: int, frames: int, used: Counter[str]) -> None:
    theirs, plain = vocoders()
    mel = noise(batch, frames, 16)
    actual = tuned_copy(plain)(mel)
    assert used["1d"] == 18  # of 128 channels three blocks, 6 convolutions each
    assert_close(actual, plain(mel), 1e-5)
    assert_close(actual, theirs(mel), 1e-4)


@pytest.mark.parametrize("pair", [unets, vaes, vocoders])
def test_a_tuned_stage_keeps_its_state(pair: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    _, plain = pair()
    tuned = tuned_copy(plain)
    assert sum(isinstance(module, TUNED) for module in tuned.modules()) > 5
    before, after = plain.state_dict(), tuned.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = copy.deepcopy(plain)
    again.load_state_dict(after)


def test_a_tuned_stage_learns_as_the_plain_one_does() -> None:
    """In float64, as machines round float32 differently; the tuned layers then take PyTorch's own way."""
    _, plain = vaes()
    gradients = []
    for stage in (copy.deepcopy(plain), tuned_copy(plain)):
        stage.double().train().requires_grad_()
        stage(noise(1, 1, 32, 16, dtype=torch.float64)).square().mean().backward()
        gradients.append({name: p.grad for name, p in stage.named_parameters()})
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-9 * scale, name
