"""Variation and inpainting: what is kept, what changes, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, DPMSolverMultistepScheduler, resample, write_wav
from audioldm2.audio.sound_file import read_sound, write_sound
from audioldm2.editing.inpainting import FADE_S, mixed
from audioldm2.editing.regions import Regions
from audioldm2.editing.variation import first_step
from tests.helpers import load_pipeline, noise, seeded

RATE = 16000
FADE = round(FADE_S * RATE)
SOUND = (0.1 * noise(RATE // 2, seed=5)).clamp(-1, 1)  # 0.5 s
SAMPLERS = (DDIMScheduler, DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler,
            diffusers.HeunDiscreteScheduler)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def edited(pipe: AudioLDM2Pipeline, prompt: Any = "Rain", audio: Any = SOUND, **arguments: Any) -> Any:
    defaults = {"sampling_rate": RATE, "num_inference_steps": 4, "generator": seeded(1)}
    return pipe(prompt, audio=audio, **{**defaults, **arguments}).audios


def test_the_strength_is_the_share_of_the_steps() -> None:
    assert [first_step(20, strength) for strength in (0, 0.01, 0.5, 0.76, 1)] == [20, 19, 10, 5, 0]


def test_strength_0_is_the_round_trip_and_strength_1_the_prompt_alone(tiny: AudioLDM2Pipeline) -> None:
    again = tiny.decode_latents(tiny.encode_audio(SOUND, RATE))[:, : len(SOUND)].numpy()
    assert np.array_equal(edited(tiny, strength=0), again)
    alone = tiny(
        "Rain", audio_length_in_s=len(SOUND) / RATE, num_inference_steps=4, generator=seeded(1)
    ).audios
    # The length of a sound is not rounded to mel frames, as it is without one.
    assert np.array_equal(edited(tiny, strength=1)[:, : alone.shape[1]], alone)
    distances = [np.abs(edited(tiny, strength=strength) - again).mean() for strength in (0.25, 0.5, 1)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_variation_begins_at_the_samplers_own_noise_level(tiny: AudioLDM2Pipeline, sampler: Any) -> None:
    """Half of the steps, from the latents that the sampler's add_noise makes."""
    seen: list[Any] = []
    pipe = AudioLDM2Pipeline(**{**tiny.components, "scheduler": sampler.from_config(tiny.scheduler.config)})
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    try:
        edited(pipe, strength=0.5, guidance_scale=1)
    finally:
        handle.remove()
    order = pipe.scheduler.order
    reference = sampler.from_config(tiny.scheduler.config)
    reference.set_timesteps(4)
    times = reference.timesteps[2 * order :]
    assert [float(t) for _, t, *_ in seen] == [float(t) for t in times]
    clean = tiny.encode_audio(SOUND, RATE)
    mix = reference.add_noise(clean, noise(*clean.shape, seed=1), times[:1])
    assert torch.allclose(seen[0][0], reference.scale_model_input(mix, times[0]), atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_kept_latents_and_samples_are_exact(tiny: AudioLDM2Pipeline, sampler: Any) -> None:
    pipe = AudioLDM2Pipeline(**{**tiny.components, "scheduler": sampler.from_config(tiny.scheduler.config)})
    pipe.set_progress_bar_config(disable=True)
    clean = tiny.encode_audio(SOUND, RATE)
    latents = edited(pipe, keep=(0, 0.25), output_type="latent")
    kept = int(0.25 * RATE) // (512 * 4)
    assert torch.equal(latents[:, :, :kept], clean[:, :, :kept])
    assert bool((latents[:, :, kept:] != clean[:, :, kept:]).all())

    (sound,) = edited(pipe, keep=(0, 0.25))
    end = RATE // 4
    assert sound.shape == SOUND.shape
    assert np.array_equal(sound[: end - FADE], SOUND[: end - FADE].numpy())
    assert np.abs(sound[end:] - SOUND[end:].numpy()).mean() > 0.01


def test_what_is_kept_reaches_the_unet_at_each_steps_noise_level(tiny: AudioLDM2Pipeline) -> None:
    """A run that only put the original back at the end would generate nothing that fits it."""
    seen: list[torch.Tensor] = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        edited(tiny, keep=(0, 0.25), guidance_scale=1)
    finally:
        handle.remove()
    clean = tiny.encode_audio(SOUND, RATE)
    scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler.config)
    scheduler.set_timesteps(4)
    eps = noise(*clean.shape, seed=1)
    for i, latents in enumerate(seen[1:], 1):
        level = scheduler.add_noise(clean, eps, scheduler.timesteps[i : i + 1])
        assert torch.allclose(latents[:, :, 0], level[:, :, 0], atol=1e-6)
        assert not torch.allclose(latents[:, :, -1], level[:, :, -1], atol=1e-3)


