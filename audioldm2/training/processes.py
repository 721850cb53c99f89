"""Several processes that train together, one for each GPU, started by `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from audioldm2.extras import import_extra
from audioldm2.training.loop import Processes


def own_device() -> str:
    """The device of this process by default: its own GPU, or the CPU if there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def start_processes(device: torch.device) -> Processes:
    """Join the processes that `accelerate launch` has started, or be the only one.

    The processes hold the same weights and average their gradients.

    Args:
        device: of the model in this process.

    Raises:
        ImportError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    accelerate = import_extra("accelerate", "train", "training on several devices")
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")

    def average(gradients: Sequence[Tensor]) -> None:
        means = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        parts = means.split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))

    return Processes(
        accelerator.process_index, accelerator.num_processes, average, accelerator.wait_for_everyone
    )
