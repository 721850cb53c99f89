"""The sizes of the tiny checkpoint's parts, under the keys of the Hub's config.json files."""

from __future__ import annotations

from typing import Any

from scripts.random_checkpoint import BASE

HOP_LENGTH = 512  # samples between two frames of a log-mel spectrogram: 32 ms
MAX_TOKENS = (64, 48)  # the longest prompts of the two tokenizers
VOCABULARY_SIZES = (600, 400)  # of the two tokenizers, at most

# One cell of the latents covers 4 frames (128 ms) by 4 mel bands, so a clip of 5.12 s has 40 x 16 cells, less
# than a third of what a checkpoint from the Hub has. This is the main reason why training here is fast.
TINY: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "projection_dim": 64,
        "text_config": {
            "vocab_size": VOCABULARY_SIZES[0],
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": MAX_TOKENS[0] + 2,
        },
        "audio_config": {
            "spec_size": 128,
            "num_mel_bins": 64,
            "window_size": 4,
            "patch_size": 8,
            "patch_stride": [8, 8],
            "patch_embeds_hidden_size": 40,
            "hidden_size": 160,
            "depths": [2, 2, 2],
            "num_attention_heads": [4, 4, 8],
            "mlp_ratio": 2.0,
        },
    },
    "text_encoder_2": {
        "vocab_size": VOCABULARY_SIZES[1],
        "d_model": 96,
        "d_kv": 24,
        "d_ff": 192,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "projection_model": {"text_encoder_dim": 64, "text_encoder_1_dim": 96, "langauge_model_dim": 128},
    "language_model": {
        "vocab_size": 8,
        "n_positions": 128,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 256,
        "max_new_tokens": 8,
    },
    "unet": {
        "sample_size": 40,
        "in_channels": 8,
        "out_channels": 8,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "block_out_channels": [32, 48, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": [[None, 128, 96]] * 3,
        "attention_head_dim": [2, 2, 4],
    },
    "vae": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [12, 24, 40],
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 2,
        "sample_size": 160,
        "scaling_factor": 1.0,  # the VAE's latents are standardized instead
    },
    "vocoder": {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        # Three ramps per mel band, and plain ReLUs: see stages/oscillators.py.
        "upsample_initial_channel": 192,
        "leaky_relu_slope": 0.0,
        "upsample_rates": [16, 8, 4],  # their product is HOP_LENGTH
        "upsample_kernel_sizes": [32, 48, 24],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "normalize_before": False,
    },
}
# CLAP's front end: no resampling, a window longer than a clip of 5.12 s, and a spectrogram of 256 frames.
FEATURE_EXTRACTOR: dict[str, Any] = {
    "sampling_rate": 16000,
    "hop_length": 376,
    "max_length_s": 6,
    "fft_window_size": 1024,
    "frequency_min": 50,
    "frequency_max": 8000,
    "truncation": "rand_trunc",
    "padding": "repeatpad",
}
# With the Hub's schedule the last timestep is not pure noise: a trace of the sound is left, and the UNet
# learns to read the loudness from it. Sampling starts without that trace, so soft and loud sounds come out
# the same. Here the last timestep is pure noise, and every sampling run starts there (Lin et al. 2024, arXiv
# 2305.08891, sections 3.1 and 3.3).
SCHEDULER: dict[str, Any] = {
    **BASE["scheduler"],
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}

# The arguments of the pipeline's call that the checkpoint recommends, for DPM-Solver++, its sampler.
RECOMMENDED: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}
