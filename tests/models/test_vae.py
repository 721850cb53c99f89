"""The VAE against diffusers' AutoencoderKL, with every parameter random."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.vae import VAE, DiagonalGaussian, VAEConfig
from tests.helpers import noise
from tests.reference import assert_close, ours, randomize


def layout(*channels: int) -> dict:
    return {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": 4,
        "latent_channels": 3,
    }


CONFIGS: dict[str, dict] = {
    "as AudioLDM 2": {**layout(8, 12, 16), "layers_per_block": 2, "scaling_factor": 0.4},
    "one layer, narrowing": {**layout(16, 8), "layers_per_block": 1, "act_fn": "relu", "norm_num_groups": 2},
    "one level": {**layout(8), "in_channels": 2, "out_channels": 3},
    "no quantization layers": {**layout(4, 8), "use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {**layout(4, 8, 8), "mid_block_add_attention": False, "latent_channels": 1},
}


@cache
def pair(name: str) -> tuple[AutoencoderKL, VAE]:
    theirs = randomize(AutoencoderKL(**CONFIGS[name]), seed=3)
    return theirs, ours(VAE, VAEConfig, "vae.diffusers", theirs, CONFIGS[name])


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "frames", "bands"), [(2, 32, 16), (1, 21, 8), (3, 10, 7)])
def test_equals_diffusers(name: str, batch: int, frames: int, bands: int) -> None:
    """Encoding and decoding, also with frames and bands that are not multiples of the downsampling."""
    theirs, mine = pair(name)
    mel = noise(batch, CONFIGS[name]["in_channels"], frames, bands)
    expected, actual = theirs.encode(mel).latent_dist, mine.encode(mel)
    assert_close(actual.mean, expected.mean, tolerance=1e-5)
    assert_close(actual.log_variance, expected.logvar, tolerance=1e-5)
    assert_close(actual.kl(), expected.kl(), tolerance=1e-5)
    assert torch.equal(actual.mode(), actual.mean)
    latents = noise(*expected.mean.shape, seed=1)
    assert_close(mine.decode(latents), theirs.decode(latents).sample, tolerance=1e-5)
    if CONFIGS[name]["in_channels"] == 1:
        assert_close(mine(mel), theirs(mel).sample, tolerance=1e-5)


def test_sizes() -> None:
    _, mine = pair("as AudioLDM 2")
    assert mine.downsampling == 4
    with torch.no_grad():
        assert mine.encode(noise(1, 1, 33, 64)).mean.shape == (1, 3, 8, 16)
        assert mine.decode(noise(1, 3, 8, 16)).shape == (1, 1, 32, 64)


@torch.no_grad()
def test_samples_are_drawn_as_diffusers_draws_them() -> None:
    theirs, mine = pair("as AudioLDM 2")
    mel = noise(3, 1, 16, 8)
    expected, actual = theirs.encode(mel).latent_dist, mine.encode(mel)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    assert_close(actual.sample(seeded()), expected.sample(seeded()), tolerance=1e-5)
    one_each = [[torch.Generator().manual_seed(seed) for seed in (7, 8, 9)] for _ in range(2)]
    assert_close(actual.sample(one_each[0]), expected.sample(one_each[1]), tolerance=1e-5)
    assert_close(actual.sample([seeded()]), expected.sample([seeded()]), tolerance=1e-5)
    torch.manual_seed(5)
    assert_close(actual.sample(), actual.sample(seeded()), tolerance=1e-6)
    assert not torch.equal(actual.sample(), actual.sample())
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        actual.sample([seeded(), seeded()])


def test_the_variance_is_clamped() -> None:
    log_variance = torch.tensor([-100.0, -30.0, 1.0, 20.0, 100.0]).view(1, 1, 1, 5)
    gaussian = DiagonalGaussian(torch.cat([torch.ones_like(log_variance), log_variance], dim=1))
    assert gaussian.log_variance.flatten().tolist() == [-30.0, -30.0, 1.0, 20.0, 20.0]
    assert torch.isfinite(gaussian.sample()).all()
    unit = DiagonalGaussian(torch.zeros(2, 2, 3, 4))
    assert unit.kl().tolist() == [0.0, 0.0]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    """Against float32."""
    theirs, _ = pair("as AudioLDM 2")
    half = fill(_empty("as AudioLDM 2"), weight_map("vae.diffusers"), TensorDict(theirs.state_dict()), dtype)
    mel, latents = noise(2, 1, 16, 8), noise(2, 3, 4, 2)
    mean, decoded = half.encode(mel.to(dtype)).mean, half.decode(latents.to(dtype))
    assert mean.dtype == decoded.dtype == half.encode(mel.to(dtype)).sample().dtype == dtype
    assert_close(mean, theirs.encode(mel).latent_dist.mean, tolerance=bound)
    assert_close(decoded, theirs.decode(latents).sample, tolerance=bound)


def _empty(name: str) -> VAE:
    with torch.device("meta"):
        return VAE(VAEConfig.from_dict(CONFIGS[name]))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "one level"])
def test_gradients_equal_diffusers(name: str) -> None:
    """Of reconstruction and KL losses, in train mode; every parameter has a gradient. In float64."""
    theirs = randomize(AutoencoderKL(**CONFIGS[name]), seed=4).train()
    mine = ours(VAE, VAEConfig, "vae.diffusers", theirs, CONFIGS[name]).train().requires_grad_()
    theirs.double(), mine.double()
    mel = noise(2, 1, 16, 8).double()
    posterior = mine.encode(mel)
    (mine.decode(posterior.mode()).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    reference = theirs.encode(mel).latent_dist
    (theirs.decode(reference.mode()).sample.square().mean() + 1e-3 * reference.kl().mean()).backward()
    gradients = {k: p.grad for k, p in mine.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    scale = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in weight_map("vae.diffusers").save(gradients).items():
        assert (gradient - expected[key]).abs().max() <= 1e-9 * scale, key


@pytest.mark.parametrize("name", CONFIGS)
def test_saves_what_diffusers_loads(name: str) -> None:
    theirs, mine = pair(name)
    saved = weight_map("vae.diffusers").save(mine.state_dict())
    original = theirs.state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    again = AutoencoderKL.from_config(dataclasses.asdict(mine.config)).eval()
    again.load_state_dict(saved)
    latents = noise(1, CONFIGS[name]["latent_channels"], 4, 4)
    with torch.no_grad():
        assert_close(mine.decode(latents), again.decode(latents).sample, tolerance=1e-5)


@pytest.mark.parametrize("parts", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_old_names_of_the_attention_load_to_the_same_numbers(parts: tuple[str, ...]) -> None:
    theirs, mine = pair("as AudioLDM 2")
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for new, old in spelling.items():
            if name.startswith(parts) and f"attentions.0.{new}." in name:
                name = name.replace(new, old)
        tensors[name] = tensor
    assert len(tensors.keys() - theirs.state_dict().keys()) == 8 * len(parts)
    old = fill(_empty("as AudioLDM 2"), weight_map("vae.diffusers"), TensorDict(tensors))
    mel = noise(2, 1, 16, 8)
    with torch.no_grad():
        assert torch.equal(old(mel), mine(mel))


def test_all_tensors_that_do_not_fit_are_listed() -> None:
    theirs, _ = pair("as AudioLDM 2")
    tensors = dict(theirs.state_dict())
    dropped, misshaped = "decoder.mid_block.attentions.0.to_k.bias", "quant_conv.weight"
    del tensors[dropped]
    tensors[misshaped] = torch.zeros(6, 6, 3, 3)
    tensors["encoder.mid_block.attentions.1.to_q.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as error:
        fill(_empty("as AudioLDM 2"), weight_map("vae.diffusers"), TensorDict(tensors))
    message = str(error.value)
    assert f"missing: {dropped}" in message
    assert f"wrong shape: {misshaped} gives (6, 6, 3, 3)" in message
    assert "unexpected: encoder.mid_block.attentions.1.to_q.weight" in message
    assert message.startswith("3 of")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [0.0, 0.0, 0.0]),
        ("latents_std", [1.0, 1.0, 1.0]),
        ("shift_factor", 0.1),
        ("act_fn", "tanh"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("block_out_channels", []),
    ],
)
def test_unsupported_config_values_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        VAEConfig.from_dict({**CONFIGS["as AudioLDM 2"], key: value})


def test_irrelevant_config_keys_are_ignored_and_defaults_are_diffusers() -> None:
    given = {"_class_name": "AutoencoderKL", "force_upcast": True, "latents_mean": None, "shift_factor": None}
    plain = VAEConfig.from_dict(CONFIGS["as AudioLDM 2"])
    assert VAEConfig.from_dict({**CONFIGS["as AudioLDM 2"], **given}) == plain
    with torch.device("meta"):
        theirs = AutoencoderKL().config
    assert dataclasses.asdict(VAEConfig()) == {k: theirs[k] for k in dataclasses.asdict(VAEConfig())}


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        ("encode", (1, 2, 16, 8)),
        ("encode", (1, 16, 8)),
        ("encode", (1, 1, 3, 8)),
        ("decode", (1, 8, 4, 4)),
        ("decode", (3, 4, 4)),
        ("decode", (1, 3, 0, 4)),
    ],
)
def test_bad_shapes_are_refused_in_one_line(way: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape .* it must be \(batch, [13], time") as error:
        getattr(pair("as AudioLDM 2")[1], way)(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_the_base_model_has_as_many_parameters_as_diffusers() -> None:
    config = {**layout(128, 256, 512), "norm_num_groups": 32, "layers_per_block": 2, "latent_channels": 8}
    with torch.device("meta"):
        theirs, mine = AutoencoderKL(**config), VAE(VAEConfig.from_dict(config))
    count = sum(parameter.numel() for parameter in mine.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(count / 1e6) == 55
