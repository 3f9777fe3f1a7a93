from mindiffedit.solvers.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    inverse_of,
)

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "inverse_of",
]
