"""Where a pipeline's stages run: moving, converting, offloading and copying pipelines."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline
from tests.helpers import HAMMER, RAIN, assert_same_sound, load_pipeline, noise, sound
from tests.reference import Both


@pytest.fixture
def offloaded(pipe: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline whose stages work on the CPU, but in copies of their weights, as on any offload device."""
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def on_the_device(pipe: AudioLDM2Pipeline) -> list[str]:
    """Names of the stages that offload has left on the device."""
    offload = pipe._offload
    assert offload is not None
    present = [offload._working, offload._coming and offload._coming[0]]
    return [name for name, stage in pipe.stages.items() if stage in present]


def dtypes(pipe: AudioLDM2Pipeline) -> dict[str, torch.dtype]:
    return {name: stage.dtype for name, stage in pipe.stages.items()}


# --- to


def test_to_converts_and_moves_all_stages(pipe: AudioLDM2Pipeline) -> None:
    assert pipe.to(torch.bfloat16) is pipe
    assert {*dtypes(pipe).values()} == {torch.bfloat16}
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.to(dtype=torch.float16).dtype == torch.float16
    assert pipe.to(torch.device("cpu")).device == torch.device("cpu")
    assert pipe.to() is pipe
    assert {*dtypes(pipe).values()} == {torch.float16}


