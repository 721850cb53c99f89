"""The reference: diffusers' and transformers' stages, checkpoints and pipelines, with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import audioldm2
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.folder import load_tokenizer
from audioldm2.checkpoints.weight_map import weight_map
from scripts.random_checkpoint import BASE, changed
from scripts.random_tokenizers import write_roberta_tokenizer, write_t5_tokenizer
from tests.helpers import assert_same_sound, load_pipeline, seeded


def randomize(module: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Draw *all* parameters and float buffers of a module at random, so that each one changes the output.

    Matrices and kernels preserve the scale of their input (std = gain / sqrt(fan in)). Vectors that are gains
    (weights of norms, running variances) are drawn around 1, other vectors (biases, embeddings) around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            if tensor.dim() == 0:
                value = 1.0 + 0.2 * noise
            elif "running_var" in last or last in ("scale", "weight_g", "original0"):
                value = (1.0 + 0.2 * noise).abs() + 0.1
            elif tensor.dim() == 1:
                value = 1.0 + 0.2 * noise if last == "weight" else 0.2 * noise
            elif (
                ("embed" in name and "time_embedding" not in name)
                or "wte" in name
                or "wpe" in name
                or "shared" in name
            ):
                value = 0.5 * noise
            else:
                value = noise * gain / math.sqrt(tensor[0].numel())
            tensor.copy_(value.to(tensor.dtype))
    return module.eval()


def ours(
    stage_class: type, config_class: type, map_name: str, reference: nn.Module, config: dict
) -> nn.Module:
    """Our stage with a reference module's weights, converted by the map that loads a checkpoint."""
    with torch.device("meta"):
        stage = stage_class(config_class.from_dict(config))
    tensors = {name: tensor.detach().clone() for name, tensor in reference.state_dict().items()}
    return fill(stage, weight_map(map_name), TensorDict(tensors))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal shapes, and no difference larger than `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "NaN or inf"
    scale = expected.abs().max().item()
    assert scale > 0, "the reference is all zeros, so comparing with it proves nothing"
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= tolerance * scale, f"differs by {difference:.3g} at a scale of {scale:.3g}"


# --- whole checkpoints

# Small, but in the layout of cvssp/audioldm2: uneven widths, three transformers per layer of the UNet, a T5
# whose heads do not divide its width, a vocoder with the same hop of 160 samples.
SMALL: dict[str, dict] = {
    "vae": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 12, 16],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 128,
        "scaling_factor": 0.41,
    },
    "text_encoder": {
        "projection_dim": 12,
        "text_config": {
            "vocab_size": 400,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 66,
            "projection_dim": 12,
        },
        "audio_config": {
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "patch_size": 16,
            "patch_stride": [16, 16],
            "projection_dim": 12,
        },
    },
    "text_encoder_2": {
        "vocab_size": 160,
        "d_model": 20,
        "d_kv": 8,
        "d_ff": 36,
        "num_layers": 2,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu",
    },
    "projection_model": {"text_encoder_dim": 12, "text_encoder_1_dim": 20, "langauge_model_dim": 16},
    "language_model": {
        "vocab_size": 32,
        "n_positions": 80,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "max_new_tokens": 8,
    },
    "unet": {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": [[None, 16, 20]] * 3,
        "attention_head_dim": 4,
    },
    "vocoder": {
        "model_in_dim": 16,
        "sampling_rate": 16000,
        "upsample_initial_channel": 32,
        "upsample_rates": [5, 4, 4, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "normalize_before": False,
    },
    "feature_extractor": BASE["feature_extractor"],
    "scheduler": BASE["scheduler"],
}


# As -large: four transformers per layer, the first and the last without cross-attention, each of two blocks.
# Each level has its own number of heads.
SMALL_LARGE = changed(
    SMALL,
    unet={
        "cross_attention_dim": [[None, 16, 20, None]] * 3,
        "transformer_layers_per_block": 2,
        "attention_head_dim": [2, 4, 6],
        "layers_per_block": 2,
    },
)

# As the speech checkpoints: VITS's text encoder in place of T5, and learned positions for its tokens.
SMALL_SPEECH = changed(
    SMALL,
    projection_model={"use_learned_position_embedding": True, "max_seq_length": 24},
    language_model={"n_positions": 120},
)
SMALL_SPEECH["text_encoder_2"] = {
    "model_type": "vits",
    "vocab_size": 200,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 28,
    "window_size": 3,
    # Parts that the pipeline never runs, as small as possible.
    "flow_size": 4,
    "spectrogram_bins": 5,
    "upsample_initial_channel": 8,
    "upsample_rates": [2],
    "upsample_kernel_sizes": [4],
    "duration_predictor_filter_channels": 4,
    "prior_encoder_num_flows": 1,
    "prior_encoder_num_wavenet_layers": 1,
    "posterior_encoder_num_wavenet_layers": 1,
    "depth_separable_num_layers": 1,
    "duration_predictor_num_flows": 1,
}


def _vits_tokenizer(folder: Path, max_length: int):
    """A tokenizer whose tokens are letters; 0 is the padding, as in VITS."""
    import transformers

    path = folder / "vocab.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({c: i for i, c in enumerate("_ abcdefghijklmnopqrstuvwxyz'")}))
    tokenizer = transformers.VitsTokenizer(
        path, pad_token="_", unk_token=" ", add_blank=False, phonemize=False, model_max_length=max_length
    )
    path.unlink()
    return tokenizer


def reference_pipeline(folder: str | Path, **options: object):
    """diffusers' pipeline, its GPT-2 wrapped as a GPT2LMHeadModel, as current transformers requires."""
    import diffusers
    import transformers

    pipe = diffusers.AudioLDM2Pipeline.from_pretrained(str(folder), **options)
    if not isinstance(pipe.language_model, transformers.GPT2LMHeadModel):
        with torch.device("meta"):
            wrapper = transformers.GPT2LMHeadModel(pipe.language_model.config)
        wrapper.transformer = pipe.language_model
        wrapper.lm_head = torch.nn.Identity()  # the logits are not used
        pipe.language_model = wrapper
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_checkpoint(folder: str | Path, sizes: dict[str, dict] = SMALL, seed: int = 0) -> Path:
    """Write a checkpoint in the Hub's layout with diffusers and transformers; all parameters are random."""
    import diffusers
    import transformers

    folder = Path(folder)
    write_roberta_tokenizer(folder / "tokenizer")
    second = dict(sizes["text_encoder_2"])
    if second.pop("model_type", "t5") == "vits":
        tokenizer_2 = _vits_tokenizer(folder, sizes["projection_model"]["max_seq_length"])
        text_encoder_2 = transformers.VitsModel(transformers.VitsConfig(**second))
    else:
        write_t5_tokenizer(folder / "tokenizer_2")
        tokenizer_2 = load_tokenizer(folder / "tokenizer_2", "T5Tokenizer")
        text_encoder_2 = transformers.T5EncoderModel(transformers.T5Config(**second))
    text = sizes["text_encoder"]
    parts = {
        "vae": diffusers.AutoencoderKL(**sizes["vae"]),
        "text_encoder": transformers.ClapModel(
            transformers.ClapConfig(
                text_config=text["text_config"],
                audio_config=text["audio_config"],
                projection_dim=text["projection_dim"],
            )
        ),
        "text_encoder_2": text_encoder_2,
        "projection_model": diffusers.AudioLDM2ProjectionModel(**sizes["projection_model"]),
        "language_model": transformers.GPT2Model(transformers.GPT2Config(**sizes["language_model"])),
        "unet": diffusers.AudioLDM2UNet2DConditionModel(**sizes["unet"]),
        "vocoder": transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**sizes["vocoder"])),
    }
    for number, part in enumerate(parts.values()):
        randomize(part, seed=100 * seed + number)
    pipe = diffusers.AudioLDM2Pipeline(
        **parts,
        tokenizer=load_tokenizer(folder / "tokenizer", "RobertaTokenizer"),
        tokenizer_2=tokenizer_2,
        feature_extractor=transformers.ClapFeatureExtractor(**sizes["feature_extractor"]),
        scheduler=diffusers.DDIMScheduler(**sizes["scheduler"]),
    )
    pipe.save_pretrained(folder)
    return folder


class Both:
    """diffusers' pipeline and ours on one checkpoint, without progress bars."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.theirs = reference_pipeline(folder)
        self.ours = load_pipeline(folder)
        self._configs = self.theirs.scheduler.config, self.ours.scheduler.config

    def use(self, scheduler: str, **options: Any) -> None:
        """Give both pipelines a scheduler of that name, made from the checkpoint's config."""
        import diffusers

        theirs, ours = self._configs
        self.theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs, **options)
        self.ours.scheduler = getattr(audioldm2, scheduler).from_config(ours, **options)

    def run(self, generators: Callable[[], Any] = seeded, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        """Our result and theirs, from generators of the same seeds; three steps and 0.64 s by default."""
        arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.64, **arguments}
        theirs = self.theirs(generator=generators(), **arguments).audios
        ours = self.ours(generator=generators(), **arguments).audios
        return np.asarray(ours), np.asarray(theirs)

    def check(self, **arguments: Any) -> np.ndarray:
        """Check that both give the same waveforms, and return ours."""
        ours, theirs = self.run(**arguments)
        assert_same_sound(ours, theirs)
        return ours
