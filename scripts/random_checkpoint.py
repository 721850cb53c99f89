"""Write a checkpoint with random weights in the Hub's layout, using nothing but this package.

It has every part of a real checkpoint, hundreds of times smaller: 64 mel bands, 16 kHz and a hop of 160
samples as in the real ones, so durations mean the same. With random weights the sound is noise-like and
unrelated to the prompt. Use it to try out and test everything around the weights: loading, saving, devices,
schedulers, speed and memory. (The checkpoint called "tiny" is another one: trained, and part of the
package.)
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file from a checkout, which need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from audioldm2 import AudioLDM2Pipeline, ClapFeatureExtractor, DDIMScheduler
from audioldm2.audio.clap_features import ClapFeatureExtractorConfig
from audioldm2.checkpoints.folder import load_tokenizer
from audioldm2.checkpoints.formats import PARTS
from scripts.random_tokenizers import write_roberta_tokenizer, write_t5_tokenizer

# cvssp/audioldm2 and cvssp/audioldm2-music, by part; the keys are those of the Hub's config.json files.
BASE: dict[str, dict[str, Any]] = {
    "vae": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [128, 256, 512],
        "layers_per_block": 2,
        "latent_channels": 8,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.41,
    },
    "text_encoder": {
        "projection_dim": 512,
        "text_config": {},
        "audio_config": {
            "patch_embeds_hidden_size": 128,
            "hidden_size": 1024,
            "depths": [2, 2, 12, 2],
            "num_attention_heads": [4, 8, 16, 32],
        },
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "feed_forward_proj": "gated-gelu",
    },
    "projection_model": {"text_encoder_dim": 512, "text_encoder_1_dim": 1024, "langauge_model_dim": 768},
    "language_model": {"max_new_tokens": 8},
    "unet": {
        "sample_size": 256,
        "in_channels": 8,
        "out_channels": 8,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
        "block_out_channels": [128, 256, 384, 640],
        "layers_per_block": 2,
        "cross_attention_dim": [[None, 768, 1024]] * 4,
        "attention_head_dim": [4, 8, 12, 20],
    },
    "vocoder": {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        "upsample_initial_channel": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "normalize_before": False,
    },
    "feature_extractor": {"truncation": "rand_trunc", "padding": "repeatpad", "frequency_max": 14000},
    "scheduler": {
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}


def changed(sizes: dict[str, dict[str, Any]], **parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A copy of `sizes` with some keys of some parts replaced."""
    return {name: {**config, **parts.get(name, {})} for name, config in sizes.items()}


# cvssp/audioldm2-large.
LARGE = changed(
    BASE,
    unet={"cross_attention_dim": [[None, 768, 1024, None]] * 4, "transformer_layers_per_block": 2},
)
# The small random checkpoint. Whatever is not named has the default of its stage.
SMALL_RANDOM: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "projection_dim": 32,
        "text_config": {
            "vocab_size": 400,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 66,
        },
        "audio_config": {
            "patch_embeds_hidden_size": 8,
            "hidden_size": 64,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
    },
    "text_encoder_2": {
        "vocab_size": 160,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "projection_model": {"text_encoder_dim": 32, "text_encoder_1_dim": 32, "langauge_model_dim": 24},
    "language_model": {"n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 4, "max_new_tokens": 8},
    "unet": {
        "sample_size": 256,
        "in_channels": 8,
        "out_channels": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 32, 48],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": [[None, 24, 32]] * 3,
        "attention_head_dim": [2, 4, 6],
    },
    "vae": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "sample_size": 1024,
        "scaling_factor": 0.4,
    },
    "vocoder": {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "normalize_before": False,
    },
}
OUTPUT_GAIN = 4.0  # for the vocoder's last layer: random weights sound faint; with 4 nothing clips yet


def draw_weights(stage: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices and kernels, in place, that keep the scale of activations; gains are 1, biases 0."""
    tensors = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.dim() >= 2:
                tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
            elif name.rsplit(".", 1)[-1] in ("weight", "scale", "running_var", "logit_scale"):
                tensor.fill_(1.0)
            else:
                tensor.zero_()


def write_random_checkpoint(
    folder: str | Path,
    sizes: Mapping[str, dict[str, Any]] = SMALL_RANDOM,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    limits: tuple[int, int] = (64, 32),
) -> int:
    """Write a checkpoint with random weights, loadable by this package and by diffusers.

    Args:
        folder: created if missing; its files of the same names are replaced.
        sizes: configs by part: `SMALL_RANDOM`, `BASE`, `LARGE` or others like them.
        seed: of the weights.
        device: where the weights are drawn. Another device draws other weights.
        dtype: of the written weights.
        limits: maximum number of tokens of CLAP's and T5's tokenizer.

    Returns:
        The number of weights.
    """
    folder = Path(folder)
    generator = torch.Generator(device).manual_seed(seed)
    stages = {}
    for part, (form, *_) in PARTS.items():
        with torch.device("meta"):
            stage = form.stage(form.config.from_dict(sizes[part]))
        stages[part] = stage.to_empty(device=device).eval()
        draw_weights(stages[part], generator)
    stages["vocoder"].conv_out.weight.data *= OUTPUT_GAIN
    write_roberta_tokenizer(folder / "tokenizer", max_length=limits[0])
    write_t5_tokenizer(folder / "tokenizer_2", max_length=limits[1])
    AudioLDM2Pipeline(
        **stages,
        tokenizer=load_tokenizer(folder / "tokenizer", "RobertaTokenizer"),
        tokenizer_2=load_tokenizer(folder / "tokenizer_2", "T5Tokenizer"),
        feature_extractor=ClapFeatureExtractor(
            ClapFeatureExtractorConfig.from_dict(BASE["feature_extractor"])
        ),
        scheduler=DDIMScheduler(**BASE["scheduler"]),
    ).to(dtype).save_pretrained(folder)
    return sum(parameter.numel() for stage in stages.values() for parameter in stage.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python scripts/random_checkpoint.py out/random-checkpoint\n"
        '  audioldm2 "A dog barks" -o dog.wav --model out/random-checkpoint',
    )
    parser.add_argument("folder", type=Path, help="where to write it; existing files are replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default %(default)s)")
    options = parser.parse_args()
    count = write_random_checkpoint(options.folder, seed=options.seed)
    print(
        f"{options.folder}: {count:,} random weights (seed {options.seed}); the sound is noise-like and "
        "unrelated to the prompt"
    )


if __name__ == "__main__":
    main()
