"""mindone's schedulers with the reference's exact tables, and the plans of the compiled step.

Here are the solvers that the command line names; MindSpore is imported when one is made.
"""

from mindiffedit.solvers import schedules
from mindiffedit.solvers.schedules import CLASSES

SOLVERS = tuple(CLASSES)
"""The names of the solvers that have an inverse."""


def inverse_name(class_name: str) -> str:
    """Class name of a scheduler's inverse, or of DDIM's where it has none (W14)."""
    return dict(CLASSES.values()).get(class_name, CLASSES["ddim"][1])


def solver_name(scheduler) -> str | None:
    """The name of a scheduler that has an inverse; None of any other."""
    return next((name for name, (forward, _) in CLASSES.items() if forward == type(scheduler).__name__), None)


def made(name: str, config, as_there: bool):
    """A solver and its inverse.

    Args:
        name: one of ``SOLVERS``.
        config: of the model's own scheduler.
        as_there: whether its options are taken as they are, as diffusers' ``from_config`` does; otherwise as
            ``schedules.suited`` has them.

    Raises:
        InputError: the configuration is for models that neither solver can run.
    """
    from mindiffedit.solvers import schedulers

    forward, inverse = CLASSES[name]
    options = {} if as_there else schedules.suited(forward, config)
    return tuple(getattr(schedulers, one).from_config(config, **options) for one in (forward, inverse))
