"""CLAP's loss: texts are pulled towards the sounds they describe and away from all others.

    loss = (CE(s_t E_text E_sound^T) + CE(s_a E_sound E_text^T)) / 2       (Wu et al. 2023, equation 1)

E are features of unit length, s the two learned scales (inverse temperatures), and CE the cross-entropy of
each row, whose right column is the one that belongs to the row. With more than one right column, all count
alike (Yang et al. 2022, "UniCL", equation 3).

transformers' `ClapModel(..., return_loss=True)` differs: both of its terms compare texts over all sounds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.models.clap import ClapModel

MAX_SCALE = 100.0  # Radford et al. 2021, section 2.5


def contrastive_loss(clap: ClapModel, text: Tensor, sound: Tensor, positives: Tensor | None = None) -> Tensor:
    """The mean of two cross-entropies: sounds over all texts, and texts that have a sound over all sounds.

    With several processes, gather the features of all before: the loss compares within the batch.

    Args:
        clap: supplies the two scales.
        text: text features, (T, P).
        sound: audio features, (B, P).
        positives: (T, B), whether text i fits sound j. Each sound has at least one text. By default, text i
            fits sound i alone, and T is B.

    Returns:
        A scalar.

    Raises:
        ValueError: `positives` has another shape, or is missing although T is not B.

    Example:
        >>> clap = ClapModel.from_pretrained("tiny", subfolder="text_encoder")
        >>> same = F.normalize(torch.randn(8, 64), dim=1)
        >>> bool(contrastive_loss(clap, same, same) < contrastive_loss(clap, same, same.flip(0)))
        True
    """
    shape = (len(text), len(sound))
    if positives is None:
        if shape[0] != shape[1]:
            raise ValueError(f"{shape[0]} texts and {shape[1]} sounds need positives, which say what fits")
        positives = torch.eye(shape[0], dtype=torch.bool, device=text.device)
    elif positives.shape != shape:
        raise ValueError(f"positives has shape {tuple(positives.shape)}; it must be (texts, sounds), {shape}")
    sounds_of_text, texts_of_sound = clap.logits(text, sound)
    has_sound = positives.any(dim=1)

    def error(logits: Tensor, positives: Tensor) -> Tensor:
        return F.cross_entropy(logits, positives / positives.sum(dim=1, keepdim=True))

    return (error(sounds_of_text[has_sound], positives[has_sound]) + error(texts_of_sound, positives.t())) / 2


@torch.no_grad()
def limit_scales(clap: ClapModel) -> None:
    """Keep the two scales from 1 to 100, in place; call it in each step.

    Without a limit a scale can grow until the loss is unstable (Radford et al. 2021, section 2.5).
    """
    for logarithm in (clap.logit_scale_a, clap.logit_scale_t):
        logarithm.clamp_(0.0, math.log(MAX_SCALE))
