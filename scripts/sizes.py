"""The sizes of the real checkpoints, by part; the keys are those of the Hub's config.json files."""

from __future__ import annotations

from typing import Any


def changed(sizes: dict[str, dict[str, Any]], **parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sizes with some keys of some parts replaced."""
    return {name: {**config, **parts.get(name, {})} for name, config in sizes.items()}


# cvssp/audioldm2 and cvssp/audioldm2-music.
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
# cvssp/audioldm2-large.
LARGE = changed(
    BASE,
    unet={"cross_attention_dim": [[None, 768, 1024, None]] * 4, "transformer_layers_per_block": 2},
)
