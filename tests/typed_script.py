"""A user's script, for mypy alone: the package's types, and mistakes that they show.

`scripts/test` runs mypy on it. A mistake that is not found is an error, too, as its `type: ignore` is unused.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import assert_type

from audioldm2 import (
    GPT2,
    VAE,
    AudioLDM2Pipeline,
    AudioPipelineOutput,
    DPMSolverMultistepScheduler,
    UNet,
    read_wav,
)

pipe = AudioLDM2Pipeline.from_pretrained("tiny", torch_dtype=torch.float32, device="cpu")
assert_type(pipe, AudioLDM2Pipeline)
assert_type(pipe.to("cpu"), AudioLDM2Pipeline)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
assert_type(pipe("rain"), AudioPipelineOutput)
assert_type(pipe("rain").sampling_rate, int)
assert_type(pipe("rain", guidance_scale=2.0, return_dict=False)[0], Any)
states, mask, vectors = pipe.encode_prompt("rain", do_classifier_free_guidance=False)
assert_type(states, torch.Tensor)
waveform, rate = read_wav("rain.wav")
assert_type(pipe.decode_latents(pipe.encode_audio(waveform, rate)), torch.Tensor)

unet = UNet.from_pretrained("tiny", subfolder="unet")
assert_type(unet, UNet)
assert_type(unet.config.in_channels, int)
assert_type(unet.dtype, torch.dtype)
assert_type(VAE.from_pretrained("tiny", "vae").decode(torch.zeros(1, 8, 4, 16)), torch.Tensor)
assert_type(GPT2.from_pretrained("tiny", "language_model").generate(vectors), torch.Tensor)


class Mine(UNet):
    pass


assert_type(Mine.from_pretrained("tiny", subfolder="unet"), Mine)

# --- mistakes

pipe(prompt=3)  # type: ignore[arg-type]
pipe("rain", guidance=2)  # type: ignore[call-arg]
pipe("rain").audio  # type: ignore[attr-defined]  # noqa: B018
pipe("rain", callback=3)  # type: ignore[arg-type]
UNet.from_pretrained("tiny", subfolder=1)  # type: ignore[arg-type]
