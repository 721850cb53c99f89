"""Build a tiny AudioLDM 2 checkpoint with random weights, in the Hub's layout, with this package alone.

It has every part that the real one has, hundreds of times smaller: 64 mels, 16 kHz and a hop of 160 samples
as there, so lengths of sound mean what they mean there. The weights are random, so the sound is noise-like
and says nothing of the prompt. It is for trying out and testing all that surrounds the weights.
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
from audioldm2.audio.log_mel import ClapFeatureExtractorConfig
from audioldm2.checkpoints.formats import PARTS
from scripts.random_tokenizers import write_roberta_tokenizer, write_t5_tokenizer
from scripts.sizes import BASE

MEL_WIDTH = 64
# The keys are those of the Hub's config.json files; what is not named is as its stage has it.
SIZES: dict[str, dict[str, Any]] = {
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
        "model_in_dim": MEL_WIDTH,
        "sampling_rate": 16000,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "normalize_before": False,
    },
}
LOUDNESS = 4.0  # random weights make a sound that is faint; this far it does not clip


def draw_weights(stage: nn.Module, generator: torch.Generator) -> None:
    """Random matrices and kernels that keep the scale of what passes through; gains are 1, biases 0."""
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
    sizes: Mapping[str, dict[str, Any]],
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    limits: tuple[int, int] = (64, 32),
) -> int:
    """Write a checkpoint with random weights into `folder`, which is made where missing.

    Args:
        folder: files of its own there are replaced.
        sizes: by part, as in `SIZES`.
        seed: of the weights.
        device: where they are drawn.
        dtype: in which they are written.
        limits: tokens that the two tokenizers read.

    Returns:
        The number of weights.
    """
    import transformers

    folder = Path(folder)
    generator = torch.Generator(device).manual_seed(seed)
    stages = {}
    for part, (form, *_) in PARTS.items():
        with torch.device("meta"):
            stage = form.stage(form.config.from_dict(sizes[part]))
        stages[part] = stage.to_empty(device=device).eval()
        draw_weights(stages[part], generator)
    stages["vocoder"].conv_out.weight.data *= LOUDNESS
    write_roberta_tokenizer(folder / "tokenizer", max_length=limits[0])
    write_t5_tokenizer(folder / "tokenizer_2", max_length=limits[1])
    AudioLDM2Pipeline(
        **stages,
        tokenizer=transformers.RobertaTokenizerFast.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        feature_extractor=ClapFeatureExtractor(
            ClapFeatureExtractorConfig.from_dict(BASE["feature_extractor"])
        ),
        scheduler=DDIMScheduler(**BASE["scheduler"]),
    ).to(dtype).save_pretrained(folder)
    return sum(parameter.numel() for stage in stages.values() for parameter in stage.parameters())


def write_small_checkpoint(folder: str | Path, seed: int = 0) -> int:
    """Write the tiny checkpoint into `folder`. Returns the number of weights."""
    return write_random_checkpoint(folder, SIZES, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python scripts/random_checkpoint.py out/tiny-checkpoint\n"
        '  audioldm2 "A dog barks" -o dog.wav --model out/tiny-checkpoint',
    )
    parser.add_argument("folder", type=Path, help="where to write it; files of its own there are replaced")
    parser.add_argument("--seed", type=int, default=0, help="other weights, another noise (%(default)s)")
    options = parser.parse_args()
    count = write_small_checkpoint(options.folder, options.seed)
    print(
        f"{options.folder}: {count:,} random weights (seed {options.seed}); the sound that they make is "
        "noise-like and says nothing of the prompt"
    )


if __name__ == "__main__":
    main()
