"""Audio input and output of the models.

- `log_mel`: the mel filter bank and two front ends, CLAP's (in dB) and AudioLDM's (natural logarithm).
- `resample`: conversion between sampling rates.
- `wav`: reading and writing WAV files.
- `spectrogram_image`: spectrograms as PNG files.
"""