def test_only_the_frequencies_of_a_band_change(tiny: AudioLDM2Pipeline) -> None:
    (sound,) = edited(tiny, replace_band=(4000, 8000))
    hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
    window = np.hanning(len(sound))  # the sound's ends are edges
    change = np.abs(np.fft.rfft(window * (sound - SOUND.numpy()))) ** 2
    before = np.abs(np.fft.rfft(window * SOUND.numpy())) ** 2
    assert change[hertz < 3500].sum() < 1e-6 * before[hertz < 3500].sum()
    assert change[hertz > 4000].sum() > 0.1 * before[hertz > 4000].sum()
    (part,) = edited(tiny, replace_band=(4000, 8000), replace=(0.25, None))
    assert np.array_equal(part[: RATE // 4 - FADE], SOUND[: RATE // 4 - FADE].numpy())


def test_crossfades_lie_in_what_is_kept() -> None:
    original, generated = noise(2, RATE), noise(2, RATE, seed=1)
    mix = mixed(original, generated, Regions(((0.2, 0.4), (0.41, 0.5))), RATE)
    start, end = int(0.2 * RATE), int(0.5 * RATE)
    assert torch.equal(mix[:, start : int(0.4 * RATE)], generated[:, start : int(0.4 * RATE)])
    for kept in (slice(0, start - FADE), slice(end + FADE, None)):
        assert torch.equal(mix[:, kept], original[:, kept])
    weight = (mix - original)[:, start - FADE : start] / (generated - original)[:, start - FADE : start]
    assert bool((weight.diff(dim=1) > -1e-3).all())
    assert float(weight[:, 0].max()) < 0.01
    assert float(weight[:, -1].min()) > 0.99


def test_batches_candidates_and_one_prompt_for_several_sounds(tiny: AudioLDM2Pipeline) -> None:
    other = SOUND.flip(0)
    generators = [seeded(i) for i in range(2)]
    both = edited(tiny, ["Rain", "A bell"], [SOUND, other.numpy()], generator=generators)
    for i, (prompt, audio) in enumerate((("Rain", SOUND), ("A bell", other))):
        alone = edited(tiny, prompt, audio, generator=seeded(i), negative_prompt="")
        assert np.abs(both[i] - alone[0]).max() < 0.05
    one_prompt = edited(tiny, "Rain", [SOUND, other])
    assert one_prompt.shape == (2, len(SOUND))
    ranked = tiny(
        "Rain", audio=SOUND, sampling_rate=RATE, keep=(0, 0.25), num_inference_steps=2,
        num_waveforms_per_prompt=3, negative_prompt="Drum", generator=seeded(),
    )  # fmt: skip
    assert ranked.audios.shape == (3, len(SOUND))
    assert list(ranked.scores) == sorted(ranked.scores, reverse=True)
    kept = slice(0, RATE // 4 - FADE)
    assert all(np.array_equal(audio[kept], SOUND[kept].numpy()) for audio in ranked.audios)
    with pytest.raises(ValueError, match="audio has 3 sounds for 2 prompts"):
        edited(tiny, ["Rain", "A bell"], [SOUND, other, SOUND])


def test_any_rate_channels_and_length(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    stereo = torch.stack([SOUND, 0.5 * SOUND])
    at_48 = resample(stereo, RATE, 48000)
    expected = edited(tiny, audio=0.75 * resample(SOUND, RATE, 48000), sampling_rate=48000)
    assert np.abs(edited(tiny, audio=at_48, sampling_rate=48000) - expected).max() < 1e-3
    longer = edited(tiny, audio_length_in_s=0.8)
    assert longer.shape == (1, int(0.8 * RATE))
    assert edited(tiny, audio_length_in_s=0.3).shape == (1, int(0.3 * RATE))

    write_wav(tmp_path / "a.wav", SOUND, RATE, format="float32")
    write_sound(tmp_path / "a.flac", SOUND, RATE)
    files = [edited(tiny, audio=tmp_path / name, sampling_rate=None) for name in ("a.wav", "a.flac")]
    assert np.array_equal(files[0], edited(tiny))
    assert np.abs(files[1] - files[0]).max() < 0.05


def test_bad_input_is_one_line_that_names_it(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    (tmp_path / "text.mp3").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    nan = SOUND.clone()
    nan[3] = float("nan")
    for arguments, kind, message in (
        ({"audio": None, "sampling_rate": None, "strength": 0.5}, ValueError, "strength goes with audio"),
        ({"audio": None}, ValueError, "sampling_rate goes with audio"),
        ({"sampling_rate": None}, ValueError, "audio needs its sampling_rate"),
        ({"audio": tmp_path / "text.mp3"}, ValueError, "sampling_rate goes with waveforms"),
        ({"audio": tmp_path / "text.mp3", "sampling_rate": None}, ValueError, "text.mp3 is not a sound"),
        ({"audio": tmp_path / "empty.wav", "sampling_rate": None}, ValueError, "empty.wav is empty"),
        ({"audio": tmp_path / "no.wav", "sampling_rate": None}, OSError, "no.wav"),
        ({"audio": tmp_path, "sampling_rate": None}, OSError, "directory"),
        ({"audio": torch.zeros(8000)}, ValueError, "audio is silent"),
        ({"audio": torch.stack([SOUND, -SOUND])}, ValueError, "silent when its channels are mixed"),
        ({"audio": SOUND[:80]}, ValueError, "audio is 0.005 s long; it must be from 0.128"),
        ({"audio": nan}, ValueError, "1 of 8000 samples in audio are NaN"),
        ({"audio": (SOUND * 32768).short()}, TypeError, "audio must be a floating-point tensor"),
        ({"audio": (SOUND * 32768).short().numpy()}, TypeError, "int16; of 16-bit samples pass"),
        ({"audio": SOUND[:, None]}, ValueError, r"of \(samples, channels\), pass its transpose"),
        ({"audio": [SOUND, SOUND[:6000]]}, ValueError, "have different lengths"),
        ({"audio": []}, ValueError, "audio is an empty list"),
        ({"audio": 3}, TypeError, "audio must be a waveform"),
        ({"strength": 2}, ValueError, "strength must lie between 0"),
        ({"strength": float("nan")}, ValueError, "strength must be a finite number"),
        ({"keep": (0, 9)}, ValueError, "keep has the span from 0 to 9 s, but the sound is 0.5 s"),
        ({"audio_length_in_s": -1}, ValueError, "audio_length_in_s must be"),
        ({"latents": noise(1, 8, 99, 16)}, ValueError, "latents have shape"),
    ):
        with pytest.raises(kind, match=message) as caught:
            edited(tiny, **arguments)
        assert "\n" not in str(caught.value)


def test_a_quiet_sound_is_a_warning(tiny: AudioLDM2Pipeline) -> None:
    with pytest.warns(UserWarning, match="audio is quiet"):
        edited(tiny, audio=0.01 * SOUND / SOUND.abs().max(), strength=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited(tiny, strength=0)


def test_files_are_read_by_their_content(tmp_path: Path) -> None:
    write_wav(tmp_path / "really.wav", SOUND, RATE)
    renamed = tmp_path / "really.mp3"
    (tmp_path / "really.wav").rename(renamed)
    waveform, rate = read_sound(renamed)
    assert (waveform.shape, rate) == ((1, len(SOUND)), RATE)
    for suffix in (".flac", ".ogg", ".mp3", ".aiff"):
        path = tmp_path / f"a{suffix}"
        write_sound(path, torch.stack([SOUND, -SOUND]), RATE)
        waveform, rate = read_sound(path)
        assert (waveform.shape[0], rate) == (2, RATE)
        power = float(waveform[0, : len(SOUND)].pow(2).mean())
        assert power == pytest.approx(float(SOUND.pow(2).mean()), rel=0.2)
