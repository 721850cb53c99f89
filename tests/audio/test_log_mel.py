"""The mel filter bank and both front ends, against librosa and transformers."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch

from audioldm2 import CheckpointError
from audioldm2.audio.clap_features import ClapFeatureExtractor, ClapFeatureExtractorConfig
from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.audio.mel import hertz_to_mel, mel_filter_bank, mel_to_hertz
from audioldm2.checkpoints.hub import TINY_FOLDER as TINY
from audioldm2.models.hifigan import HifiGanConfig
from tests.reference import assert_close

# The config of cvssp/audioldm2, and a small one with odd sizes whose band ends above the Nyquist frequency.
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
    """Loud tones in faint noise, so that some mel bands are loud and others quiet."""
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


# --- the mel filter bank


@pytest.mark.parametrize(
    "sizes", [(1024, 64, 48000, 50, 14000), (1024, 64, 16000, 0, 8000), (401, 30, 8000, 99, 3000)]
)
def test_filter_bank_equals_librosas(sizes):
    librosa = pytest.importorskip("librosa")
    n_fft, n_mels, rate, low, high = sizes
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=low, fmax=high, dtype=np.float64)
    assert_close(mel_filter_bank(*sizes), torch.from_numpy(expected.T), 1e-12)


def test_mel_to_hertz_inverts_hertz_to_mel():
    hertz = torch.tensor([0.0, 440.0, 999.0, 1000.0, 1001.0, 8000.0], dtype=torch.float64)
    assert_close(mel_to_hertz(hertz_to_mel(hertz)), hertz, 1e-12)
    assert hertz_to_mel(hertz)[3].item() == pytest.approx(15)


# --- CLAP's front end


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


def test_long_clips_are_cropped_where_the_generator_says():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    waveforms = sounds(3, 20000)

    def features(seed):
        return ours(waveforms, 16000, torch.Generator().manual_seed(seed))

    assert torch.equal(features(0), features(0))
    assert not torch.equal(features(0), features(1))
    starts = torch.randint(4001, (3, 1), generator=torch.Generator().manual_seed(0))[:, 0].tolist()
    assert len(set(starts)) == 3  # each clip has its own start
    windows = torch.stack([w[s : s + 16000] for w, s in zip(waveforms, starts, strict=True)])
    assert_close(features(0), reference_features(SMALL, windows), 1e-6)
    torch.manual_seed(0)
    assert torch.equal(ours(waveforms, 16000), features(0))  # without a generator, PyTorch's global one


def test_a_clip_one_sample_too_long_loses_its_first_or_last_sample():
    ours = ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(SMALL))
    waveform = sounds(1, 16001)
    ends = [ours(waveform[:, :-1], 16000), ours(waveform[:, 1:], 16000)]
    seen = set()
    for seed in range(12):
        cropped = ours(waveform, 16000, torch.Generator().manual_seed(seed))
        seen.add(next(i for i, end in enumerate(ends) if torch.equal(cropped, end)))
    assert seen == {0, 1}


def test_clap_front_end_has_gradients():
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
    assert "nb_max_samples" in saved  # it also has keys that are not used
    assert ClapFeatureExtractorConfig.from_dict(saved) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**HUB, "truncation": "random"}, "truncation must be 'rand_trunc' or 'fusion', got 'random'"),
        ({**HUB, "padding": "mirror"}, "padding must be .*, got 'mirror'"),
        ({**HUB, "hop_length": 0}, "hop_length must be a positive integer, got 0"),
        ({**HUB, "max_length_s": 0.5}, "max_length_s must be a positive integer, got 0.5"),
        ({**HUB, "fft_window_size": 960001}, "fft_window_size=960001 is too large for max_length_s=10"),
        ({**HUB, "fft_window_size": 2047, "sampling_rate": 1000, "max_length_s": 1}, "2047 is too large"),
        ({**HUB, "feature_size": 2**31 - 1}, "feature_size=2147483647 is too large"),
        ({**HUB, "sampling_rate": 2**31 - 1}, "sampling_rate must be at most 1048576 Hz"),
        ({**HUB, "max_length_s": 2**31 - 1}, "max_length_s=2147483647 .*is too long"),
        ({**HUB, "frequency_max": math.inf}, "frequency_min < frequency_max must hold, got 50 and inf"),
        ({**HUB, "frequency_min": 15000}, "frequency_min < frequency_max must hold, got 15000 and 14000"),
    ],
)
def test_clap_config_refuses_unsupported_values(content, message):
    with pytest.raises(ValueError, match=message):
        ClapFeatureExtractorConfig.from_dict(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_size": 2**31 - 1}, "feature_size=2147483647 is too large"),
        ({"sampling_rate": 2**31 - 1}, "sampling_rate must be at most 1048576 Hz, got 2147483647"),
        ({"max_length_s": 2**31 - 1}, "max_length_s=2147483647 .* is too long"),
        ({"hop_length": 1, "max_length_s": 100}, "hop_length=1 is too long"),
        ({"frequency_max": math.inf}, "frequency_min < frequency_max must hold, got 50 and inf"),
        ({"frequency_min": math.nan}, "frequency_min < frequency_max must hold, got nan"),
    ],
)
def test_clap_sizes_are_bounded(changes, message):
    with pytest.raises(ValueError, match=message):
        ClapFeatureExtractorConfig.from_dict({**HUB, **changes})


def test_clap_settings_have_transformers_names_and_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = ClapFeatureExtractor.from_pretrained("tiny", subfolder="feature_extractor")
    theirs = transformers.ClapFeatureExtractor.from_pretrained(TINY / "feature_extractor")
    for name in (*SMALL, "padding", "nb_max_samples"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sampling_rate == 16000
    with pytest.raises(AttributeError):
        ours.padding = "pad"  # it would have no effect on what was computed from it
    assert copy.deepcopy(ours).hop_length == ours.hop_length
    ours.save_pretrained(tmp_path / "new" / "folder")
    assert ClapFeatureExtractor.from_pretrained(tmp_path / "new" / "folder").config == ours.config
    (tmp_path / "preprocessor_config.json").write_text('{"truncation": "rand_trunc", "hop_length": "ten"}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: hop_length = 'ten'"):
        ClapFeatureExtractor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        ClapFeatureExtractor.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("content", [{**HUB, "truncation": "fusion"}, {"feature_size": 64}])
def test_feature_fusion_is_told_at_load_and_refused_at_the_call(content):
    """It is transformers' default. A generation without candidates does not need it."""
    with pytest.warns(UserWarning, match="cannot be ranked with this feature extractor: truncation='fusion'"):
        config = ClapFeatureExtractorConfig.from_dict(content)
    with pytest.raises(ValueError, match="is for CLAP with feature fusion"):
        ClapFeatureExtractor(config)(torch.zeros(1, 480), config.sampling_rate)


