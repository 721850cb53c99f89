"""Long sounds in bounded memory, and stages moved when they are needed: with the same numbers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import audioldm2.pipeline
from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.formats import PARTS
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.pipeline import _groups
from audioldm2.runtime.cpu import tune
from audioldm2.runtime.offload import Offload
from tests.reference import BASE, SMALL, assert_close, ours, randomize

HAMMER = "A hammer hitting a wooden surface."


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(folder: Path, **options: Any) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(random_checkpoint: Path) -> AudioLDM2Pipeline:
    return load(random_checkpoint)


def sound(pipe: AudioLDM2Pipeline, prompt: str | list[str] = HAMMER, **arguments: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 2, "audio_length_in_s": 0.64, **arguments}
    audio: np.ndarray = pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).audios
    return audio


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


@torch.no_grad()
def test_a_tuned_vae_in_chunks() -> None:
    tuned, latents = copy.deepcopy(vae()), noise(2, 4, 23, 4)
    tune(tuned)
    assert_close(tuned.decode_in_chunks(latents, 5), vae().decode(latents), 1e-5)


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


# --- the pipeline


@pytest.fixture
def calls(pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """How the VAE and the vocoder were called: the method, the rows and the length of what it was given."""
    found: list[tuple[str, int, int]] = []

    def watching(name: str, f: Callable[..., Tensor], axis: int) -> Callable[..., Tensor]:
        def watched(x: Tensor, *arguments: Any) -> Tensor:
            found.append((name, x.shape[0], x.shape[axis]))
            return f(x, *arguments)

        return watched

    monkeypatch.setattr(pipe.vae, "decode", watching("decode", pipe.vae.decode, 2))
    monkeypatch.setattr(pipe.vae, "decode_in_chunks", watching("in rows", pipe.vae.decode_in_chunks, 2))
    monkeypatch.setattr(pipe.vocoder, "forward", watching("vocode", pipe.vocoder.forward, 1))
    # Its own chunks are longer than these sounds.
    in_chunks = partial(pipe.vocoder.in_chunks, frames=24)
    monkeypatch.setattr(pipe.vocoder, "in_chunks", watching("in frames", in_chunks, 1))
    return found


def test_long_sounds_are_made_in_chunks(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls == [("decode", 2, 32), ("vocode", 2, 128)]
    calls.clear()
    monkeypatch.setattr(audioldm2.pipeline, "CHUNK", 40)
    chunks = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls[:2] == [("in rows", 1, 32)] * 2
    frames = [(name, length) for name, _, length in calls[2:]]
    window = 24 + 2 * pipe.vocoder.reach
    assert window < 128
    assert frames == [("in frames", 128), *[("vocode", window)] * 6] * 2
    assert whole.std() > 0.02
    np.testing.assert_allclose(chunks, whole, atol=1e-3)


def test_a_batch_is_worked_on_in_equal_groups(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a compiled stage sees one shape."""
    prompts = [HAMMER, "Rain falls", "A dog", "Wind", "Birds", "Techno"]
    whole = sound(pipe, prompts)
    assert calls == [("decode", 6, 16), ("vocode", 6, 64)]
    calls.clear()
    monkeypatch.setattr(audioldm2.pipeline, "CHUNK", 5 * 64)
    groups = sound(pipe, prompts)
    assert calls == [*[("decode", 3, 16)] * 2, *[("vocode", 3, 64)] * 2]
    np.testing.assert_allclose(groups, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "length", "longest", "groups"),
    [(6, 10, 60, [6]), (6, 10, 59, [3, 3]), (5, 10, 49, [1] * 5), (3, 100, 50, [1] * 3), (4, 10, 29, [2, 2])],
)
def test_groups(rows: int, length: int, longest: int, groups: list[int]) -> None:
    x = noise(rows, 2, length)
    found = _groups(x, longest)
    assert [len(group) for group in found] == groups
    assert torch.equal(torch.cat(found), x)


# --- stages that take turns on the device


class Stage(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(3))
        randomize(self, seed)

    def places(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.state_dict().values()]

    def values(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.state_dict().values()]


@pytest.fixture
def stages() -> list[Stage]:
    return [Stage(seed).requires_grad_(False) for seed in range(3)]


@pytest.fixture
def offload(stages: list[Stage]) -> Offload:
    """To the CPU: where a stage "is on the device", its tensors are copies of those at home."""
    return Offload("cpu", stages)


def test_a_stage_is_there_until_another_is(offload: Offload, stages: list[Stage]) -> None:
    a, b, c = stages
    values = [stage.values() for stage in stages]
    waiting = [stage.places() for stage in stages]
    offload.take(a)
    there = a.places()
    assert not set(there) & set(waiting[0])
    assert [b.places(), c.places()] == waiting[1:]
    offload.take(a)
    assert a.places() == there, "it moves once"
    home = [offload._places[tensor].home.data_ptr() for tensor in (*a.parameters(), *a.buffers())]
    offload.take(b)
    assert sorted(a.places()) == sorted(home)
    offload.take(c)
    offload.take(a)
    assert not set(a.places()) & set(home)
    offload.release()
    assert sorted(a.places()) == sorted(home)
    for stage, expected in zip(stages, values, strict=True):
        assert all(map(torch.equal, stage.values(), expected))
    offload.release()


def change_in_place(stage: Stage) -> None:
    stage.layer.weight.mul_(2)
    stage.count.add_(1)


