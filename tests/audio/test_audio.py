"""Front ends against transformers and librosa, resampling against ideal tones, files by other readers."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import warnings

import numpy as np
import pytest
import torch

from audioldm2.audio.log_mel import (
    ClapFeatureExtractor,
    ClapFeatureExtractorConfig,
    LogMel,
    LogMelConfig,
    hertz_to_mel,
    mel_filter_bank,
    mel_to_hertz,
)
from audioldm2.audio.resample import resample
from audioldm2.audio.spectrogram_image import decibels, save_spectrogram
from audioldm2.audio.wav import check_writable, read_wav, write_wav
from tests.reference import assert_close

# What cvssp/audioldm2 has, and a small one of uneven sizes whose band ends above the Nyquist frequency.
HUB = {"frequency_min": 50, "frequency_max": 14000, "truncation": "rand_trunc", "padding": "repeatpad"}
SMALL = {
    "feature_size": 24,
    "sampling_rate": 16000,
    "hop_length": 150,
    "max_length_s": 1,
    "fft_window_size": 400,
    "frequency_min": 20,
    "frequency_max": 9000,
    "truncation": "rand_trunc",
}


def sounds(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Loud tones in faint noise, so that quiet bands lie beside loud ones."""
    generator = torch.Generator().manual_seed(seed)
    tones = torch.sin(torch.arange(samples) * torch.tensor([[0.031], [0.2], [0.7]])[:batch])
    return tones + 1e-3 * torch.randn(batch, samples, generator=generator)


def reference_features(config: dict, waveforms: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filters above the Nyquist frequency are empty
        extractor = transformers.ClapFeatureExtractor(**config)
    outputs = extractor(list(waveforms.numpy()), sampling_rate=extractor.sampling_rate)
    return torch.from_numpy(np.stack(outputs["input_features"]))


# ---- the mel filter bank


@pytest.mark.parametrize(
    "sizes", [(1024, 64, 48000, 50, 14000), (1024, 64, 16000, 0, 8000), (401, 30, 8000, 99, 3000)]
)
def test_filter_bank_is_librosas(sizes):
    librosa = pytest.importorskip("librosa")
    n_fft, n_mels, rate, low, high = sizes
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=low, fmax=high, dtype=np.float64)
    assert_close(mel_filter_bank(*sizes), torch.from_numpy(expected.T), 1e-12)


def test_mel_scale_has_its_inverse():
    hertz = torch.tensor([0.0, 440.0, 999.0, 1000.0, 1001.0, 8000.0], dtype=torch.float64)
    assert_close(mel_to_hertz(hertz_to_mel(hertz)), hertz, 1e-12)
    assert hertz_to_mel(hertz)[3].item() == pytest.approx(15)


# ---- CLAP's front end


@pytest.mark.parametrize(
    ("content", "lengths"),
    [
        (HUB, (16000 * 3 + 7, 480000)),
        *[
            ({**SMALL, "padding": padding}, (1, 700, 15999, 16000))
            for padding in ("repeatpad", "repeat", "pad")
        ],
    ],
)
def test_clap_front_end_equals_transformers(content, lengths):
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(content))
    for length in lengths:
        waveforms = sounds(2, length)
        actual = ours(waveforms, ours.config.sampling_rate)
        assert actual.dtype == torch.float32
        assert_close(actual, reference_features(content, waveforms), 1e-6)


def test_clap_front_end_of_silence_and_of_half_precision():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    silence = ours(torch.zeros(1, 500), 16000)
    assert torch.equal(silence, torch.full((1, 1, 107, 24), -100.0))
    waveforms = sounds(2, 8000)
    assert_close(ours(waveforms.bfloat16(), 16000), ours(waveforms.bfloat16().double(), 16000), 1e-7)


def test_long_clips_are_cut_where_the_generator_says():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    waveforms = sounds(3, 20000)

    def features(seed):
        return ours(waveforms, 16000, torch.Generator().manual_seed(seed))

    assert torch.equal(features(0), features(0))
    assert not torch.equal(features(0), features(1))
    starts = torch.randint(4001, (3, 1), generator=torch.Generator().manual_seed(0))[:, 0].tolist()
    assert len(set(starts)) == 3  # each clip has its own
    windows = torch.stack([w[s : s + 16000] for w, s in zip(waveforms, starts, strict=True)])
    assert_close(features(0), reference_features(SMALL, windows), 1e-6)
    torch.manual_seed(0)
    assert torch.equal(ours(waveforms, 16000), features(0))  # no generator: torch's default one