@pytest.mark.parametrize("make", [lambda: ClapFeatureExtractor(ClapFeatureExtractorConfig(**HUB)), LogMel])
def test_front_ends_refuse_bad_waveforms(make):
    front_end = make()
    rate = front_end.config.sampling_rate
    with pytest.raises(ValueError, match=f"must be {rate} Hz, got 8000 Hz"):
        front_end(torch.zeros(1, 2000), 8000)
    with pytest.raises(ValueError, match=r"shape \(2000,\); pass a single waveform as waveform\[None\]"):
        front_end(torch.zeros(2000), rate)
    with pytest.raises(ValueError, match=r"got torch\.int16"):
        front_end(torch.zeros(1, 2000, dtype=torch.int16), rate)
    with pytest.raises(ValueError, match="no samples"):
        front_end(torch.zeros(1, 0), rate)
    with pytest.raises(ValueError, match=r"got torch\.complex64"):
        front_end(torch.zeros(1, 2000, dtype=torch.complex64), rate)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 of 2000 samples in waveforms are NaN or infinite"):
            front_end(torch.zeros(1, 2000).index_fill(1, torch.tensor([7]), value), rate)
    for waveforms in (np.zeros((1, 2000), np.float32), torch.zeros(1, 2000, device="meta")):
        with pytest.raises(TypeError, match="waveforms must be a"):
            front_end(waveforms, rate)


