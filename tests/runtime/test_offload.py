"""Offload: stages take turns on the device, and come home as they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.runtime.offload import Offload
from tests.reference import randomize

HAMMER = "A hammer hitting a wooden surface."


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
    return Offload("cpu", lambda: stages)


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
    home = [offload._homes[tensor].copy.data_ptr() for tensor in (*a.parameters(), *a.buffers())]
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


def test_what_changed_without_a_version_comes_home_if_it_is_said(
    offload: Offload, stages: list[Stage]
) -> None:
    """A write through `.data` is not counted."""
    offload.take(stages[0])
    stages[0].layer.weight.data.mul_(2)
    expected = stages[0].values()
    offload.may_have_changed()
    offload.take(stages[1])
    assert all(map(torch.equal, stages[0].values(), expected))
    assert not offload._changed, "it says nothing of the next stage"


def test_a_stage_that_is_gone_leaves_no_copy(offload: Offload, stages: list[Stage]) -> None:
    offload.take(stages[0])
    offload.take(stages[1])
    copies = [weakref.ref(home.copy) for home in offload._homes.values()]
    assert len(copies) == 6
    offload.release()
    stages.clear()
    gc.collect()
    assert not [copy for copy in copies if copy() is not None]


def test_what_did_not_change_is_not_copied_back(offload: Offload, stages: list[Stage]) -> None:
    a, b, _ = stages
    change_in_place(a)
    offload.take(a)
    offload._homes[a.layer.weight].copy.fill_(7)
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


@pytest.mark.gpu
def test_the_next_stage_is_on_its_way_from_pinned_memory() -> None:
    stages = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(3)]
    size = 2048 * 2048 * 4
    values = [stage.weight.clone() for stage in stages]
    before = torch.cuda.memory_allocated()
    offload = Offload("cuda", lambda: stages)
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
