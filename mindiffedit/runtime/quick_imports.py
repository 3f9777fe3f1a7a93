"""MindSpore, mindone and what they import without the parts that are not used, for our own command.

Importing one module first runs the ``__init__`` of the packages it is in, and many of these import all that there is,
thousands of modules here, to give their names a second home. ``install()`` makes Python's imports put packages there
that do the same when they are asked: a name is fetched from the submodule that ``__init__`` would import it from, and
anything that is not found in this way makes the package run its whole ``__init__``, in itself. What is imported is the
libraries' own code in its own place.

Imports are the whole process's. So the command does this with all of ``PACKAGES``; in its user's program the library
does it with mindone's alone, while it imports what it needs (``quickly``), and a package that completes itself is an
ordinary module from then on.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable, Collection, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["MINDONE", "PACKAGES", "complete_for", "import_beside", "install", "prepare_process", "quickly"]

PACKAGES: dict[str, tuple[str, ...]] = {
    "mindone": (),
    "mindone.diffusers.models.autoencoders": (),
    "mindone.diffusers.models.transformers": (),
    "mindone.diffusers.models.unets": (),
    "mindone.peft": (),
    "mindone.peft.tuners": (),
    "mindone.transformers": (),
    "mindone.transformers.models": (),
    "mindspore": ("amp", "dataset", "mindrecord", "onnx", "profiler", "rewrite", "safeguard", "train"),
    "mindspore.boost": (),
    "mindspore.dataset": (),
    "mindspore.dataset.vision": (),
    "mindspore.nn": ("metrics",),
    "mindspore.ops._op_impl": ("aicpu",),
    "mindspore.train": (),
    "mindspore.train.callback": (),
    "mindspore.train.metrics": (),
    "scipy.integrate": (),
    "scipy.io": (),
    "scipy.linalg": (),
    "scipy.optimize": (),
    "scipy.stats": (),
    "transformers": (),
    "transformers.models": (),
}
"""Packages, and the submodules that their ``__init__`` imports only when asked; where none is named, it does not run.

``mindspore.ops._op_impl.aicpu`` registers operators of Ascend, for which nobody asks: see ``complete_for``.
"""

_lock = threading.RLock()


MINDONE = frozenset(name for name in PACKAGES if name.startswith("mindone."))
"""Those of mindone."""


def install(packages: Collection[str] = MINDONE) -> None:
    """Makes the packages quick that are not imported yet. Call it once, before MindSpore or mindone is imported."""
    sys.meta_path.insert(0, _Finder(packages))


def prepare_process(torch: bool = False) -> None:
    """What a process of our own begins with; one that needs ``torch`` gets all packages as they come."""
    if not torch:
        # Where torch is installed, transformers would import it, for seconds; only its tokenizer is used here.
        os.environ.setdefault("USE_TORCH", "0")
        if not os.environ.get("MS_PROFILER_OPTIONS"):  # the profiler that these are for is in what is left out
            install(PACKAGES)
    # MindSpore's warnings are for its developers, and the others' are advice to install torch.
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DIFFUSERS_NO_ADVISORY_WARNINGS", "1")


@contextlib.contextmanager
def quickly():
    """mindone's packages are quick if they are first imported within the block."""
    finder = _Finder(MINDONE)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def import_beside() -> None:
    """Imports what does without MindSpore while the system opens MindSpore's libraries, which takes as long.

    Nothing unless all packages are quick. What fails here is imported, and fails, where it is needed.
    """
    if "mindspore" not in sys.modules and any(
        getattr(finder, "packages", None) is PACKAGES for finder in sys.meta_path
    ):
        _import(*_EXTENSIONS)
        threading.Thread(target=_open_libraries).start()
        _import(*_WITHOUT_MINDSPORE)


def _import(*names: str) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


_EXTENSIONS = (
    *("asyncio", "csv", "queue", "ssl", "unicodedata", "uuid"),
    *("charset_normalizer", "markupsafe", "regex", "tokenizers", "yaml"),
)
"""Modules with libraries that those below import: the system opens one library at a time."""

