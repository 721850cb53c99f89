"""Long sounds in chunks: the VAE's decoder and the vocoder, in bounded memory, with the same numbers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audioldm2.checkpoints.formats import PARTS
from audioldm2.decoding import FRAMES_AT_ONCE
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE, VAEConfig
from tests.helpers import noise
from tests.reference import BASE, SMALL, assert_close, ours, randomize

# --- the VAE in chunks

VAES: dict[str, dict] = {
    "as AudioLDM 2": {**SMALL["vae"], "layers_per_block": 2},
    "no attention, narrowing upwards": {
        **SMALL["vae"],
        "block_out_channels": [16, 8, 12],
        "mid_block_add_attention": False,
    },
    "widths as AudioLDM 2": {**SMALL["vae"], "block_out_channels": [8, 16, 32]},
    "one level": {
        **SMALL["vae"],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [8],
    },
}


@cache
def vae(name: str = "as AudioLDM 2") -> VAE:
    theirs = randomize(AutoencoderKL(**VAES[name]), seed=3)
    stage: VAE = ours(VAE, VAEConfig, "vae.diffusers", theirs, VAES[name])
    return stage


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 100])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 23, 4), (1, 32, 3), (1, 1, 2), (2, 6, 1)])
@pytest.mark.parametrize("name", VAES)
def test_vae_chunks_equal_the_whole(name: str, batch: int, height: int, width: int, rows: int) -> None:
    latents = noise(batch, 4, height, width)
    assert_close(vae(name).decode_in_chunks(latents, rows), vae(name).decode(latents), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_vae_chunks_in_half_precision(dtype: torch.dtype, bound: float) -> None:
    """As far from float32 as decoding whole may be."""
    half, latents = copy.deepcopy(vae()).to(dtype), noise(2, 4, 23, 4)
    actual = half.decode_in_chunks(latents.to(dtype), 5)
    assert actual.dtype == dtype
    assert_close(actual, vae().decode(latents), bound)


def test_chunks_refuse_what_decode_refuses() -> None:
    with pytest.raises(ValueError, match="latents has shape"):
        vae().decode_in_chunks(noise(1, 3, 8, 4))


class Memory(TorchDispatchMode):
    """Follows what tensors made within take, in bytes: `now` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in before and storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return result


def peak(f: Callable[[], Tensor]) -> int:
    with torch.no_grad(), Memory() as memory:
        kept = f()
        assert kept.untyped_storage().nbytes() <= memory.now < memory.peak, "nothing is freed"
    return memory.peak


def test_memory_is_counted() -> None:
    size = 4 * 1000

    def three_at_once() -> Tensor:
        a = torch.zeros(1000)
        b = a + 1
        c = (a * b).view(10, 100)
        del a, b
        return c + 1

    assert peak(three_at_once) == 3 * size


def test_vae_chunks_take_less_memory() -> None:
    """Whole are a layer's input, middle and output alone: at most 4 times the last map, its input being wide.

    Decoding whole takes 6 of them, for what the norm and the activation give.
    """
    stage, latents = vae("widths as AudioLDM 2"), noise(1, 4, 256, 4)
    one = 4 * 8 * (4 * 256) * (4 * 4)
    whole = peak(lambda: stage.decode(latents))
    chunks = peak(lambda: stage.decode_in_chunks(latents, 8))
    assert 6 * one <= whole
    assert chunks <= 4.25 * one


# --- the vocoder in chunks


