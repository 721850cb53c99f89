"""The samplers that turn noise into latents, and the table of the class names that a checkpoint may state."""

from audioldm2.schedulers.ddim import DDIMScheduler
from audioldm2.schedulers.dpm_solver import DPMSolverMultistepScheduler

SCHEDULERS: dict[str, type[DDIMScheduler] | type[DPMSolverMultistepScheduler]] = {
    "DDIMScheduler": DDIMScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
}

__all__ = ["SCHEDULERS", "DDIMScheduler", "DPMSolverMultistepScheduler"]
