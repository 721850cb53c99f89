"""bfloat16: where it is the default, and what stays in float32."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2 import VAE, DDIMScheduler
from audioldm2.checkpoints.options import part_dtype
from audioldm2.cli import generate
from audioldm2.cli.loading import loader
from audioldm2.models.layers import MAX_WIDTH_FOR_FLOAT32, attention, mask_bias
from audioldm2.runtime import capability
from audioldm2.runtime.capability import generation_dtype, multiplies_bfloat16
from tests.helpers import HAMMER, load_pipeline, noise, sound
from tests.reference import Both

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what PyTorch says about this machine."""
    monkeypatch.setattr(capability, "multiplies_bfloat16", multiplies_bfloat16)

    def says(*instructions: str, cuda_devices: int = 0, onednn: bool = True) -> None:
        known = {"avx2": True, "avx512_bf16": False, "architecture": "x86_64"}
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: known | dict.fromkeys(instructions, True), raising=False
        )
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)

    return says


# --- where bfloat16 is the default


@pytest.mark.parametrize("instructions", [("avx512_bf16",), ("amx_bf16",)])
def test_a_cpu_that_multiplies_bfloat16_generates_in_it(cpu: Any, instructions: tuple[str, ...]) -> None:
    cpu(*instructions)
    assert generation_dtype("cpu") == torch.bfloat16
    assert generation_dtype("cuda:1") == torch.float16
    assert generation_dtype("mps") == generation_dtype("xpu") == torch.float32
    cpu(*instructions, onednn=False)
    assert generation_dtype("cpu") == torch.float32


def test_a_cpu_of_which_nothing_is_known_generates_in_float32(
    cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu()
    assert generation_dtype("cpu") == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older releases of PyTorch
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert multiplies_bfloat16()
    for query in capability._OLDER_QUERIES:
        monkeypatch.delattr(torch.cpu, query, raising=False)
    assert not multiplies_bfloat16()


@pytest.mark.parametrize(
    ("machine", "given", "has_gpu", "expected"),
    [
        (("avx512_bf16",), [], None, "bfloat16"),
        ((), [], None, "float32"),
        (("avx512_bf16",), ["--dtype", "float32"], None, "float32"),
        (("avx512_bf16",), [], False, "float32"),  # on the machines of a cluster
        (("avx512_bf16",), [], True, "float16"),
    ],
)
def test_the_command_line_takes_the_dtype_of_the_device(
    cpu: Any, machine: tuple[str, ...], given: list[str], has_gpu: bool | None, expected: str
) -> None:
    cpu(*machine)
    parser = generate.parser()
    options: argparse.Namespace = generate.parse(parser, [HAMMER, *given])
    assert loader(parser, options, has_gpu).dtype == expected


def test_auto_is_the_stored_dtype_unless_only_a_cpu_that_multiplies_bfloat16_is_there(
    cpu: Any, tmp_path: Path
) -> None:
    for instructions, devices, expected in (
        ((), 0, None),
        (("avx512_bf16",), 0, torch.bfloat16),
        (("avx512_bf16",), 1, None),
    ):
        cpu(*instructions, cuda_devices=devices)
        assert part_dtype("auto", tmp_path) == expected
        assert part_dtype({"unet": "auto"}, tmp_path, "unet") == expected
        assert part_dtype(torch.float64, tmp_path) == torch.float64
        assert part_dtype(None, tmp_path) is None
    cpu("avx512_bf16")
    assert VAE.from_pretrained("tiny", "vae", torch_dtype="auto").dtype == torch.bfloat16  # from float16


# --- the latents between the steps


@pytest.mark.parametrize("dtype", HALVES)
def test_only_the_unet_gets_latents_in_half_precision(base: Both, dtype: torch.dtype) -> None:
    pipe = load_pipeline(base.folder, torch_dtype=dtype)
    inputs: list[torch.dtype] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    seen: list[torch.dtype] = []

    def halve(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].dtype)
        return {"latents": tensors["latents"].to(dtype)}  # as callbacks written for diffusers return them

    given = noise(1, 4, 8, 4).to(dtype)
    for options in ({"callback_on_step_end": halve}, {"feature_cache": 2, "loop": True}):
        latents = sound(pipe, latents=given, num_inference_steps=3, output_type="latent", **options)
        assert latents.dtype == torch.float32
    assert {*inputs} == {dtype}
    assert seen == [torch.float32] * 3
    assert pipe.decode_latents(latents).isfinite().all()
    assert torch.equal(pipe.decode(latents), pipe.decode(latents.double()))


def test_a_seed_gives_the_noise_that_it_gives_in_diffusers(base: Both) -> None:
    class Nothing(nn.Module):
        """Predicts no noise, so that the latents are the initial noise times a factor."""

        def forward(
            self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any
        ) -> Any:
            return torch.zeros_like(sample)

    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_pipeline(base.folder, torch_dtype=dtype, unet=Nothing())
        options: dict[str, Any] = {"output_type": "latent", "audio_length_in_s": 0.32}
        found = pipe(HAMMER, generator=torch.Generator().manual_seed(0), **options).audios
        drawn = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        assert torch.equal(found, pipe(HAMMER, latents=drawn, **options).audios)


def test_a_wrapped_unet_returns_what_the_sampler_works_in(base: Both) -> None:
    pipe = load_pipeline(base.folder, torch_dtype=torch.bfloat16)
    options: dict[str, Any] = {"output_type": "latent", "guidance_scale": 2.0}
    expected = sound(pipe, **options)
    pipe.unet = nn.DataParallel(pipe.unet)  # without a GPU it calls the module
    assert torch.equal(sound(pipe, **options), expected)
    pipe.unet = copy.deepcopy(base.theirs.unet).bfloat16()  # `base` is shared, and rounding is for good
    found = sound(pipe, **options)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


# --- attention


@torch.no_grad()
def test_narrow_heads_attend_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, width = 2, MAX_WIDTH_FOR_FLOAT32
    q, k, v = (noise(2, 24, heads * width, seed=seed).bfloat16() for seed in range(3))
    mask = torch.ones(2, 24)
    mask[0, 20:] = 0
    dtypes = []
    attend = F.scaled_dot_product_attention

    def recording(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtypes.append(q.dtype)
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    for bias in (None, mask_bias(mask, torch.bfloat16, -10_000.0)):
        found = attention(q, k, v, heads, bias)
        each = [rearrange(x.double(), "b n (h d) -> b h n d", h=heads) for x in (q, k, v)]
        exact = rearrange(
            attend(*each, attn_mask=None if bias is None else bias.double()), "b h n d -> b n (h d)"
        )
        # Nothing but the result is rounded, to 8 bits.
        assert found.dtype == torch.bfloat16
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    assert dtypes == [torch.float32] * 2

    dtypes.clear()
    attention(q, k, v, heads=1)  # a wide head
    attention(q.half(), k.half(), v.half(), heads)
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, k, v, heads)
    assert dtypes == [torch.bfloat16, torch.float16, torch.bfloat16]


# --- the sounds


def test_a_run_that_draws_noise_at_each_step_stays_close_to_that_in_float32() -> None:
    latents = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_pipeline("tiny", torch_dtype=dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        options: dict[str, Any] = {"eta": 1.0, "guidance_scale": 2.0, "output_type": "latent"}
        options |= {"num_inference_steps": 3, "latents": noise(1, 8, 5, 16), "audio_length_in_s": 0.64}
        latents.append(sound(pipe, **options))
    exact, rounded = latents
    assert (rounded - exact).norm() < 0.05 * exact.norm()
