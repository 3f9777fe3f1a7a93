"""mindone without the models that are not used, for our own command: a load of the demo takes 4 s less.

Importing any module of ``mindone.transformers`` or ``mindone.diffusers.models`` first runs the ``__init__`` of the
packages it is in, and these import every model there is, about a thousand modules, only to give their names a second
home. ``install()`` makes Python's imports put packages there that do the same when they are asked: a name is fetched
from the submodule that ``__init__`` would import it from, and anything that is not found in this way makes the package
run its whole ``__init__``, in itself. What is imported is mindone's own code in its own place.

Imports are the whole process's, so a library must not do this to its user's program: only the command does.
"""

from __future__ import annotations

import ast
import importlib
import sys
import threading
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

__all__ = ["PACKAGES", "install"]

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


def install() -> None:
    """Makes the packages quick that are not imported yet. Call it once, before MindSpore or mindone is imported."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        spec = PathFinder.find_spec(fullname, path) if fullname in PACKAGES else None
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a package without running its ``__init__``."""

    def __init__(self, original):
        self.original = original

    def create_module(self, spec):
        return _Package(spec.name)

    def exec_module(self, module):
        homes, constants = _contents(self.original.get_source(module.__name__))
        module.__dict__.update(constants, _homes=homes, _ran=False)
        module.__loader__ = module.__spec__.loader = self.original


class _Package(types.ModuleType):
    """A package that imports its submodules when they are asked for."""

    __spec__: Any

    def __getattr__(self, name: str):
        missing = AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise missing
        with _lock:
            if name not in self.__dict__ and not self.__dict__.get("_ran", True):
                if name in self._homes:
                    home, original = self._homes[name]
                    setattr(self, name, getattr(importlib.import_module(f"{self.__name__}.{home}"), original))
                elif find_spec(f"{self.__name__}.{name}") is not None:
                    setattr(self, name, importlib.import_module(f"{self.__name__}.{name}"))
                else:
                    self._run()
            if name not in self.__dict__:
                raise missing
            return self.__dict__[name]

    def __dir__(self):
        getattr(self, "__all__", None)
        return sorted(self.__dict__)

    def _run(self) -> None:
        self._ran = True  # before, as its own imports may ask for a name that is not there yet
        try:
            self.__spec__.loader.exec_module(self)
        except BaseException:
            self._ran = False
            raise


def _contents(source: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """What an ``__init__`` holds: where names come from, {name: (submodule, name there)}, and its text constants.

    Only what it imports from its submodules by name, without conditions; the rest needs the ``__init__`` to run.
    """
    homes, constants = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            names = (alias for alias in node.names if alias.name != "*")
            homes.update({alias.asname or alias.name: (node.module, alias.name) for alias in names})
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            constants.update({name: node.value.value for name in targets if isinstance(node.value.value, str)})
    return homes, constants
