"""The sizes of the tiny checkpoint's parts; the keys are those of the Hub's config.json files."""

from __future__ import annotations

from typing import Any

from scripts.sizes import BASE

HOP = 512  # samples from one frame of the log-mel pictures to the next, 32 ms
TOKENS = (64, 48)  # that the two tokenizers read at most
VOCABULARIES = (600, 400)  # and their sizes, at most

# One latent stands for 4 frames (128 ms) by 4 mel bands, so 5.12 s are 40 x 16 latents, less than a third of
# what a checkpoint of the Hub has. That, more than anything else, is what makes training here quick.
SIZES: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "projection_dim": 64,
        "text_config": {
            "vocab_size": VOCABULARIES[0],
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": TOKENS[0] + 2,
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
        "vocab_size": VOCABULARIES[1],
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
        "scaling_factor": 1.0,  # train_vae.py standardises the latents
    },
    "vocoder": {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        # Three ramps a mel band, and no bend in them: see oscillators.py.
        "upsample_initial_channel": 192,
        "leaky_relu_slope": 0.0,
        "upsample_rates": [16, 8, 4],  # HOP
        "upsample_kernel_sizes": [32, 48, 24],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "normalize_before": False,
    },
}
# CLAP's front end: no resampling, a window that holds a clip of 5.12 s, and the 256 frames of its picture.
FEATURES: dict[str, Any] = {
    "sampling_rate": 16000,
    "hop_length": 376,
    "max_length_s": 6,
    "fft_window_size": 1024,
    "frequency_min": 50,
    "frequency_max": 8000,
    "truncation": "rand_trunc",
    "padding": "repeatpad",
}
# With the Hub's schedule a trace of the sound is left in the noise of the last timestep, and a UNet learns to
# read the loudness there; sampling begins without it, and soft and loud sounds come out the same. So the last
# level is noise alone, and every walk begins there (Lin et al. 2024, arXiv 2305.08891, sections 3.1 and 3.3).
SCHEDULER: dict[str, Any] = {
    **BASE["scheduler"],
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
