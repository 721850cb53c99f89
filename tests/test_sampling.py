"""Initial noise, guidance, the denoising loop, and how it calls the UNet and the scheduler."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import audioldm2
import audioldm2.pipeline
from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.conditioning import Conditioning
from audioldm2.guidance import Guidance
from audioldm2.models.unet import UNet
from audioldm2.sampling import denoise, exclusive
from tests.helpers import HAMMER, RAIN, assert_same_sound, noise, seeded, sound
from tests.reference import Both, assert_close
from tests.schedulers.helpers import NoReading

# --- the initial noise


def test_latents_are_drawn_by_the_generators(base: Both) -> None:
    pipe = base.ours
    one = pipe.prepare_latents(2, 4, 16, torch.float32, "cpu", seeded(3))
    assert torch.equal(one, noise(2, 4, 4, 4, seed=3) * pipe.scheduler.init_noise_sigma)
    each = pipe.prepare_latents(2, 4, 16, torch.float32, None, [seeded(1), seeded(2)])
    assert torch.equal(each, torch.cat([noise(1, 4, 4, 4, seed=seed) for seed in (1, 2)]))
    half = pipe.prepare_latents(2, 4, 16, torch.bfloat16, "cpu", seeded())
    assert half.dtype == torch.bfloat16


def test_given_latents_are_scaled_to_the_schedulers_first_noise_level(pipe: AudioLDM2Pipeline) -> None:
    pipe.scheduler = SimpleNamespace(init_noise_sigma=3.0)
    given = noise(1, 4, 7, 4)
    assert torch.equal(pipe.prepare_latents(1, 4, 28, torch.float32, "cpu", latents=given), 3 * given)


# --- guidance


class Stub(torch.nn.Module):
    """A UNet that predicts 1 for the unconditional side and 2 for the conditional one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor, **states: Tensor) -> Tensor:
        values = torch.tensor([1.0, 2.0]) if len(sample) == 2 else torch.tensor([2.0])
        return values.view(-1, 1, 1, 1).expand_as(sample)


@pytest.mark.parametrize(("scale", "expected"), [(1.5, 2.5), (3.5, 4.5), (9.0, 10.0)])
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float, expected: float) -> None:
    predictions: list[Tensor] = []

    class Scheduler:
        timesteps = torch.tensor([7])

        def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample

        def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor) -> SimpleNamespace:
            predictions.append(prediction)
            return SimpleNamespace(prev_sample=sample)

    conditioning = Conditioning(noise(2, 3, 20), torch.ones(2, 3), noise(2, 8, 16), True, None)
    denoise(Stub(), Scheduler(), noise(1, 4, 8, 4), conditioning, Guidance(scale))
    assert torch.equal(predictions[0], torch.full((1, 4, 8, 4), expected))


# --- callbacks


