"""mindiffedit: DiffEdit (arXiv 2210.11427) on MindSpore, with the API of diffusers' pipeline.

Names are imported when first used, so that ``import mindiffedit`` and the command line's help stay quick.
"""

__version__ = "0.1.0"

_HOMES = {
    "StableDiffusionDiffEditPipeline": "pipeline",
    "DiffEditInversionPipelineOutput": "outputs",
    "DiffEditOutput": "outputs",
    "EditReport": "outputs",
    "StableDiffusionPipelineOutput": "outputs",
    "DDIMScheduler": "schedulers",
    "DDIMInverseScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DPMSolverMultistepInverseScheduler": "schedulers",
    "Generator": "generator",
    "InputError": "errors",
    "InputTypeError": "errors",
    "MaskOptions": "masks",
    "load_component": "models",
    "portable_kernels": "kernels",
    "AnimatedStrip": "strips",
    "PromptGenerator": "prompts",
    "Captioner": "prompts",
    "average_embeddings": "prompts",
    "load_image": "reading",
    "make_image_grid": "pictures",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'mindiffedit' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mindiffedit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
