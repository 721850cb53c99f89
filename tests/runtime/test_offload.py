"""Offload: stages take turns on the device and return to main memory with their changes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.runtime.offload import Offload
from tests.helpers import assert_same_sound, load_pipeline, sound
from tests.reference import randomize

# --- stages that take turns on the device


class Stage(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(3))
        randomize(self, seed)

    def addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.state_dict().values()]

    def values(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.state_dict().values()]


@pytest.fixture
def stages() -> list[Stage]:
    return [Stage(seed).requires_grad_(False) for seed in range(3)]


@pytest.fixture
def offload(stages: list[Stage]) -> Offload:
    """The device is the CPU, too: a stage on the device has copies of its weights in main memory."""
    return Offload("cpu")


def test_a_stage_stays_on_the_device_until_another_is_taken(offload: Offload, stages: list[Stage]) -> None:
    a, b, c = stages
    values = [stage.values() for stage in stages]
    waiting = [stage.addresses() for stage in stages]
    offload.take(a)
    on_device = a.addresses()
    assert not set(on_device) & set(waiting[0])
    assert [b.addresses(), c.addresses()] == waiting[1:]
    offload.take(a)
    assert a.addresses() == on_device, "it moves once"
    home = [offload._homes[tensor].copy.data_ptr() for tensor in (*a.parameters(), *a.buffers())]
    offload.take(b)
    assert sorted(a.addresses()) == sorted(home)
    offload.take(c)
    offload.take(a)
    assert not set(a.addresses()) & set(home)
    offload.release()
    assert sorted(a.addresses()) == sorted(home)
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


def resize(stage: Stage) -> None:
    stage.layer.weight.data = stage.layer.weight.data[:2]


def add_a_layer(stage: Stage) -> None:
    stage.layer_2 = nn.Linear(2, 2).requires_grad_(False)


CHANGES = [change_in_place, load_into, replace_parameter, add_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_on_the_device_is_copied_back(
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


@pytest.mark.parametrize("change", [replace_data, turn_into_half, resize], ids=lambda change: change.__name__)
def test_a_change_that_pytorch_does_not_count_is_copied_back_if_it_is_announced(
    change: Callable[[Stage], None], offload: Offload, stages: list[Stage]
) -> None:
    a, b, _ = stages
    offload.take(a)
    change(a)
    changed, dtype = a.values(), a.layer.weight.dtype
    offload.may_have_changed()
    for stage in (b, a, b):
        offload.take(stage)
        assert all(map(torch.equal, a.values(), changed))
        assert a.layer.weight.dtype == dtype


def test_an_announcement_does_not_apply_to_the_next_stage(offload: Offload, stages: list[Stage]) -> None:
    a, b, c = stages
    offload.take(a)
    offload.may_have_changed()
    offload.take(b)
    offload._homes[b.layer.weight].copy.fill_(7)
    offload.take(c)
    assert (b.layer.weight == 7).all(), "it was copied back"


def test_weights_made_in_inference_mode_can_move(stages: list[Stage], offload: Offload) -> None:
    """They have no version counter, so they are copied back each time."""
    with torch.inference_mode():
        a = Stage(5).requires_grad_(False)
        assert a.layer.weight.is_inference()
        offload.take(a)
        a.layer.weight.mul_(2)
        changed = a.values()
    for stage in (stages[0], a, stages[0]):
        offload.take(stage)
        assert all(map(torch.equal, a.values(), changed))


def test_weights_that_moved_in_inference_mode_can_be_trained(offload: Offload, stages: list[Stage]) -> None:
    a, b, _ = stages
    with torch.inference_mode():
        offload.take(a)
    a.layer.weight.mul_(2)
    expected = a.values()
    offload.take(b)
    assert all(map(torch.equal, a.values(), expected))
    a.requires_grad_()
    a.layer(torch.ones(3)).sum().backward()
    assert a.layer.weight.grad is not None


def test_a_stage_that_is_gone_leaves_no_copy(offload: Offload, stages: list[Stage]) -> None:
    offload.take(stages[0])
    offload.take(stages[1])
    copies = [weakref.ref(home.copy) for home in offload._homes.values()]
    assert len(copies) == 6
    offload.release()
    stages.clear()
    gc.collect()
    assert not [copy for copy in copies if copy() is not None]


def test_out_of_memory_leaves_no_part_of_a_stage_on_the_device(
    offload: Offload, stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = stages
    offload.take(a)
    home, values = b.addresses(), b.values()
    allocate = torch.empty_like

    def full(tensor: Tensor, **options: Any) -> Tensor:
        if tensor.dim() == 1:
            raise torch.OutOfMemoryError
        return allocate(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", full)
        with pytest.raises(torch.OutOfMemoryError):
            offload.take(b)
    assert b.addresses() == home
    offload.release()
    offload.take(b)
    assert b.addresses() != home
    assert all(map(torch.equal, b.values(), values))


def test_a_weight_that_did_not_change_is_not_copied_back(offload: Offload, stages: list[Stage]) -> None:
    a, b, _ = stages
    change_in_place(a)
    offload.take(a)
    offload._homes[a.layer.weight].copy.fill_(7)
    offload.take(b)
    assert (a.layer.weight == 7).all()


@pytest.mark.parametrize(
    "change", [*CHANGES, replace_data, turn_into_half, resize], ids=lambda change: change.__name__
)
def test_a_change_in_main_memory_is_what_is_taken(
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


# --- prefetching, which needs a GPU: here with what stands for its streams


class Event:
    """In place of torch.cuda.Event."""

    def record(self, stream: Stream) -> None:
        stream.log.append("recorded")


class Stream:
    """In place of torch.cuda.Stream: a log of what was asked of all streams."""

    def __init__(self, log: list[str]):
        self.log = log

    def wait_stream(self, other: Stream) -> None:
        self.log.append("wait for memory")

    def wait_event(self, event: Event) -> None:
        self.log.append("wait for the copy")


@pytest.fixture
def prefetching(offload: Offload, monkeypatch: pytest.MonkeyPatch) -> Offload:
    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    offload._stream = Stream(log)  # type: ignore[assignment]
    return offload


def test_the_upcoming_stage_is_copied_while_another_works(prefetching: Offload, stages: list[Stage]) -> None:
    a, b, _ = stages
    values, waiting = b.values(), b.addresses()
    prefetching.take(a, b)
    on_device = b.addresses()
    assert not set(on_device) & set(waiting)
    prefetching.take(b)
    assert b.addresses() == on_device, "it is not copied again"
    assert all(map(torch.equal, b.values(), values))
    assert prefetching._stream.log == ["wait for memory", "recorded", "wait for the copy"]  # type: ignore


def test_an_upcoming_stage_that_is_not_taken_next_returns(prefetching: Offload, stages: list[Stage]) -> None:
    a, b, c = stages
    prefetching.take(a, b)
    on_device = b.addresses()
    prefetching.take(c)
    assert not set(b.addresses()) & set(on_device)
    assert prefetching._coming is None
    prefetching.take(a, b)
    prefetching.release()
    home = {home.copy.data_ptr() for home in prefetching._homes.values()}
    assert {address for stage in stages for address in stage.addresses()} <= home


def test_an_announcement_applies_to_the_upcoming_stage_too(prefetching: Offload, stages: list[Stage]) -> None:
    """A callback of the UNet, for example, may change the VAE."""
    a, b, c = stages
    prefetching.take(a, b)
    b.layer.weight.data.mul_(2)
    prefetching.may_have_changed()
    expected = b.values()
    for stage in (b, c):
        prefetching.take(stage)
        assert all(map(torch.equal, b.values(), expected))


@pytest.mark.gpu
def test_the_upcoming_stage_is_copied_from_pinned_memory() -> None:
    stages = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(3)]
    size = 2048 * 2048 * 4
    values = [stage.weight.clone() for stage in stages]
    before = torch.cuda.memory_allocated()
    offload = Offload("cuda")
    offload.take(stages[0], stages[1])
    assert [stage.weight.device.type for stage in stages] == ["cuda", "cuda", "cpu"]
    offload.take(stages[1], stages[2])
    assert [stage.weight.device.type for stage in stages] == ["cpu", "cuda", "cuda"]
    assert stages[0].weight.is_pinned()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    following = [*stages[1:], None]
    for stage, upcoming, expected in zip(stages * 2, following * 2, values * 2, strict=True):
        offload.take(stage, upcoming)
        assert torch.equal(stage.weight.cpu(), expected)
    assert torch.cuda.max_memory_allocated() - before <= 3.5 * size
    stages[2].weight.mul_(2)
    offload.release()
    assert torch.cuda.memory_allocated() == before
    for stage, expected in zip(stages, values, strict=True):
        assert stage.weight.device.type == "cpu"
        assert torch.equal(stage.weight, expected * 2 if stage is stages[2] else expected)


# --- in a pipeline


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


def test_changed_weights_of_an_offloaded_pipeline_are_used(
    random_checkpoint: Path, pipe: AudioLDM2Pipeline
) -> None:
    other = load_pipeline(random_checkpoint)
    other.enable_model_cpu_offload(device="cpu")
    before = sound(other)
    for p in (pipe, other):
        with torch.no_grad():
            p.unet.conv_out.weight.mul_(0.7)
            p.text_encoder_2.norm.weight.mul_(0.7)
    expected = sound(pipe)
    assert np.abs(before - expected).max() > 0.01
    assert_same_sound(sound(other), expected, 1e-5)