# --- AudioLDM's front end


def textbook_log_mel(waveform: np.ndarray, config: LogMelConfig) -> np.ndarray:
    """Log-mel frames as in HiFi-GAN's data set, one by one and in float64."""
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
def test_log_mel_equals_hifi_gans(config, samples):
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
    with pytest.raises(ValueError, match="at least 433 samples, got 432"):
        log_mel(torch.zeros(1, 432), 16000)
    with pytest.raises(ValueError, match="minus hop_length=161 must be an even number"):
        LogMelConfig(hop_length=161)
    with pytest.raises(ValueError, match="n_mels must be a positive integer, got 0"):
        LogMelConfig(n_mels=0)


def test_log_mel_sizes_are_bounded():
    for changes, message in [
        ({"n_mels": 2**31}, "n_mels=2147483648 is too large"),
        ({"n_fft": 2**31, "hop_length": 2}, "n_fft=2147483648 with n_mels=64 is too large"),
        ({"sampling_rate": 2**31}, "sampling_rate must be at most"),
        ({"frequency_max": math.inf}, "must hold, got 0 and inf"),
        ({"floor": math.nan}, "floor must be positive, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            LogMelConfig(**changes)


# --- the front end that fits a checkpoint


def test_settings_for_a_vocoder():
    hub = HifiGanConfig(
        model_in_dim=64, upsample_rates=(5, 4, 2, 2, 2), upsample_kernel_sizes=(16, 16, 8, 4, 4)
    )
    assert LogMelConfig.for_vocoder(hub) == LogMelConfig()
    transformers = pytest.importorskip("transformers")
    foreign = transformers.SpeechT5HifiGanConfig(sampling_rate=48000, upsample_rates=[6, 5, 4, 4])
    expected = LogMelConfig(48000, 2048, 480, 80, 20, 24000)
    assert LogMelConfig.for_vocoder(foreign, n_fft=2048, frequency_min=20) == expected
    for rates, n_fft in (((512,), 1024), ((600,), 2048), ((3, 5), 1025)):
        foreign.upsample_rates = rates
        assert LogMelConfig.for_vocoder(foreign).n_fft == n_fft
    foreign.upsample_rates = [2**31 - 1] * 50
    with pytest.raises(ValueError, match="product of upsample_rates, must be from 1 to"):
        LogMelConfig.for_vocoder(foreign)


def test_log_mel_fits_a_checkpoint(tmp_path):
    log_mel = LogMel.from_pretrained("tiny")
    assert log_mel.config == LogMelConfig(hop_length=512)  # scripts/tiny trained with these settings
    assert log_mel(torch.zeros(1, 81920), 16000).shape == (1, 1, 160, 64)

    shutil.copytree(TINY / "vocoder", tmp_path / "vocoder", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = tmp_path / "audioldm2.json"
    assert LogMel.from_pretrained(tmp_path).config == log_mel.config
    settings.write_text(json.dumps({"log_mel": {"n_fft": 2048, "frequency_min": 30}, "recommended": {}}))
    assert LogMel.from_pretrained(tmp_path).config == LogMelConfig(16000, 2048, 512, 64, 30, 8000)
    for content, message in [
        ({"log_mel": 5}, r"audioldm2\.json: log_mel must be an object with some of n_fft, "),
        ({"log_mel": {"hop": 5}}, r"audioldm2\.json: log_mel must be an object"),
        ({"log_mel": {"hop_length": 7}}, r"audioldm2\.json: log_mel must be an object"),  # the vocoder's
        ({"log_mel": {"n_fft": "2048"}}, r"audioldm2\.json: log_mel\.n_fft = '2048' is not supported"),
        ({"log_mel": {"n_fft": 511}}, "n_fft=511 minus hop_length=512"),
        ([], r"audioldm2\.json must contain a JSON object"),
    ]:
        settings.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            LogMel.from_pretrained(tmp_path)
    (tmp_path / "vocoder" / "config.json").write_text('{"upsample_rates": "four"}')
    with pytest.raises(CheckpointError, match=r"config\.json: upsample_rates = 'four'"):
        LogMel.from_pretrained(tmp_path)
