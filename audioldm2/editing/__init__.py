"""Sound as input: variations, replacing parts, extending, and editing by inversion.

    sound.py        a caller's sounds -> waveforms at the checkpoint's rate -> latents
    variation.py    noisy latents to begin with, in the middle of a sampling run (SDEdit)
    regions.py      spans in seconds and bands in hertz -> which latents and samples are replaced
    inpainting.py   keeps the other latents during a run, and the original waveform afterwards
    extending.py    continues a sound past its end, window by window
    inversion.py    from a sound to the sampling run that generates it
    checks.py       what can be checked without the sound
    edit.py         what a caller asks for, checked
    sources.py      what a generation begins with: noise, sounds, or inverted sounds
    methods.py      the pipeline's methods `invert` and `blend`
    generations.py  generations that invert sounds or blend prompts first, for commands, batches and the page

All but the last three work on plain tensors, and all but the inversion on any sampler with diffusers'
interface.
"""