@cache
def vocoder(dtype: torch.dtype = torch.float32, **changes: Any) -> HifiGan:
    config = {**BASE["vocoder"], "model_in_dim": 4, "upsample_initial_channel": 32, **changes}
    stage = randomize(HifiGan(HifiGanConfig.from_dict(config)))
    found: HifiGan = stage.to(dtype)
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("frames", "length"), [(16, 150), (1, 60), (40, 41), (40, 80), (37, 151), (1024, 20)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_vocoder_chunks_equal_the_whole(batch: int, frames: int, length: int) -> None:
    mel = noise(batch, length, 4)
    assert_close(vocoder().in_chunks(mel, frames), vocoder()(mel), 1e-5)


@torch.no_grad()
def test_vocoder_chunks_of_a_kernel_larger_by_an_odd_number() -> None:
    """Such a step adds a sample at the end."""
    stage = vocoder(upsample_rates=(5, 2), upsample_kernel_sizes=(16, 4))
    mel = noise(1, 150, 4)
    assert stage(mel).shape[1] > 150 * stage.hop_length
    assert_close(stage.in_chunks(mel, 16), stage(mel), 1e-5)


@torch.no_grad()
def test_vocoder_chunks_are_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a compiled vocoder compiles once."""
    stage, shapes = copy.deepcopy(vocoder()), set()
    stage.register_forward_pre_hook(lambda module, arguments: shapes.add(arguments[0].shape))
    stage.in_chunks(noise(1, 151, 4), 16)
    assert shapes == {(1, 16 + 2 * stage.reach, 4)}


def true_reach(stage: HifiGan) -> int:
    """How many frames to either side decide over one frame's sound, by gradients."""
    middle = stage.reach + 20
    mel = noise(1, 2 * middle + 1, 4).double().requires_grad_()
    samples = slice(middle * stage.hop_length, (middle + 1) * stage.hop_length)
    (stage(mel)[0, samples] * noise(stage.hop_length, seed=1)).sum().backward()
    assert mel.grad is not None
    frames = mel.grad[0].abs().amax(dim=1).nonzero().flatten()
    return int((frames - middle).abs().max())


REACHES: dict[str, dict] = {
    "as AudioLDM 2": {},
    "wide kernels": {"resblock_kernel_sizes": (3, 21), "resblock_dilation_sizes": ((1, 9), (1,))},
    "few steps": {"upsample_rates": (4, 4), "upsample_kernel_sizes": (8, 8)},
    "uneven": {"upsample_rates": (3, 2, 7), "upsample_kernel_sizes": (3, 8, 15)},
}


@pytest.mark.parametrize("changes", REACHES.values(), ids=REACHES)
def test_reach_is_the_receptive_field(changes: dict) -> None:
    stage = vocoder(torch.float64, **changes)
    true = true_reach(stage)
    assert true <= stage.reach <= true + 4


@torch.no_grad()
def test_less_overlap_than_the_receptive_field_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, mel = vocoder(torch.float64), noise(1, 200, 4).double()
    with torch.enable_grad():
        true = true_reach(stage)
    whole = stage(mel)

    def difference(reach: int) -> float:
        monkeypatch.setattr(HifiGan, "reach", reach)
        return (stage.in_chunks(mel, 16) - whole).abs().max().item()

    assert difference(true) <= 1e-14 < difference(true - 3)


@pytest.mark.gpu
@torch.no_grad()
def test_long_latents_take_less_memory_on_a_gpu() -> None:
    stage, latents = copy.deepcopy(vae()).cuda(), noise(1, 4, 4096, 4).cuda()
    peaks, results = [], []
    for decode in (stage.decode, partial(stage.decode_in_chunks, rows=64)):
        decode(latents)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(decode(latents).cpu())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert_close(results[1], results[0], 1e-3)  # TF32 may differ by so much
    assert peaks[1] < peaks[0]


# --- a long generation: the GPU's bar, counted on tensors without data

GIB = 2**30
FRAMES = 15_000  # 150 s
CANDIDATES = 4
ROWS = FRAMES_AT_ONCE // 4  # latents that the pipeline decodes at once


@pytest.fixture(scope="module")
def without_data() -> dict[str, Any]:
    """The base checkpoint's stages at float16."""
    with torch.device("meta"):
        return {
            name: form.stage(form.config.from_dict(BASE[name])).half() for name, (form, *_) in PARTS.items()
        }


@pytest.fixture
def attention_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes no memory but its result, as the kernels of a GPU do it."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))


def without_values(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float16, device="meta")


@torch.no_grad()
def test_150_s_with_4_candidates_fit_in_16_gib(
    without_data: dict[str, Any], attention_in_place: None
) -> None:
    weights = sum(p.nbytes for stage in without_data.values() for p in stage.parameters()) / GIB
    unet, sides = without_data["unet"], 2 * CANDIDATES
    contexts = unet.contexts(
        without_values(sides, 8, 768), without_values(sides, 32, 1024), torch.ones(sides, 32, device="meta")
    )
    step = torch.zeros(1, device="meta")
    peaks = {
        "unet": peak(lambda: unet(without_values(CANDIDATES, 8, FRAMES // 4, 16), step, contexts=contexts))
        / GIB,
        "vae": peak(lambda: without_data["vae"].decode_in_chunks(without_values(1, 8, FRAMES // 4, 16), ROWS))
        / GIB,
        "vocoder": peak(lambda: without_data["vocoder"].in_chunks(without_values(1, FRAMES, 64))) / GIB,
    }
    assert 1.5 < weights < 3
    assert weights + max(peaks.values()) < 8, peaks  # half of the bar: allocators and kernels take some, too
    assert peaks["unet"] > 1, "nothing was counted"


@pytest.mark.slow
@torch.no_grad()
def test_chunks_take_less_and_a_longer_sound_little_more(
    without_data: dict[str, Any], attention_in_place: None
) -> None:
    vae, vocoder = without_data["vae"], without_data["vocoder"]
    latents = (1, 8, FRAMES // 4, 16)
    assert peak(lambda: vae.decode_in_chunks(without_values(*latents))) < 0.7 * peak(
        lambda: vae.decode(without_values(*latents))
    )
    whole = peak(lambda: vocoder(without_values(1, FRAMES, 64)))
    assert peak(lambda: vocoder.in_chunks(without_values(1, FRAMES, 64))) < 0.1 * whole
    assert (
        peak(lambda: vocoder.in_chunks(without_values(1, 4 * FRAMES, 64))) < 0.15 * whole
    )  # most is the result