def test_one_sample_too_long_is_cut_at_either_end_and_nowhere_else():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    waveform = sounds(1, 16001)
    ends = [ours(waveform[:, :-1], 16000), ours(waveform[:, 1:], 16000)]
    seen = set()
    for seed in range(12):
        cut = ours(waveform, 16000, torch.Generator().manual_seed(seed))
        seen.add(next(i for i, end in enumerate(ends) if torch.equal(cut, end)))
    assert seen == {0, 1}


def test_clap_front_end_takes_gradients():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    waveforms = torch.cat([sounds(1, 900), torch.zeros(1, 900)]).requires_grad_()
    ours(waveforms, 16000).sum().backward()
    assert torch.isfinite(waveforms.grad).all()
    assert waveforms.grad[0].abs().max() > 0


def test_clap_front_end_round_trips_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = ClapFeatureExtractorConfig.from_dict({**SMALL, "padding": "repeat"})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config.to_dict()))
    loaded = transformers.ClapFeatureExtractor.from_pretrained(tmp_path)
    for name, value in {**SMALL, "padding": "repeat"}.items():
        assert getattr(loaded, name) == value
    waveforms = sounds(1, 3000)
    expected = loaded(list(waveforms.numpy()), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert_close(ClapFeatureExtractor(config)(waveforms, 16000), expected, 1e-6)
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert "nb_max_samples" in saved  # keys that change nothing are there
    assert ClapFeatureExtractorConfig.from_dict(saved) == config


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({**HUB, "truncation": "fusion"}, "truncation='fusion'"),
        ({"feature_size": 64}, "truncation='fusion'"),  # transformers' default
        ({**HUB, "padding": "mirror"}, "padding='mirror'"),
        ({**HUB, "hop_length": 0}, "hop_length=0"),
        ({**HUB, "max_length_s": 0.5}, "max_length_s=0.5"),
        ({**HUB, "fft_window_size": 960001}, "fft_window_size=960001"),
        ({**HUB, "frequency_min": 15000}, "15000 to 14000"),
    ],
)
def test_clap_config_refuses_by_name(content, named):
    with pytest.raises(ValueError, match=named):
        ClapFeatureExtractorConfig.from_dict(content)


@pytest.mark.parametrize("make", [lambda: ClapFeatureExtractor(ClapFeatureExtractorConfig(**HUB)), LogMel])
def test_front_ends_refuse_bad_waveforms(make):
    front_end = make()
    rate = front_end.config.sampling_rate
    with pytest.raises(ValueError, match=f"8000 Hz and {rate} Hz is needed"):
        front_end(torch.zeros(1, 2000), 8000)
    with pytest.raises(ValueError, match=r"shape \(2000,\); one waveform is waveform\[None\]"):
        front_end(torch.zeros(2000), rate)
    with pytest.raises(ValueError, match=r"not torch\.int16"):
        front_end(torch.zeros(1, 2000, dtype=torch.int16), rate)
    with pytest.raises(ValueError, match="no samples"):
        front_end(torch.zeros(1, 0), rate)


# ---- AudioLDM's own front end


def textbook_log_mel(waveform: np.ndarray, config: LogMelConfig) -> np.ndarray:
    """Frame by frame in float64, as HiFi-GAN's data set does it."""
    librosa = pytest.importorskip("librosa")
    pad = (config.n_fft - config.hop_length) // 2
    padded = np.pad(waveform.astype(np.float64), pad, mode="reflect")
    window = np.hanning(config.n_fft + 1)[:-1]
    filters = librosa.filters.mel(
        sr=config.sampling_rate,
        n_fft=config.n_fft,
        n_mels=config.n_mels,
        fmin=config.frequency_min,
        fmax=config.frequency_max,
        dtype=np.float64,
    )
    starts = range(0, len(padded) - config.n_fft + 1, config.hop_length)
    magnitudes = [np.abs(np.fft.rfft(window * padded[s : s + config.n_fft])) for s in starts]
    return np.log(np.maximum(filters @ np.stack(magnitudes, axis=1), 1e-5)).T


