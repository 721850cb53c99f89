"""Audio input and output of the models.

- `mel`: the mel filter bank and mel spectrograms.
- `clap_features`: CLAP's front end, in decibels.
- `log_mel`: AudioLDM's front end, the natural logarithm.
- `resample`: conversion between sampling rates.
- `wav`: reading and writing WAV files.
- `decibels`: spectrograms for the plots that `audioldm2.plots` draws.
"""