@pytest.mark.parametrize(("device", "message"), [("banana", "unknown device"), ("cuda:99", "not available")])
def test_a_device_that_is_not_there_is_refused_and_nothing_changes(
    pipe: AudioLDM2Pipeline, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.to(device, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        pipe.enable_model_cpu_offload(device=device)
    assert {*dtypes(pipe).values()} == {torch.float32}
    pipe.to("cpu")  # offload was not enabled


def test_a_dtype_that_is_not_supported_is_refused(pipe: AudioLDM2Pipeline) -> None:
    with pytest.raises(ValueError, match=r"torch\.int8 is not supported"):
        pipe.to("cpu", torch.int8)


def test_to_waits_for_the_generation_of_another_thread(base: Both, pipe: AudioLDM2Pipeline) -> None:
    expected = sound(base.ours, num_inference_steps=3)
    asked = threading.Event()

    def convert() -> None:
        asked.set()
        pipe.to(torch.bfloat16)

    with ThreadPoolExecutor(1) as pool:

        def callback(step: int, t: Tensor, latents: Tensor) -> None:
            if step == 0:
                pool.submit(convert)
            asked.wait()
            assert pipe.dtype == torch.float32

        assert_same_sound(sound(pipe, num_inference_steps=3, callback=callback), expected, 1e-5)
    assert pipe.dtype == torch.bfloat16


# --- offload


def test_offload_gives_the_same_sound(base: Both, offloaded: AudioLDM2Pipeline) -> None:
    # Up to rounding: copies have another alignment in memory, by which the CPU chooses its kernels.
    expected = sound(base.ours, num_waveforms_per_prompt=2)
    assert_same_sound(sound(offloaded, num_waveforms_per_prompt=2), expected, 1e-5)
    assert on_the_device(offloaded) == []
    with pytest.raises(ValueError, match="do not call to"):
        offloaded.to("cpu")


STEPS: dict[str, Callable[[AudioLDM2Pipeline], Any]] = {
    "encode_prompt": lambda pipe: pipe.encode_prompt(HAMMER)[2],
    "decode": lambda pipe: pipe.decode(noise(1, 4, 8, 4)),
    "vocode": lambda pipe: pipe.vocode(noise(1, 1, 32, 16)),
    "rank": lambda pipe: pipe.rank(noise(2, 1000), noise(1, 12))[0],
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_each_step_may_be_called_alone_and_leaves_nothing_on_the_device(
    base: Both, offloaded: AudioLDM2Pipeline, step: Callable[[AudioLDM2Pipeline], Tensor]
) -> None:
    torch.testing.assert_close(step(offloaded), step(base.ours), rtol=0, atol=1e-5)
    assert on_the_device(offloaded) == []


def test_offload_may_be_enabled_again(base: Both, offloaded: AudioLDM2Pipeline) -> None:
    offloaded.enable_model_cpu_offload(device="cpu")
    sound(offloaded)
    offloaded.enable_model_cpu_offload(device="cpu")
    assert_same_sound(sound(offloaded), sound(base.ours), 1e-5)


def test_an_offloaded_pipeline_may_be_converted(
    random_checkpoint: Path, offloaded: AudioLDM2Pipeline
) -> None:
    sound(offloaded)
    offloaded.to(torch.bfloat16)
    latents = noise(1, 4, 8, 4)
    expected = sound(load_pipeline(random_checkpoint, torch_dtype=torch.bfloat16), latents=latents)
    assert_same_sound(sound(offloaded, latents=latents), expected, 1e-2)
    assert {*dtypes(offloaded).values()} == {torch.bfloat16}


def test_after_an_error_nothing_is_left_on_the_device(base: Both, offloaded: AudioLDM2Pipeline) -> None:
    def broken(step: int, t: Tensor, latents: Tensor) -> None:
        assert on_the_device(offloaded) == ["unet"]
        raise KeyError("the callback's own")

    with pytest.raises(KeyError, match="the callback's own"):
        sound(offloaded, callback=broken)
    assert on_the_device(offloaded) == []
    assert_same_sound(sound(offloaded), sound(base.ours), 1e-5)


def test_a_replaced_stage_is_used_and_the_old_one_is_freed(
    random_large_checkpoint: Path, random_checkpoint: Path, offloaded: AudioLDM2Pipeline
) -> None:
    sound(offloaded)
    large, expected = load_pipeline(random_large_checkpoint), load_pipeline(random_checkpoint)
    old = weakref.ref(offloaded.unet)
    offloaded.unet = expected.unet = large.unet
    assert old() is None
    assert_same_sound(sound(offloaded), sound(expected), 1e-5)
    assert on_the_device(offloaded) == []


# --- callbacks that do more than watch


def halve_the_unet(pipe: AudioLDM2Pipeline) -> None:
    pipe.unet.conv_out.weight.data.mul_(0.5)


def halve_the_vae(pipe: AudioLDM2Pipeline) -> None:
    pipe.vae.decoder.conv_out.weight.data.mul_(0.5)


def generate(pipe: AudioLDM2Pipeline) -> None:
    sound(pipe, RAIN)


def halve_the_unet_and_generate(pipe: AudioLDM2Pipeline) -> None:
    halve_the_unet(pipe)
    generate(pipe)


def generate_and_halve_the_unet(pipe: AudioLDM2Pipeline) -> None:
    generate(pipe)
    halve_the_unet(pipe)


def convert(pipe: AudioLDM2Pipeline) -> None:
    pipe.to(torch.float64)


ACTIONS = [
    halve_the_unet,
    halve_the_vae,
    generate,
    halve_the_unet_and_generate,
    generate_and_halve_the_unet,
    convert,
]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_a_callback_has_the_same_effect_with_offload(
    random_checkpoint: Path, offloaded: AudioLDM2Pipeline, action: Callable[[AudioLDM2Pipeline], None]
) -> None:
    """On the generation that calls it, and on the next one."""
    plain = load_pipeline(random_checkpoint)

    def once(pipe: AudioLDM2Pipeline) -> Callable[[int, Tensor, Tensor], None]:
        return lambda step, t, latents: action(pipe) if step == 0 else None

    for callback in (True, False):
        results = [
            sound(pipe, num_inference_steps=3, callback=once(pipe) if callback else None)
            for pipe in (plain, offloaded)
        ]
        assert_same_sound(results[1], results[0], 1e-5)
    assert on_the_device(offloaded) == []
    assert dtypes(offloaded) == dtypes(plain)


def test_a_callback_must_not_replace_the_running_stage(pipe: AudioLDM2Pipeline) -> None:
    def replace(step: int, t: Tensor, latents: Tensor) -> None:
        pipe.unet = copy.deepcopy(pipe.unet)

    with pytest.raises(ValueError, match=r"replaced pipe\.unet, which is running"):
        sound(pipe, callback=replace)
    assert np.isfinite(sound(pipe)).all()


def test_offload_may_be_enabled_in_a_callback(base: Both, pipe: AudioLDM2Pipeline) -> None:
    def enable(step: int, t: Tensor, latents: Tensor) -> None:
        if step == 1:
            pipe.enable_model_cpu_offload(device="cpu")

    expected = sound(base.ours, num_inference_steps=3)
    assert_same_sound(sound(pipe, num_inference_steps=3, callback=enable), expected, 1e-5)
    assert on_the_device(pipe) == []


# --- copies


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_copy_of_an_offloaded_pipeline_is_offloaded_and_independent(
    base: Both, offloaded: AudioLDM2Pipeline, duplicate: Callable, used: bool
) -> None:
    expected = sound(base.ours)
    if used:
        sound(offloaded)
    other = duplicate(offloaded)
    halve_the_unet(offloaded)
    assert_same_sound(sound(other), expected, 1e-5)
    assert on_the_device(other) == []
    with pytest.raises(ValueError, match="do not call to"):
        other.to("cpu")
    assert np.abs(sound(offloaded) - expected).max() > 0.01


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_made_during_a_generation_is_not_in_the_middle_of_one(
    base: Both, offloaded: AudioLDM2Pipeline, duplicate: Callable
) -> None:
    copies: list[AudioLDM2Pipeline] = []

    def callback(step: int, t: Tensor, latents: Tensor) -> None:
        if step == 0:
            copies.append(duplicate(offloaded))

    expected = sound(base.ours)
    assert_same_sound(sound(offloaded, callback=callback), expected, 1e-5)
    (other,) = copies
    for pipe in (other, offloaded):
        assert_same_sound(sound(pipe), expected, 1e-5)
        assert on_the_device(pipe) == []


def test_a_copy_keeps_the_options_of_the_progress_bars(
    offloaded: AudioLDM2Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    sound(copy.deepcopy(offloaded))
    assert capsys.readouterr().err == ""


def test_a_shallow_copy_shares_the_stages(base: Both, pipe: AudioLDM2Pipeline) -> None:
    other = copy.copy(pipe)
    assert all(other.stages[name] is stage for name, stage in pipe.stages.items())
    assert_same_sound(sound(other), sound(base.ours), 1e-5)
