"""Training: fine-tuning, and the loop, the losses and the data that every training shares.

    finetune.py     teaches a checkpoint's UNet new sounds, with the settings in options.py
    samples.py      sounds that are generated during a fine-tune
    table.py        tables of sound files and captions
    data.py         sound files and captions -> latents and conditions, kept by cache.py
    conditions.py   captions -> what the UNet attends to
    loop.py         the training loop, which can be killed and resumed
    processes.py    several processes that train together
    losses.py       the UNet's loss
    autoencoder.py, vocoder.py, clap.py, language.py    the losses of the other parts
    spectra.py      a loss for vocoders without a discriminator
    adversarial.py  what trainings with a discriminator share

`scripts/tiny` trains every part of the embedded checkpoint with the loop and the losses.
"""