@pytest.mark.parametrize("config", [LogMelConfig(), LogMelConfig(22050, 512, 128, 40, 30, 9000)])
@pytest.mark.parametrize("samples", [1025, 5001, 16000])
def test_log_mel_is_hifi_gans(config, samples):
    waveforms = sounds(3, samples, seed=1)
    waveforms[2] *= 1e-4
    actual = LogMel(config)(waveforms, config.sampling_rate)
    assert actual.shape == (3, 1, samples // config.hop_length, config.n_mels)
    expected = np.stack([textbook_log_mel(w, config) for w in waveforms.numpy()])[:, None]
    assert_close(actual, torch.from_numpy(expected).float(), 1e-4)
    exact = LogMel(config)(waveforms.double(), config.sampling_rate)
    assert_close(exact, torch.from_numpy(expected), 1e-7)


def test_log_mel_floor_and_shortest_clip():
    log_mel = LogMel()
    assert_close(log_mel(torch.zeros(1, 480), 16000), torch.full((1, 1, 3, 64), math.log(1e-5)), 1e-6)
    assert log_mel(sounds(1, 433), 16000).shape == (1, 1, 2, 64)
    with pytest.raises(ValueError, match="432 samples are too short: at least 433"):
        log_mel(torch.zeros(1, 432), 16000)
    with pytest.raises(ValueError, match="hop_length=161"):
        LogMelConfig(hop_length=161)
    with pytest.raises(ValueError, match="n_mels=0"):
        LogMelConfig(n_mels=0)


# ---- resampling


def tones(rate: int, count: int, highest: float) -> np.ndarray:
    """Forty tones up to `highest` Hz, sampled at `rate`."""
    generator = np.random.default_rng(3)
    frequency = generator.uniform(0.01, 1, 40)[:, None] * highest
    frequency[0] = highest
    phase = generator.uniform(0, 2 * np.pi, 40)[:, None]
    return np.sin(2 * np.pi * frequency * np.arange(count) / rate + phase).mean(0)


def noise_to_signal(actual: np.ndarray, expected: np.ndarray) -> float:
    """In dB, of the middle: at its ends the sound begins and stops."""
    middle = slice(len(expected) // 8, -len(expected) // 8)
    difference = (actual[: len(expected)] - expected)[middle]
    return 10 * math.log10((difference**2).mean() / (expected[middle] ** 2).mean())


RATES = [(16000, 48000), (48000, 16000), (44100, 48000), (44100, 16000), (16000, 44100), (8001, 16000)]


@pytest.mark.parametrize(("orig", "target"), RATES)
def test_resampled_tones_are_the_ideal_ones(orig, target):
    highest = 0.9 * min(orig, target) / 2
    x = tones(orig, orig, highest)
    y = resample(torch.from_numpy(x), orig, target).numpy()
    ideal = tones(target, len(y), highest)
    assert noise_to_signal(y, ideal) < -100
    single = resample(torch.from_numpy(x).float(), orig, target).numpy()
    assert single.dtype == np.float32
    assert noise_to_signal(single, ideal) < -100


def test_resampling_is_as_good_as_soxr_and_better_than_scipy():
    soxr = pytest.importorskip("soxr")
    signal = pytest.importorskip("scipy.signal")
    x = tones(16000, 16000, 7200)
    ours = resample(torch.from_numpy(x), 16000, 48000).numpy()
    theirs = soxr.resample(x, 16000, 48000, quality="HQ")
    assert ours.shape == theirs.shape
    assert noise_to_signal(ours, theirs) < -60
    ideal = tones(48000, 48000, 7200)
    assert noise_to_signal(ours, ideal) < noise_to_signal(signal.resample_poly(x, 3, 1), ideal) - 20


def test_nothing_is_folded_down_or_mirrored_up():
    # A tone above the lower Nyquist frequency is gone after going down.
    x = np.sin(2 * np.pi * 8010 / 48000 * np.arange(48000))
    down = resample(torch.from_numpy(x), 48000, 16000).numpy()
    assert 20 * math.log10(np.abs(down[2000:-2000]).max()) < -90
    # And going up brings nothing above the old Nyquist frequency.
    generator = np.random.default_rng(0)
    x = signal_below(generator.standard_normal(16000), 0.9)
    up = resample(torch.from_numpy(x), 16000, 48000).numpy()
    spectrum = np.abs(np.fft.rfft(up * np.blackman(len(up)))) ** 2
    edge = 8000 * len(spectrum) // 24000 + 10
    assert 10 * math.log10(spectrum[edge:].sum() / spectrum[:edge].sum()) < -90


def signal_below(noise: np.ndarray, share: float) -> np.ndarray:
    """Noise without what lies above a share of its Nyquist frequency, fading in and out."""
    spectrum = np.fft.rfft(noise)
    spectrum[int(share * len(spectrum)) :] = 0
    return np.fft.irfft(spectrum, len(noise)) * np.hanning(len(noise))


def test_resampled_lengths_are_rounded_up_and_soxrs():
    librosa = pytest.importorskip("librosa")
    for orig, target in [(16000, 48000), (48000, 16000), (44100, 16000), (16000, 44100)]:
        for samples in (1, 2, 3, 100, 1001, 4567):
            length = resample(torch.zeros(samples), orig, target).shape[-1]
            assert length == -(-samples * target // orig)
            librosas = librosa.resample(np.zeros(samples, np.float32), orig_sr=orig, target_sr=target)
            assert length == len(librosas)


def test_resampling_keeps_axes_dtype_and_equal_rates(monkeypatch):
    x = sounds(3, 1000).reshape(3, 1, 1000)
    y = resample(x, 44100, 48000)
    assert y.shape == (3, 1, 1089)
    for i in range(3):
        assert_close(y[i, 0], resample(x[i, 0], 44100, 48000), 1e-6)
    assert resample(x, 16000, 16000) is x
    half = resample(x.bfloat16(), 44100, 48000)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), y, 2e-2)
    # The form for large factors gives what the convolution gives.
    monkeypatch.setattr("audioldm2.audio.resample.LARGEST_KERNEL", 0)
    assert_close(resample(x, 44100, 48000), y, 1e-6)


def test_resampling_refuses():
    with pytest.raises(ValueError, match="must be positive, not 16000 and 0"):
        resample(torch.zeros(5), 16000, 0)
    with pytest.raises(TypeError):
        resample(torch.zeros(5), 16000, 44100.5)
    with pytest.raises(TypeError, match="floating point"):
        resample(torch.zeros(5, dtype=torch.int16), 16000, 8000)
    with pytest.raises(ValueError, match="single number"):
        resample(torch.tensor(1.0), 16000, 8000)


# ---- sound files


@pytest.mark.parametrize("shape", [(777,), (1, 777), (3, 778)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float32, torch.bfloat16])
def test_written_files_are_what_other_readers_read(tmp_path, shape, kind):
    soundfile = pytest.importorskip("soundfile")
    wavfile = pytest.importorskip("scipy.io.wavfile")
    values = np.random.default_rng(0).uniform(-1, 0.99, shape)  # the half precisions stay below 1
    if isinstance(kind, torch.dtype):
        audio = torch.from_numpy(values).to(kind).requires_grad_()
        values = audio.detach().double().numpy()
    else:
        audio = values.astype(kind)
        values = audio.astype(np.float64)
    frames = np.atleast_2d(values).T
    for format, subtype, step in (("pcm16", "PCM_16", 2.0**-16), ("float32", "FLOAT", 1e-7)):
        path = tmp_path / f"{format}.wav"
        write_wav(path, audio, 22050, format=format)
        read, rate = soundfile.read(path, always_2d=True)
        assert (rate, soundfile.info(path).subtype) == (22050, subtype)
        assert read.shape == frames.shape
        assert np.abs(read - frames).max() <= step
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rate, read = wavfile.read(path)
        assert rate == 22050
        scale = 2**15 if format == "pcm16" else 1
        assert np.abs(read.reshape(frames.shape) / scale - frames).max() <= step
        ours, rate = read_wav(path)
        assert rate == 22050
        assert ours.dtype == torch.float32
        assert np.abs(ours.numpy().T - frames).max() <= step
        assert os.listdir(tmp_path) == [path.name]
        path.unlink()


def test_sixteen_bits_are_rounded_and_clipped_with_a_word(tmp_path):
    path = tmp_path / "a.wav"
    exact = torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.7 / 2**15, -0.7 / 2**15, 0.3 / 2**15])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_wav(path, exact, 16000)
        assert (read_wav(path)[0] * 2**15).tolist() == [[-32768, -16384, 0, 8192, 1, -1, 0]]
        write_wav(path, torch.tensor([1.0]), 16000)  # full scale is not clipping
    with pytest.warns(UserWarning, match=r"2 samples of 3 are outside \[-1, 1\]"):
        write_wav(path, torch.tensor([1.5, -7.0, 0.5]), 16000)
    assert (read_wav(path)[0] * 2**15).tolist() == [[32767, -32768, 16384]]
    write_wav(path, torch.tensor([1.5, -7.0]), 16000, format="float32")
    assert read_wav(path)[0].tolist() == [[1.5, -7.0]]


