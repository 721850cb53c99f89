"""Measures of quality, for anybody's sounds: docs/metrics.md explains them.

    evaluation.py   all figures at once, of lists of sounds; `audioldm2 evaluate` prints them
    clap.py         embeddings of sounds and texts by a checkpoint's own CLAP, and CLAP scores
    distances.py    between sets of embeddings: Fréchet and kernel distance, and their spreads
    spectra.py      log-mel distance between sounds that should be the same

Sounds are tensors, arrays, or paths of files, of any sampling rate; embeddings are tensors (N, P).
"""

from audioldm2.metrics.clap import (
    ClapScorer as ClapScorer,
    clap_scores as clap_scores,
    embed_sounds as embed_sounds,
    embed_texts as embed_texts,
)
from audioldm2.metrics.distances import (
    Figure as Figure,
    frechet_distance as frechet_distance,
    frechet_spread as frechet_spread,
    halves as halves,
    kernel_distance as kernel_distance,
    kernel_spread as kernel_spread,
)
from audioldm2.metrics.evaluation import Evaluation as Evaluation, evaluate as evaluate
from audioldm2.metrics.spectra import (
    log_mel_distance as log_mel_distance,
    spectrogram_distance as spectrogram_distance,
)