def test_callbacks_are_called_as_in_diffusers(base: Both) -> None:
    calls: dict[str, list] = {"ours": [], "theirs": []}
    for pipe, seen in ((base.ours, calls["ours"]), (base.theirs, calls["theirs"])):
        pipe(
            HAMMER,
            num_inference_steps=5,
            audio_length_in_s=0.32,
            generator=seeded(),
            callback=lambda step, t, latents, seen=seen: seen.append((step, int(t), latents.clone())),
            callback_steps=2,
        )
    assert [call[:2] for call in calls["ours"]] == [call[:2] for call in calls["theirs"]]
    for (*_, actual), (*_, expected) in zip(calls["ours"], calls["theirs"], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
def test_callbacks_come_once_a_step_with_samplers_that_evaluate_several_times(base: Both, name: str) -> None:
    kind = getattr(diffusers, name)
    own = base.ours.scheduler, base.theirs.scheduler
    calls: dict[str, list] = {"ours": [], "theirs": []}
    bar = io.StringIO()
    try:
        for pipe, seen in ((base.ours, calls["ours"]), (base.theirs, calls["theirs"])):
            pipe.scheduler = kind.from_config(dict(pipe.scheduler.config))
            pipe(
                HAMMER,
                num_inference_steps=4,
                audio_length_in_s=0.32,
                generator=seeded(),
                callback=lambda step, t, latents, seen=seen: seen.append((step, int(t), latents.clone())),
            )
        base.ours.set_progress_bar_config(file=bar, disable=False)
        sound(base.ours, num_inference_steps=4)
    finally:
        base.ours.set_progress_bar_config(disable=True)
        base.ours.scheduler, base.theirs.scheduler = own
    assert [call[:2] for call in calls["ours"]] == [call[:2] for call in calls["theirs"]]
    assert [call[0] for call in calls["ours"]] == [0, 1, 2, 3] or name == "PNDMScheduler"
    for (*_, actual), (*_, expected) in zip(calls["ours"], calls["theirs"], strict=True):
        assert_close(actual, expected)
    assert "4/4" in bar.getvalue()


def test_callback_on_step_end_may_replace_tensors(pipe: AudioLDM2Pipeline) -> None:
    seen: list[tuple[int, list[str]]] = []
    plain = sound(pipe, num_inference_steps=3)

    def look(given: AudioLDM2Pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        assert given is pipe
        seen.append((step, [*tensors]))

    assert np.array_equal(sound(pipe, num_inference_steps=3, callback_on_step_end=look), plain)
    assert seen == [(0, ["latents"]), (1, ["latents"]), (2, ["latents"])]

    def zeros(
        given: AudioLDM2Pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    latents = sound(pipe, num_inference_steps=3, callback_on_step_end=zeros, output_type="latent")
    assert torch.as_tensor(latents).abs().max() == 0


def test_callback_on_step_end_may_switch_guidance_off(pipe: AudioLDM2Pipeline) -> None:
    """As in diffusers: the rest of the run is that of a UNet that sees the conditional half alone."""
    rows: list[int] = []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def off(given: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            given._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return {}

    names = ["prompt_embeds", "generated_prompt_embeds", "attention_mask"]
    arguments = {"num_inference_steps": 4, "callback_on_step_end_tensor_inputs": names}
    switched = sound(pipe, callback_on_step_end=off, **arguments)
    assert rows == [2, 2, 1, 1]
    assert pipe.guidance_scale == 0.0
    guided = sound(pipe, num_inference_steps=4)
    assert np.abs(switched - guided).max() > 1e-3
    with pytest.raises(ValueError, match="callback_on_step_end returned latents of shape"):
        sound(pipe, callback_on_step_end=lambda *step: {"latents": noise(1, 4, 9, 4)})


def test_a_callback_may_interrupt_the_run(pipe: AudioLDM2Pipeline) -> None:
    steps: list[int] = []

    def stop(given: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        steps.append(step)
        given._interrupt = step == 1

    assert sound(pipe, num_inference_steps=5, callback_on_step_end=stop).std() > 0.01
    assert steps == [0, 1]
    assert sound(pipe, num_inference_steps=3, callback_on_step_end=stop).std() > 0.01
    assert steps == [0, 1, 0, 1]


def test_a_generation_inside_a_callback_leaves_the_outer_ones_guidance(pipe: AudioLDM2Pipeline) -> None:
    expected = sound(pipe, num_inference_steps=3, guidance_scale=5.0)

    def inner(given: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        if step == 1:
            sound(pipe, RAIN, guidance_scale=1.0)

    actual = sound(pipe, num_inference_steps=3, guidance_scale=5.0, callback_on_step_end=inner)
    assert np.array_equal(actual, expected)


def test_latents_that_a_callback_changes_are_used_as_in_diffusers(base: Both) -> None:
    def damp(step: int, t: Tensor, latents: Tensor) -> None:
        latents.mul_(0.5)

    changed = base.check(prompt=HAMMER, callback=damp)
    assert np.abs(changed - base.check(prompt=HAMMER)).max() > 0.01


@pytest.mark.parametrize(
    ("scheduler", "expected"), [("DDIMScheduler", 200), ("DPMSolverMultistepScheduler", 20)]
)
def test_by_default_there_are_as_many_steps_as_the_scheduler_needs(
    base: Both, scheduler: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def count(unet: UNet, scheduler: Any, latents: Tensor, *arguments: Any, **options: Any) -> Tensor:
        steps.append(len(scheduler.timesteps))
        return latents

    monkeypatch.setattr(audioldm2.pipeline, "denoise", count)
    base.use(scheduler)
    base.ours(HAMMER, output_type="latent")
    assert steps == [expected]


# --- the scheduler, which has state


def test_a_scheduler_is_used_itself_and_a_second_run_gets_a_copy() -> None:
    scheduler, other = DPMSolverMultistepScheduler(), DDIMScheduler()
    with exclusive(scheduler) as first, exclusive(other) as unrelated:
        assert first is scheduler
        assert unrelated is other
        with exclusive(scheduler) as second, exclusive(scheduler) as third:
            assert type(second) is type(scheduler)
            assert second.config == scheduler.config
            assert len({id(one) for one in (first, second, third)}) == 3
        with exclusive(scheduler) as again:
            assert again is not scheduler, "the first run has not ended"
    with exclusive(scheduler) as after:
        assert after is scheduler


def test_a_scheduler_is_free_again_after_an_error() -> None:
    scheduler = DDIMScheduler()
    with pytest.raises(KeyError), exclusive(scheduler):
        raise KeyError
    with exclusive(scheduler) as after:
        assert after is scheduler


def test_a_scheduler_that_cannot_be_copied_serves_one_run_at_a_time() -> None:
    scheduler = DDIMScheduler()
    scheduler.lock = threading.Lock()
    for _ in range(2):
        with exclusive(scheduler) as first:
            assert first is scheduler
            refused = pytest.raises(ValueError, match="another generation is using this DDIMScheduler")
            with refused, exclusive(scheduler):
                pass


def test_a_run_in_another_thread_gets_a_copy() -> None:
    scheduler, started, finish = DDIMScheduler(), threading.Event(), threading.Event()

    def run() -> bool:
        with exclusive(scheduler) as mine:
            started.set()
            finish.wait()
            return mine is scheduler

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run)
        try:
            started.wait()
            with exclusive(scheduler) as second:
                assert second is not scheduler
        finally:
            finish.set()
        assert other.result()
    with exclusive(scheduler) as after:
        assert after is scheduler


def test_a_scheduler_is_copied_even_if_its_run_sets_attributes_meanwhile() -> None:
    class Slow:
        """Is copied while the run that uses the scheduler goes on."""

        def __deepcopy__(self, memo: dict) -> Slow:
            scheduler.set_meanwhile = True
            return Slow()

    scheduler = SimpleNamespace(first=Slow(), second=[1, 2])
    with exclusive(scheduler), exclusive(scheduler) as second:
        assert second.second == [1, 2]
        assert second.second is not scheduler.second


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_pipelines_that_share_a_scheduler_may_run_at_the_same_time(base: Both, name: str) -> None:
    """The second one runs as a whole between two steps of the first."""
    base.use(name)
    pipe = base.ours
    other = AudioLDM2Pipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    first, second = {"num_inference_steps": 5}, {"num_inference_steps": 4, "seed": 1}
    if name == "DDIMScheduler":
        first["eta"] = 0.5
    expected = sound(pipe, **first), sound(pipe, RAIN, **second)
    results: list[np.ndarray] = []
    with ThreadPoolExecutor(1) as pool:

        def callback(step: int, t: Tensor, latents: Tensor) -> None:
            if step == 2:
                results.append(pool.submit(sound, other, RAIN, **second).result())

        results.insert(0, sound(pipe, **first, callback=callback))
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


# --- how the UNet is called

calls: list[torch.Size] = []  # shapes of the latents


class ItsOwnForward(UNet):
    """A subclass written before `contexts` was an argument."""

    def forward(self, sample: Tensor, timestep: object, **states: object) -> Tensor:  # type: ignore[override]
        calls.append(sample.shape)
        return super().forward(sample, timestep, **states)  # type: ignore[arg-type]


class Foreign(torch.nn.Module):
    """Is called as diffusers calls its UNet, and like that one returns a tuple."""

    def __init__(self, inner: UNet):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_1: Tensor,
        encoder_attention_mask_1: Tensor,
    ) -> tuple[Tensor]:
        calls.append(sample.shape)
        states = (encoder_hidden_states, encoder_hidden_states_1, encoder_attention_mask_1)
        return (self.inner(sample, timestep, *states),)


def hooked(unet: UNet) -> UNet:
    unet.register_forward_hook(lambda module, arguments, output: calls.append(arguments[0].shape))
    return unet


def hooked_before(unet: UNet) -> UNet:
    unet.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].shape))
    return unet


def subclass(unet: UNet) -> UNet:
    own = ItsOwnForward(unet.config)
    own.load_state_dict(unet.state_dict())
    return own.eval()


def data_parallel(unet: UNet) -> torch.nn.Module:
    hooked(unet)
    return torch.nn.DataParallel(unet)


@pytest.mark.parametrize(
    "make", [hooked, hooked_before, subclass, Foreign, data_parallel], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("guided", [True, False])
def test_the_unet_is_called_at_every_step_whatever_wraps_it(
    pipe: AudioLDM2Pipeline, make: Callable[[UNet], Any], guided: bool
) -> None:
    arguments = {"prompt": [HAMMER, RAIN], "guidance_scale": 3.5 if guided else 1.0, "num_inference_steps": 3}
    expected = sound(pipe, **arguments)
    pipe.unet = make(pipe.unet)
    calls.clear()
    assert_same_sound(sound(pipe, **arguments), expected, 1e-5)
    # Our UNet takes the latents once for both sides of guidance, any other one takes them twice.
    rows = 4 if guided and make in (Foreign, data_parallel) else 2
    assert calls == [(rows, 4, 8, 4)] * 3


def test_hooks_on_blocks_of_the_unet_fire_at_every_step(pipe: AudioLDM2Pipeline) -> None:
    fired: dict[str, int] = {}
    unet = pipe.unet
    down = unet.down[1]
    block = down.transformers[1].blocks[0]
    watched = {
        "unet": unet,
        "level": down,
        "resnet": down.resnets[0],
        "transformer": down.transformers[0],
        "self-attention": block.self_attention,
        "cross-attention": block.cross_attention,
        "up": unet.up[0],
        "middle": unet.middle,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: fired.update({name: fired.get(name, 0) + 1}))
    sound(pipe, num_inference_steps=3)
    assert fired == dict.fromkeys(watched, 3)


def test_what_a_hook_returns_is_what_the_scheduler_gets(pipe: AudioLDM2Pipeline) -> None:
    """As a script does that edits the predicted noise."""
    expected = sound(pipe, output_type="latent")
    handle = pipe.unet.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    without = sound(pipe, output_type="latent")
    # DDIM with a prediction of zero only rescales the noise (Song et al. 2021, eq. 12).
    ratio = without / pipe.prepare_latents(1, 4, 32, torch.float32, "cpu", seeded())
    assert_close(ratio, ratio.mean().expand_as(ratio), 1e-5)
    handle.remove()
    assert torch.equal(sound(pipe, output_type="latent"), expected)


# --- nothing waits for the device


@pytest.mark.parametrize(
    "scheduler",
    [("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})],
    ids=["DDIM", "DPM-Solver++"],
)
@pytest.mark.parametrize("guidance_scale", [3.5, 1.0])
@pytest.mark.parametrize("with_hook", [False, True])
def test_denoising_reads_no_tensor(
    pipe: AudioLDM2Pipeline,
    scheduler: tuple[str, dict],
    guidance_scale: float,
    with_hook: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU would have to finish all its work before it could answer."""
    name, options = scheduler
    pipe.scheduler = getattr(audioldm2, name).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(file=io.StringIO())
    if with_hook:
        hooked(pipe.unet)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for the device")

    def watched(*arguments: Any, **options: Any) -> Tensor:
        with NoReading(), pytest.MonkeyPatch.context() as patch:
            # For a tensor that is in main memory already, these call no operator that `NoReading` could see.
            for method in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__array__"):
                patch.setattr(torch.Tensor, method, refuse)
            return denoise(*arguments, **options)

    monkeypatch.setattr(audioldm2.pipeline, "denoise", watched)
    arguments = {"num_inference_steps": 5, "guidance_scale": guidance_scale}
    if name == "DDIMScheduler":
        arguments["eta"] = 0.5
    assert sound(pipe, **arguments).std() > 0.02
    with pytest.raises(AssertionError, match="waits for the device"):
        sound(pipe, **arguments, callback=lambda step, t, latents: latents.sum().item())


@pytest.mark.gpu
def test_denoising_does_not_wait_for_a_gpu(pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.to("cuda")
    sound(pipe)

    def watched(*arguments: Any, **options: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return denoise(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(audioldm2.pipeline, "denoise", watched)
    assert sound(pipe).std() > 0.02