def test_the_headers_are_the_standards_to_the_byte(tmp_path):
    path = tmp_path / "a.wav"
    stereo = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.25]])
    write_wav(path, stereo, 16000)
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 48, b"WAVE", b"fmt ", 16, 1, 2, 16000, 64000, 4, 16, b"data", 12
    )
    assert path.read_bytes() == header + struct.pack("<6h", 16384, -16384, 0, 0, 0, 8192)
    write_wav(path, stereo, 16000, format="float32")
    header = struct.pack("<4sI4s4sIHHIIHHH", b"RIFF", 74, b"WAVE", b"fmt ", 18, 3, 2, 16000, 128000, 8, 32, 0)
    header += struct.pack("<4sII4sI", b"fact", 4, 3, b"data", 24)
    assert path.read_bytes() == header + struct.pack("<6f", 0.5, -0.5, 0, 0, 0, 0.25)
    assert len(path.read_bytes()) == 74 + 8


@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_others_are_read(tmp_path, container, subtype, channels):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "a.wav"
    values = np.random.default_rng(1).uniform(-1, 0.999, (501, channels))
    soundfile.write(path, values, 44100, subtype=subtype, format=container)
    expected, _ = soundfile.read(path, dtype="float64", always_2d=True)
    actual, rate = read_wav(path)
    assert rate == 44100
    assert_close(actual.double(), torch.from_numpy(expected.T.copy()), 1e-7)


