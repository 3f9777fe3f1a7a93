"""mindone without the models that are not used: importing the three that Stable Diffusion has takes a third of the time.

Importing any module of ``mindone.transformers`` or ``mindone.diffusers.models`` first runs the ``__init__`` of the
packages it is in, and these import every model there is, about a thousand modules, only to give their names a second
home. ``prepare()`` puts packages in place that do the same when they are asked: a name is fetched from the submodule
that ``__init__`` would import it from, and anything that is not found in this way makes the package run its whole
``__init__``, in itself. What is imported is mindone's own code in its own place, so a program that uses the rest of
mindone later gets all of it, with the same classes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
import types

__all__ = ["PACKAGES", "prepare"]

PACKAGES = (
    "mindone.transformers",
    "mindone.transformers.models",
    "mindone.peft",
    "mindone.peft.tuners",
    "mindone.diffusers.models.autoencoders",
    "mindone.diffusers.models.transformers",
    "mindone.diffusers.models.unets",
)
"""Packages whose ``__init__`` imports all their submodules and does nothing else."""

_lock = threading.RLock()


class _Package(types.ModuleType):
    """A package that imports its submodules when they are asked for."""

    def __getattr__(self, name: str):
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            own = self.__dict__
            if name in own:
                return own[name]
            if own["_ran"]:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            if name in own["_homes"]:
                home, original = own["_homes"][name]
                value = getattr(importlib.import_module(f"{self.__name__}.{home}"), original)
                setattr(self, name, value)
                return value
            if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
                return importlib.import_module(f"{self.__name__}.{name}")
            own["_ran"] = True  # before, as its own imports may ask for a name that is not there yet
            try:
                self.__spec__.loader.exec_module(self)
            except BaseException:
                own["_ran"] = False
                raise
            if name in own:
                return own[name]
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self):
        if not self.__dict__["_ran"]:
            getattr(self, "__all__", None)
        return sorted(self.__dict__)


def prepare() -> None:
    """Puts the quick packages in place, but for those that are imported already.

    Call it before the first import of a model of mindone. Where mindone is not as expected its packages are left as
    they are: imports are slower, nothing else.
    """
    with _lock:
        for name in PACKAGES:
            if name in sys.modules:
                continue
            parent, _, child = name.rpartition(".")
            try:
                spec = importlib.util.find_spec(name)  # imports the parents
                if name in sys.modules or spec is None or not spec.submodule_search_locations:
                    continue
                homes, constants = _contents(spec.loader.get_source(name))
            except (ImportError, AttributeError, OSError, SyntaxError, ValueError):
                continue
            module = importlib.util.module_from_spec(spec)
            module.__class__ = _Package
            module.__dict__.update(constants, _homes=homes, _ran=False)
            sys.modules[name] = module
            setattr(sys.modules[parent], child, module)


def _contents(source: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """What an ``__init__`` holds: where names come from, {name: (submodule, name there)}, and its text constants.

    Only what it imports from its submodules by name, without conditions; the rest needs the ``__init__`` to run.
    """
    homes, constants = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            for alias in node.names:
                if alias.name != "*":
                    homes[alias.asname or alias.name] = (node.module, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    constants[target.id] = node.value.value
    return homes, constants