_WITHOUT_MINDSPORE = (
    "huggingface_hub.utils",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.auto.image_processing_auto",
)


def _open_libraries() -> None:
    spec = find_spec("mindspore")
    if spec is None or spec.origin is None or os.name != "posix":
        return
    open_library = ctypes.CDLL(None).dlopen  # called so, unlike by an import, other threads go on
    open_library.argtypes, open_library.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for name in ("_c_expression", "_c_dataengine"):
        for path in Path(spec.origin).parent.glob(f"{name}.*.so"):
            open_library(os.fsencode(path), sys.getdlopenflags())


def complete_for(device: str) -> None:
    """Registers what operators of this device need; call it before one runs."""
    if device.strip().upper() != "CPU":
        importlib.import_module("mindspore.ops._op_impl.aicpu")


class _Finder(MetaPathFinder):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path, target=None):
        kind: Callable[[Any], Loader] | None = None
        if fullname in self.packages:
            kind = _PackageLoader
        elif fullname in _PATCHES and self.packages is PACKAGES:
            kind = _PatchedLoader
        spec = None if kind is None else PathFinder.find_spec(fullname, path)
        if kind is not None and spec is not None:
            spec.loader = kind(spec.loader)
        return spec


# --- packages ------------------------------------------------------------------------------------------------------


class _PackageLoader(Loader):
    """Loads a package without running its ``__init__``, or without a part of it."""

    def __init__(self, original):
        self.original = original

    def create_module(self, spec):
        return _Package(spec.name)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.original
        name = module.__name__
        contents = _Contents(name, ast.parse(self.original.get_source(name)).body, PACKAGES[name])
        module.__dict__.update(contents.constants, _homes=contents.homes, _stars=contents.stars, _ran=True)
        if PACKAGES[name]:
            exec(compile(ast.Module(contents.rest, []), module.__spec__.origin, "exec"), module.__dict__)
        module._ran = False


class _Package(types.ModuleType):
    """A package that imports its submodules when they are asked for."""

    __spec__: Any
    _homes: Any = {}
    _stars: Any = ()
    _ran = True

    def __getattr__(self, name: str):
        missing = AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        # MindSpore asks a package for "_" where it wants the package itself.
        if name == "_" or name.startswith("__") and name not in ("__all__", "__version__"):
            raise missing
        if name == "__all__" or not self._find(name):
            self._run()
        if name in self.__dict__:
            return self.__dict__[name]
        if "_instead" not in self.__dict__:
            raise missing
        return getattr(self.__dict__["_instead"], name)

    def __dir__(self):
        getattr(self, "__all__", None)
        instead = self.__dict__.get("_instead")
        return sorted(self.__dict__ if instead is None else {*self.__dict__, *dir(instead)})

    def _find(self, name: str) -> bool:
        """Whether a name, or a submodule, was found without ``__init__``, and is here now."""
        if not self._find_imported(name) and find_spec(f"{self.__name__}.{name}") is not None:
            setattr(self, name, importlib.import_module(f"{self.__name__}.{name}"))
        return name in self.__dict__

    def _find_imported(self, name: str) -> bool:
        """The same of a name that ``__init__`` imports."""
        if name in self._homes:
            home, original = self._homes[name]
            setattr(self, name, getattr(importlib.import_module(home), original))
            return True
        for star in self._stars:
            # Names of transformers' models begin with the model's.
            if star in PACKAGES or name.lower().startswith(star.rpartition(".")[2].replace("_", "")):
                home = importlib.import_module(star)
                if home._find_imported(name) if isinstance(home, _Package) else hasattr(home, name):
                    setattr(self, name, getattr(home, name))
                    return True
        return False

    def _run(self) -> None:
        """Runs the whole ``__init__``, once."""
        with _lock:
            if self._ran:
                return
            self._ran = True  # before, as its own imports may ask for a name that is not there yet
            try:
                self.__spec__.loader.exec_module(self)
            except BaseException:
                self._ran = False
                raise
        if sys.modules[self.__name__] is not self:  # transformers puts an object of another class there
            self._instead, sys.modules[self.__name__] = sys.modules[self.__name__], self
        else:
            for name in ("_homes", "_stars", "_ran"):
                del self.__dict__[name]
            setattr(self, "__class__", types.ModuleType)  # noqa: B010 (a type checker knows one class)


