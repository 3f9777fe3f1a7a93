"""The program ``mindiffedit``; ``python -m mindiffedit`` is the same."""

import atexit
import gc
import os
import sys
import types

from mindiffedit.cli.command import main
from mindiffedit.runtime import quick_imports


def run() -> int:
    """``main`` in a process of its own, whose surroundings are ours to set; returns the exit code."""
    gc.disable()  # until everything is loaded: it would look for garbage among what only grows
    quick_imports.prepare_process(torch=sys.argv[1:3] == ["parity", "record"])
    code = main()
    gc.enable()
    return code


def program() -> int:
    """``run``, and the end of the process."""
    code = run()
    return _end(code) if "mindspore" in sys.modules else code


class _Idle(types.ModuleType):
    """A module that was not imported, for what would import it to end what it has not begun."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def _end(code: int) -> int:
    """Ends the process when its exit functions have run: MindSpore and Python take half a second to take all apart."""
    for name in ("mindspore.profiler", "mindspore.dataset.engine.iterators"):
        sys.modules.setdefault(name, _Idle(name))
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads, or a full disk: Python's own end has a word and an exit code for that
        return code
    os._exit(code)


if __name__ == "__main__":
    sys.exit(program())
