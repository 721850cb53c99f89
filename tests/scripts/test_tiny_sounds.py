"""The sounds of the tiny checkpoint, and the measures and criteria that recognize them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import pytest
import torch

from scripts.tiny.data.sounds import (
    ALL_SOUNDS,
    BACKGROUNDS,
    CLIP_SAMPLES,
    EVENT_RATES,
    FOREGROUNDS,
    LOUDNESS_LEVELS,
    SAMPLING_RATE,
    Scene,
    Sound,
    draw_scene,
    draw_sound,
    loudest_level,
    render,
)
from scripts.tiny.evaluate.criteria import (
    ATTACK_OVER_BACKGROUND,
    DEPTH_OVER_BACKGROUND,
    KIND_BOUNDS,
    TRAIT_BOUNDS,
    Bounds,
    matches,
    misses,
)
from scripts.tiny.evaluate.measures import Measured, measure

pytestmark = pytest.mark.slow  # long runs of scripts that are not in the wheel

TIME = np.arange(CLIP_SAMPLES) / SAMPLING_RATE


def rendered(sound: Sound, seed: int, loudness: str = "") -> np.ndarray:
    return render(Scene((sound,), loudness), np.random.default_rng([seed, ALL_SOUNDS.index(sound)]))


def degraded(waveform: np.ndarray, seed: int) -> np.ndarray:
    """The sound with the faults of a generated one: blurred by 15 ms and 2 %, phases lost, noise 30 dB below.

    Phases are restored with eight iterations of Griffin and Lim's method, which are too few to be clean.
    """
    generator = torch.Generator().manual_seed(seed)
    window = torch.hann_window(1024)

    def spectrum(x: torch.Tensor) -> torch.Tensor:
        return torch.stft(x, 1024, 160, window=window, return_complex=True)

    def sound(x: torch.Tensor) -> torch.Tensor:
        return torch.istft(x, 1024, 160, window=window, length=len(waveform))

    strength = spectrum(torch.from_numpy(waveform)).abs()  # (bins, frames)
    in_time = torch.exp(-0.5 * (torch.arange(-4, 5) / 1.5) ** 2)
    strength = torch.nn.functional.conv1d(
        strength[:, None], (in_time / in_time.sum())[None, None], padding=4
    )[:, 0]
    bins = torch.arange(513.0)
    across = torch.exp(-0.5 * ((bins[:, None] - bins) / (0.6 + 0.015 * bins)) ** 2)
    strength = (across / across.sum(0)) @ strength
    phase = torch.polar(
        torch.ones_like(strength), 2 * torch.pi * torch.rand(strength.shape, generator=generator)
    )
    for _ in range(8):
        phase = torch.exp(1j * spectrum(sound(strength * phase)).angle())
    blurred = sound(strength * phase).numpy()
    blurred *= 10 ** ((loudest_level(waveform) - loudest_level(blurred)) / 20)
    noise = torch.randn(len(waveform), generator=generator).numpy()
    return blurred + 10 ** ((loudest_level(waveform) - 30) / 20) * noise


def fits(measured: Measured, sound: Sound) -> bool:
    """Whether measured quantities are within the bounds of a sound."""
    bounds: Bounds = dict(KIND_BOUNDS[sound.kind])
    if sound.trait:
        quantity, between = TRAIT_BOUNDS[sound.kind]
        low, high = bounds.get(quantity, (-inf, inf))
        bounds[quantity] = max(low, between[sound.trait][0]), min(high, between[sound.trait][1])
    return all(low <= getattr(measured, name) <= high for name, (low, high) in bounds.items())


# --- the library


@pytest.mark.parametrize("sound", ALL_SOUNDS, ids=lambda sound: f"{sound.kind} {sound.trait}".strip())
def test_a_sound_is_seeded_and_has_the_right_length_and_level(sound: Sound):
    scene = Scene((sound,))
    one, again, other = (render(scene, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (CLIP_SAMPLES,)
    assert one.dtype == np.float32
    assert np.abs(one).max() <= 0.95 + 1e-6
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    for loudness, (lowest, highest) in LOUDNESS_LEVELS.items():
        loud = rendered(sound, 5, loudness)
        full = np.abs(loud).max() > 0.94  # scaled down to avoid clipping
        assert full or lowest - 0.1 <= loudest_level(loud) <= highest + 0.1


def test_scenes_have_all_kinds_and_sometimes_a_background():
    scenes = [draw_scene(np.random.default_rng(i)) for i in range(600)]
    assert {scene.sounds[0] for scene in scenes} == set(ALL_SOUNDS)
    assert {scene.loudness for scene in scenes} == {*LOUDNESS_LEVELS}
    two = [scene.sounds for scene in scenes if len(scene.sounds) == 2]
    assert 50 < len(two) < 140
    assert {sounds[0].kind for sounds in two} <= {*FOREGROUNDS}
    assert {sounds[1].kind for sounds in two} <= {*BACKGROUNDS}
    assert draw_scene(np.random.default_rng(0), "bell").sounds == (Sound("bell"),)


def test_a_background_is_softer_than_the_event():
    bell, rain = Sound("bell"), Sound("rain")
    both = render(Scene((bell, rain)), np.random.default_rng(0))
    quiet = both[-SAMPLING_RATE // 2 : -SAMPLING_RATE // 4]  # the rain alone, if it has not ended
    assert loudest_level(quiet) < loudest_level(both) - 10


# --- whether a sound matches a scene


def confusion(seeds: int, make: Callable[[Sound, int], np.ndarray]) -> tuple[int, int, int]:
    """How often sounds fit their own bounds, how often those of another, and how many there were."""
    right, wrong, trials = 0, 0, 0
    for sound in ALL_SOUNDS:
        for seed in range(seeds):
            measured = measure(make(sound, seed))
            right += fits(measured, sound)
            wrong += sum(fits(measured, other) for other in ALL_SOUNDS if other != sound)
            trials += 1
    return right, wrong, trials


def test_real_sounds_match_themselves_and_no_other():
    right, wrong, trials = confusion(5, lambda sound, seed: rendered(sound, 100 + seed))
    assert right >= 0.97 * trials
    assert wrong <= 0.005 * trials * (len(ALL_SOUNDS) - 1)


def test_degraded_sounds_match_themselves_and_no_other():
    right, wrong, trials = confusion(2, lambda sound, seed: degraded(rendered(sound, 200 + seed), seed))
    assert right >= 0.93 * trials
    assert wrong <= 0.01 * trials * (len(ALL_SOUNDS) - 1)


def test_white_noise_matches_only_noise():
    noise = np.random.default_rng(0).standard_normal(CLIP_SAMPLES).astype(np.float32)
    assert [sound for sound in ALL_SOUNDS if fits(measure(0.05 * noise), sound)] == [Sound("noise")]


def test_silence_matches_nothing():
    for sound in ALL_SOUNDS:
        for silence in (np.zeros(CLIP_SAMPLES, np.float32), np.full(CLIP_SAMPLES, 1e-5, np.float32)):
            found = matches(Scene((sound,), "soft"), silence)
            assert not found["kind"]
            assert not found["loudness"]


@pytest.mark.parametrize("loudness", [*LOUDNESS_LEVELS])
def test_loudness_is_checked_if_it_is_named(loudness: str):
    for i, sound in enumerate(ALL_SOUNDS):
        waveform = rendered(sound, i, loudness)
        assert "loudness" not in matches(Scene((sound,)), waveform)
        assert matches(Scene((sound,), "soft"), waveform)["loudness"] == (loudness == "soft")
        if sound.kind != "clicks" or loudness != "":  # clicks are short, and as loud at the same peak
            assert matches(Scene((sound,), "loud"), waveform)["loudness"] == (loudness == "loud")


def test_an_event_and_its_background_are_recognized():
    found = []
    for foreground in FOREGROUNDS:
        for background in BACKGROUNDS:
            rng = np.random.default_rng([FOREGROUNDS.index(foreground), BACKGROUNDS.index(background)])
            scene = Scene((draw_sound(rng, foreground), Sound(background)))
            waveform = render(scene, rng)
            found.append(all(matches(scene, waveform).values()))
            alone = render(Scene(scene.sounds[:1]), rng)
            assert not matches(scene, alone).get("background", False), scene
            assert matches(scene, alone)["kind"], scene
    assert sum(found) >= 0.95 * len(found)


@pytest.mark.parametrize(
    ("present", "asked"), [("rain", "wind"), ("rain", "waves"), ("wind", "noise"), ("engine", "waves")]
)
def test_a_background_of_another_color_is_wrong(present: str, asked: str):
    event = Sound("birds")
    waveform = render(Scene((event, Sound(present))), np.random.default_rng(1))
    assert matches(Scene((event, Sound(present))), waveform)["background"]
    assert not matches(Scene((event, Sound(asked))), waveform)["background"]


def test_the_low_noise_of_a_low_tone_does_not_hide_rain():
    rng = np.random.default_rng(3)
    rumble = render(Scene((Sound("engine"),)), rng)
    for pitch in ("low", "middle"):
        scene = Scene((Sound("tone", pitch), Sound("rain")))
        waveform = render(scene, rng)
        waveform += rumble * 10 ** ((loudest_level(waveform) - loudest_level(rumble) - 12) / 20)
        assert matches(scene, waveform)["background"] == (pitch == "low")


def test_a_smeared_onset_counts_only_over_a_background():
    """The level rises by 13 dB in 80 ms: 5 dB in 30 ms, 8 dB in 50 ms."""
    waveform = envelope_of(
        lambda t: 10 ** ((np.interp(t, [0.3, 0.38], [-13, 0]) - 30 * np.maximum(t - 0.4, 0)) / 20)
    )
    assert measure(waveform, DEPTH_OVER_BACKGROUND).onsets == 0
    assert measure(waveform, DEPTH_OVER_BACKGROUND, ATTACK_OVER_BACKGROUND).onsets == 1


def test_misses_say_what_is_wrong():
    sweep = rendered(Sound("sweep", "falling"), 0)
    told = misses(Scene((Sound("sweep", "rising"),), "loud"), sweep)
    assert told["kind"] == []
    assert told["direction"] == ["direction -1, not 0.85 to 1"]
    assert told["loudness"][0].startswith("level -2")


# --- single quantities, of signals with known answers


def envelope_of(strength: Callable[[np.ndarray], np.ndarray], carrier: float = 700.0) -> np.ndarray:
    waveform: np.ndarray = (0.3 * strength(TIME) * np.sin(2 * np.pi * carrier * TIME)).astype(np.float32)
    return waveform


@pytest.mark.parametrize("hertz", [60.0, 118.3, 440.0, 1234.5, 3999.0, 7000.0])
def test_a_sine_has_one_frequency(hertz: float):
    measured = measure(envelope_of(np.ones_like, hertz))
    assert measured.frequency == pytest.approx(hertz, rel=1e-3, abs=0.5)
    assert measured.centroid == pytest.approx(hertz, rel=0.02, abs=2)
    assert measured.tonality > 0.95
    assert measured.steadiness == 1
    assert measured.span < 0.05
    assert measured.level == pytest.approx(20 * np.log10(0.3 / np.sqrt(2)), abs=0.2)
    assert measured.held > 0.98
    assert measured.lasting == pytest.approx(CLIP_SAMPLES / SAMPLING_RATE, abs=0.05)
    assert measured.flatness < 0.05
    assert measured.turns == 0


@pytest.mark.parametrize("seconds", [0.5, 2.0, 8.0])
def test_decay_of_an_exponential(seconds: float):
    waveform = envelope_of(lambda t: np.where(t > 0.3, 10 ** (-3 * (t - 0.3) / seconds), 0))
    assert measure(waveform).decay == pytest.approx(seconds, rel=0.05)
    assert measure(waveform, depth=10).decay == pytest.approx(seconds, rel=0.1)
    assert measure(waveform).onsets == 1


@pytest.mark.parametrize("rate", [1.5, 2.0, 4.0, 8.0])
def test_rate_of_bursts(rate: float):
    measured = measure(envelope_of(lambda t: ((t - 0.1) * rate % 1 < 0.5) * (t > 0.1)))
    assert measured.rate == pytest.approx(rate, rel=0.04)
    assert measured.regularity == 1
    assert measured.onsets == np.ceil((TIME[-1] - 0.1) * rate)


def test_random_events_are_not_regular():
    starts = np.cumsum(np.random.default_rng(2).exponential(0.3, 14)) + 0.1
    measured = measure(envelope_of(lambda t: sum(((t > s) & (t < s + 0.05)).astype(float) for s in starts)))
    assert measured.onsets > 7
    assert measured.regularity < 0.6


@pytest.mark.parametrize("direction", [1, -1])
def test_direction_and_span_of_a_glide_and_of_steps(direction: int):
    glide = 440 * 2 ** (direction * 24 / 12 * TIME / TIME[-1])
    steps = 440 * 2 ** (direction * 2 / 12 * np.floor(12.999 * TIME / TIME[-1]))
    for pitch, stepping in ((glide, (0.15, 0.3)), (steps, (0.8, 1))):
        measured = measure((0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE)).astype(np.float32))
        assert direction * measured.direction > 0.98
        assert measured.span == pytest.approx(24, abs=2)
        assert stepping[0] <= measured.stepping <= stepping[1]
    assert measured.notes == 13


def test_a_wailing_pitch_turns_twice_per_period():
    pitch = 800 * 2 ** (0.5 * np.sin(2 * np.pi * 0.8 * TIME))
    measured = measure((0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE)).astype(np.float32))
    assert measured.turns == 8  # at 0.31 s and every 0.625 s from there
    assert measured.span == pytest.approx(12, abs=0.3)
    assert measured.direction == pytest.approx(0, abs=0.2)


def test_colors_of_noise():
    white = np.random.default_rng(0).standard_normal(CLIP_SAMPLES)
    hertz = np.fft.rfftfreq(CLIP_SAMPLES, 1 / SAMPLING_RATE)
    spectrum = np.fft.rfft(white)

    def noise(gain: np.ndarray) -> Measured:
        return measure((0.1 * np.fft.irfft(spectrum * gain, CLIP_SAMPLES)).astype(np.float32))

    flat, low, six = noise(np.ones_like(hertz)), noise(hertz < 300), noise(np.where(hertz < 1000, 1.0, 0.5))
    assert flat.flatness > 0.97
    assert flat.tonality < 0.1
    assert flat.centroid == pytest.approx(4000, rel=0.03)
    assert flat.low == pytest.approx(300 / 8000, abs=0.01)
    assert flat.high == pytest.approx(7 / 8, abs=0.02)
    assert abs(flat.hum) < 0.05
    assert low.centroid == pytest.approx(150, rel=0.1)
    assert low.low > 0.95
    assert six.tilt - flat.tilt == pytest.approx(6.0, abs=0.5)


def test_a_hum_is_periodic_and_surf_swells():
    hum = sum(np.sin(2 * np.pi * 45 * k * TIME) / k for k in range(1, 9))
    assert measure((0.1 * hum).astype(np.float32)).hum > 0.95
    swelling = measure(envelope_of(lambda t: 10 ** (-0.5 - 0.5 * np.cos(2 * np.pi * t / 2.5))))
    assert swelling.swells == 2
    assert 12 < swelling.swelling < 20  # of 20 dB from the lowest to the highest point
    assert measure(envelope_of(np.ones_like)).swelling < 1


def test_rendered_rates_are_within_the_bounds():
    for kind, rates in EVENT_RATES.items():
        for trait, (slowest, fastest) in rates.items():
            low, high = TRAIT_BOUNDS[kind][1][trait]
            assert low < slowest < fastest < high