def test_chunks_between_are_passed_over_and_pipes_are_read_to_the_end(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, torch.tensor([0.5, -0.25]), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:36] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + content[36:] + b"junk")
    assert read_wav(path)[0].tolist() == [[0.5, -0.25]]
    path.write_bytes(content[:40] + b"\xff\xff\xff\xff" + content[44:])
    assert read_wav(path)[0].tolist() == [[0.5, -0.25]]


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, torch.tensor([0.5, -0.25]), 16000)
    content = path.read_bytes()
    for broken, message in [
        (b"", "not a WAV file"),
        (b"ID3" + content, "not a WAV file"),
        (content[:30], "cut short, the sound or its format is missing"),
        (content[:-1], "cut short, 3 bytes of sound of 4"),
        (content[:34] + b"\x08" + content[35:], "samples of 8 bits in format 1"),
        (content[:20] + b"\x55" + content[21:], "samples of 16 bits in format 85"),
        (content[:22] + b"\x00" + content[23:], "0 channels"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"a.wav: .*{message}"):
            read_wav(path)
    with pytest.raises(FileNotFoundError):
        read_wav(tmp_path / "none.wav")


def test_bad_sound_is_not_written(tmp_path):
    path = tmp_path / "a.wav"
    for audio, error, message in [
        (torch.tensor([0.0, float("nan")]), ValueError, "1 samples of 2 that are NaN or infinite"),
        (np.array([[np.inf, -np.inf]]), ValueError, "2 samples of 2"),
        (np.zeros(5, np.int16), TypeError, "floating point"),
        (torch.zeros(5, dtype=torch.int64), TypeError, "floating point"),
        (torch.zeros(1, 1, 5), ValueError, r"shape \(samples,\) or \(channels, samples\)"),
        (torch.zeros(0), ValueError, r"not \(0,\)"),
        (torch.zeros(16000, 2), ValueError, "16000 channels"),
    ]:
        with pytest.raises(error, match=message):
            write_wav(path, audio, 16000)
    with pytest.raises(ValueError, match="'pcm16' or 'float32', not 'mp3'"):
        write_wav(path, torch.zeros(5), 16000, format="mp3")
    for rate, error in ((0, ValueError), (2**31, ValueError), (16000.5, TypeError)):
        with pytest.raises(error):
            write_wav(path, torch.zeros(5), rate)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, interruption):
    path = tmp_path / "a.wav"
    path.write_text("before")

    def stop(*_):
        assert len(os.listdir(tmp_path)) == 2  # the temporary file is there
        raise interruption

    # The last thing before the rename, when the temporary file is complete.
    monkeypatch.setattr("audioldm2.audio.wav.check_writable", lambda path: None)
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(type(interruption) if isinstance(interruption, OSError) else interruption):
        write_wav(path, torch.zeros(5), 16000)
    assert os.listdir(tmp_path) == ["a.wav"]
    assert path.read_text() == "before"


