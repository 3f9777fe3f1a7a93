"""mindiffedit: DiffEdit (arXiv 2210.11427) on MindSpore, with the API of diffusers' pipeline.

Names are imported when first used, so that ``import mindiffedit`` and the command line's help stay quick.
"""

import os

__version__ = "0.1.0"

_HOMES = {
    "StableDiffusionDiffEditPipeline": "pipeline",
    "DiffEditInversionPipelineOutput": "outputs",
    "DiffEditOutput": "outputs",
    "EditReport": "outputs",
    "StableDiffusionPipelineOutput": "outputs",
    "DDIMScheduler": "solvers.schedulers",
    "DDIMInverseScheduler": "solvers.schedulers",
    "DPMSolverMultistepScheduler": "solvers.schedulers",
    "DPMSolverMultistepInverseScheduler": "solvers.schedulers",
    "Generator": "noise.generator",
    "InputError": "errors",
    "InputTypeError": "errors",
    "MaskOptions": "masks",
    "load_component": "checkpoints.models",
    "portable_kernels": "runtime.kernels",
    "AnimatedStrip": "images.strips",
    "PromptGenerator": "text.prompts",
    "Captioner": "text.prompts",
    "average_embeddings": "text.prompts",
    "load_image": "images.reading",
    "make_image_grid": "images.sheets",
}

__all__ = [*_HOMES, "__version__"]

__path__.append(os.path.join(os.path.dirname(__file__), "_moved"))


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'mindiffedit' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mindiffedit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
