"""Sound on its way in and out of the models.

- `log_mel`: the mel filter bank and the two front ends on it, CLAP's (dB) and AudioLDM's own (log).
- `resample`: a waveform at another sampling rate.
- `wav`: reading and writing WAV files.
- `spectrogram_image`: a picture of a sound, for the eye.
"""