def test_whether_a_path_can_be_written_is_told_before(tmp_path, monkeypatch):
    there = tmp_path / "there.wav"
    there.write_text("before")
    check_writable(there)
    check_writable(str(tmp_path / "new.wav"))
    with pytest.raises(FileNotFoundError, match="folder of the output path does not exist"):
        check_writable(tmp_path / "no" / "a.wav")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match="no folder"):
        check_writable(there / "a.wav")
    with pytest.raises(OSError, match="not a regular file"):
        check_writable(os.devnull)
    with pytest.raises(OSError, match=r"(?i)too long"):
        check_writable(tmp_path / ("a" * 300))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_wav(tmp_path / "no" / "a.wav", torch.zeros(5), 16000)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\).*there.wav"):
        check_writable(there)
    assert os.listdir(tmp_path) == ["there.wav"]
    assert there.read_text() == "before"


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.wav").write_text("before")
    (tmp_path / "link.wav").symlink_to("real.wav")
    write_wav(tmp_path / "link.wav", torch.tensor([0.5]), 16000)
    assert (tmp_path / "link.wav").is_symlink()
    assert read_wav(tmp_path / "real.wav")[0].tolist() == [[0.5]]


# ---- the picture


def test_the_picture_shows_a_tone_where_it_is():
    rate = 16000
    time = torch.arange(rate) / rate
    waveform = torch.where(
        time < 0.5, torch.sin(2 * math.pi * 440 * time), torch.sin(2 * math.pi * 3000 * time)
    )
    values = decibels(waveform[None], rate)
    assert values.shape == (101, 128)
    assert values.max().item() == 0
    assert values.min().item() >= -80.001
    mels = torch.linspace(0, hertz_to_mel(torch.tensor(8000.0)).item(), 130)[1:-1]
    heard = mel_to_hertz(mels[values.argmax(1)])
    assert torch.allclose(heard[10:40], torch.tensor(440.0), rtol=0.05)
    assert torch.allclose(heard[60:90], torch.tensor(3000.0), rtol=0.05)
    assert_close(decibels(torch.zeros(1, 100), rate), torch.full((1, 128), -80.0), 1e-6)


def test_low_is_low_and_early_is_left(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    time = np.arange(16000) / 16000
    save_spectrogram(tmp_path / "a.png", np.sin(2 * np.pi * 300 * time) * (time < 0.5), 16000)
    brightness = image.imread(tmp_path / "a.png")[40:400, 120:900, :3].sum(-1)
    low, high = brightness[240:], brightness[:120]
    assert low[:, :300].max() > 2
    assert max(high[:, :300].max(), low[:, 500:].max()) < 0.5


@pytest.mark.parametrize(("shape", "rate"), [((9000,), 16000), ((2, 9000), 48000), ((1,), 8000)])
def test_the_picture_is_a_png(tmp_path, shape, rate):
    image = pytest.importorskip("matplotlib.image")
    before = set(sys.modules)
    path = tmp_path / "a.picture"
    save_spectrogram(path, np.random.default_rng(0).uniform(-1, 1, shape), rate, title="a $1 bell & a_drum")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.imread(path, format="png").shape == (480, 1080, 4)
    assert os.listdir(tmp_path) == ["a.picture"]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_the_picture_without_matplotlib_or_with_a_bad_path(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_spectrogram(tmp_path / "no" / "a.png", torch.zeros(5), 16000)
    with pytest.raises(ValueError, match="must be positive"):
        save_spectrogram(tmp_path / "a.png", torch.zeros(5), 0)
    with pytest.raises(ValueError, match="NaN"):
        save_spectrogram(tmp_path / "a.png", torch.tensor([float("nan")]), 16000)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "audioldm2\[plot\]"'):
        save_spectrogram(tmp_path / "a.png", torch.zeros(5), 16000)
    assert os.listdir(tmp_path) == []