def load_into(stage: Stage) -> None:
    stage.load_state_dict(Stage(9).state_dict())


def replace_parameter(stage: Stage) -> None:
    stage.layer.weight = nn.Parameter(stage.layer.weight * 2, requires_grad=False)


def replace_data(stage: Stage) -> None:
    stage.layer.weight.data = stage.layer.weight.data * 2


def turn_into_half(stage: Stage) -> None:
    stage.half()


def add_a_layer(stage: Stage) -> None:
    stage.layer_2 = nn.Linear(2, 2).requires_grad_(False)


CHANGES = [change_in_place, load_into, replace_parameter, add_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_at_work_comes_home_changed(
    change: Callable[[Stage], None], offload: Offload, stages: list[Stage]
) -> None:
    a, b, _ = stages
    offload.take(a)
    before = a.values()
    change(a)
    changed = a.values()
    assert len(changed) > len(before) or not all(map(torch.equal, changed, before))
    for stage in (b, a, b):
        offload.take(stage)
        assert all(map(torch.equal, a.values(), changed))


def test_what_did_not_change_is_not_copied_back(offload: Offload, stages: list[Stage]) -> None:
    a, b, _ = stages
    change_in_place(a)
    offload.take(a)
    offload._places[a.layer.weight].home.fill_(7)
    offload.take(b)
    assert (a.layer.weight == 7).all()


@pytest.mark.parametrize(
    "change", [*CHANGES, replace_data, turn_into_half], ids=lambda change: change.__name__
)
def test_what_changed_at_home_is_what_is_taken(
    change: Callable[[Stage], None], offload: Offload, stages: list[Stage]
) -> None:
    a, b, _ = stages
    offload.take(a)
    offload.take(b)
    change(a)
    changed, dtype = a.values(), a.layer.weight.dtype
    for stage in (a, b, a):
        offload.take(stage)
        assert all(map(torch.equal, a.values(), changed))
        assert a.layer.weight.dtype == dtype


def test_stages_move_in_the_order_of_use(pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []

    def moving(sign: str, f: Callable[..., None]) -> Callable[..., None]:
        def moved(self: Offload, stage: nn.Module, *arguments: Any) -> None:
            moves.append(sign + next(name for name, part in pipe.stages.items() if part is stage))
            f(self, stage, *arguments)

        return moved

    monkeypatch.setattr(Offload, "_bring", moving("+", Offload._bring))
    monkeypatch.setattr(Offload, "_send_home", moving("-", Offload._send_home))
    pipe.enable_model_cpu_offload(device="cpu")
    sound(pipe, num_waveforms_per_prompt=2)
    order = [*pipe.stages, "text_encoder"]  # the last one ranks
    assert moves == [sign + name for name in order for sign in "+-"]


def test_a_changed_stage_of_a_pipeline_that_moves(random_checkpoint: Path, pipe: AudioLDM2Pipeline) -> None:
    other = load(random_checkpoint)
    other.enable_model_cpu_offload(device="cpu")
    before = sound(other)
    for p in (pipe, other):
        with torch.no_grad():
            p.unet.conv_out.weight.mul_(0.7)
            p.text_encoder_2.norm.weight.mul_(0.7)
    expected = sound(pipe)
    assert np.abs(before - expected).max() > 0.01
    np.testing.assert_allclose(sound(other), expected, atol=1e-5)


# --- on a GPU


@pytest.mark.gpu
def test_the_next_stage_is_on_its_way_from_pinned_memory() -> None:
    stages = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(3)]
    size = 2048 * 2048 * 4
    values = [stage.weight.clone() for stage in stages]
    before = torch.cuda.memory_allocated()
    offload = Offload("cuda", stages)
    offload.take(stages[0])
    assert [stage.weight.device.type for stage in stages] == ["cuda", "cuda", "cpu"]
    offload.take(stages[1])
    assert [stage.weight.device.type for stage in stages] == ["cpu", "cuda", "cuda"]
    assert stages[0].weight.is_pinned()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for stage, expected in zip(stages * 2, values * 2, strict=True):
        offload.take(stage)
        assert torch.equal(stage.weight.cpu(), expected)
    assert torch.cuda.max_memory_allocated() - before <= 3.5 * size
    stages[2].weight.mul_(2)
    offload.release()
    assert torch.cuda.memory_allocated() == before
    for stage, expected in zip(stages, values, strict=True):
        assert stage.weight.device.type == "cpu"
        assert torch.equal(stage.weight, expected * 2 if stage is stages[2] else expected)


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
ROWS = audioldm2.pipeline.CHUNK // 4  # latents that the pipeline decodes at once


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
    time = unet.time_embedding(torch.zeros(1, device="meta"))
    peaks = {
        "unet": peak(lambda: unet.denoise(without_values(CANDIDATES, 8, FRAMES // 4, 16), time, contexts))
        / GIB,
        "vae": peak(lambda: without_data["vae"].decode_in_chunks(without_values(1, 8, FRAMES // 4, 16), ROWS))
        / GIB,
        "vocoder": peak(lambda: without_data["vocoder"].in_chunks(without_values(1, FRAMES, 64))) / GIB,
    }
    assert 1.5 < weights < 3
    assert weights + max(peaks.values()) < 8, peaks  # half of the bar: allocators and kernels take some, too
    assert peaks["unet"] > 1, "nothing was counted"


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