class _Contents:
    """What the statements of an ``__init__`` are.

    Args:
        package, statements: the package, and its ``__init__``.
        later: its submodules that are imported only when asked; none means all.

    Attributes:
        homes: where names come from that are imported only when asked, {name: (module, name there)}.
        stars: modules all of whose names are.
        constants: its text constants.
        rest: statements to run at once.
    """

    def __init__(self, package: str, statements: list[ast.stmt], later: tuple[str, ...]):
        self.homes: dict[str, tuple[str, str]] = {}
        self.stars: list[str] = []
        self.constants: dict[str, str] = {}
        self.rest: list[ast.stmt] = []
        for node in statements:
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                typed = _Contents(package, node.body, later)  # what a package of transformers only says to checkers
                self.homes.update(typed.homes)
                self.stars += typed.stars
            elif isinstance(node, ast.ImportFrom):
                self._take_import(node, _home(node, package), package, later)
                continue
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, str):
                    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                    self.constants.update(dict.fromkeys(names, node.value.value))
            if not any(isinstance(part, ast.Name) and part.id == "__all__" for part in ast.walk(node)):
                self.rest.append(node)

    def _take_import(self, node: ast.ImportFrom, home: str | None, package: str, later: tuple[str, ...]) -> None:
        if home == package:  # submodules by name
            names = [alias for alias in node.names if alias.name not in later]
            if names:
                self.rest.append(ast.copy_location(ast.ImportFrom(node.module, names, node.level), node))
        elif home is None or later and home.removeprefix(f"{package}.").partition(".")[0] not in later:
            self.rest.append(node)
        elif node.names[0].name == "*":
            self.stars.append(home)
        else:
            self.homes.update({alias.asname or alias.name: (home, alias.name) for alias in node.names})


def _home(node: ast.ImportFrom, package: str) -> str | None:
    """The package, or the submodule of it, that a statement imports from; None for any other."""
    if node.level == 1:
        return f"{package}.{node.module}" if node.module else package
    if node.level == 0 and node.module and f"{node.module}.".startswith(f"{package}."):
        return node.module
    return None


# --- what modules compute while they are imported ------------------------------------------------------------------


class _PatchedLoader(Loader):
    """Loads a module while a slow function that it calls is another."""

    def __init__(self, original):
        self.original = original

    def create_module(self, spec):
        return self.original.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.original
        home, name, replacement = _PATCHES[module.__name__]
        owner = importlib.import_module(home)
        before = getattr(owner, name)
        setattr(owner, name, functools.partial(replacement, before))
        try:
            self.original.exec_module(module)
        finally:
            setattr(owner, name, before)


class _Later(Mapping):
    """A mapping that is made when it is asked."""

    def __init__(self, make: Callable[[], Mapping]):
        self._make = make

    @functools.cached_property
    def _made(self) -> Mapping:
        return self._make()

    def __getitem__(self, key):
        return self._made[key]

    def __iter__(self):
        return iter(self._made)

    def __len__(self):
        return len(self._made)


_PATCHES: dict[str, tuple[str, str, Callable]] = {
    # Which distribution each package on this machine is from: it reads the list of files of every distribution.
    "mindone.diffusers.utils.import_utils": ("importlib.metadata", "packages_distributions", _Later),
    # transformers itself, imported a second time.
    "transformers.processing_utils": (
        "transformers.utils",
        "direct_transformers_import",
        lambda original, path: sys.modules["transformers"],
    ),
}
"""Modules, and for each a function that it calls when imported: its module, its name, and what is called instead.

That is called with the function and its arguments.
"""
