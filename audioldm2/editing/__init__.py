"""Sound as input: variation, and replacing parts of a sound.

    sound.py        a caller's sounds -> waveforms at the checkpoint's rate -> latents
    variation.py    noisy latents to begin with, in the middle of a sampling run (SDEdit)
    regions.py      spans in seconds and bands in hertz -> which latents and samples are replaced
    inpainting.py   keeps the other latents during a run, and the original waveform afterwards
    checks.py       what can be checked without the sound
    edit.py         what a caller asks for, checked

All of them work on plain tensors and on any sampler with diffusers' interface.
"""
