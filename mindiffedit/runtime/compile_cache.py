"""Compiled graphs kept on disk: the second process does not compile what the first one has compiled.

MindSpore can write the graph that its front end made of a function, and read it again in place of parsing,
inferring and optimising, which is where most of the 10 to 60 s of a first call go. Used as it is documented this is
not safe, so this module stands between the two. What MindSpore 2.8 does, as seen on a CPU:

- One folder for the process, fixed at the first use. Files are called ``compile_cache_N``, N counting the cached
  compilations of the process: in another order, or with another model, one function silently gets the graph of
  another. Nothing but the text of the entry script and its imports is compared.
- After one miss no later graph of the process is looked for, unless ``MS_DEV_FORCE_USE_COMPILE_CACHE`` is set; it is
  read at every compilation.
- Weights are stored by name, shape and dtype, without values. For a function over a closure nobody gives them their
  values again, and the graph computes with uninitialised memory; ``set_weights_values`` has to be called.
- Every other tensor, and every Python value that the function reads, is baked into the graph.
- A file that cannot be parsed is compiled over; one that can be parsed and is damaged is used.
- A graph that falls back to Python objects cannot be stored: the compilation itself raises.

Hence: a folder for each graph, named by a hash of everything that decides what the graph is (see
``CompileCache.digest``); a manifest with the SHA-256 of the graph, checked on the bytes that MindSpore is then given
in a private folder; the weights handed over from the process; and compiling as ever wherever something is not as
expected. Front-end graphs decide what runs, so a cache folder that another user can write to is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit.runtime import devices
from mindiffedit.runtime.notices import say_once

__all__ = [
    "DEFAULT_LIMIT",
    "VARIABLE",
    "CompileCache",
    "Indescribable",
    "default_folder",
    "fingerprint",
    "open_cache",
]

logger = logging.getLogger(__name__)

VARIABLE = "MINDIFFEDIT_CACHE"
"""Environment variable: a folder; or ``0``, ``off`` or nothing to compile without a cache."""

DEFAULT_LIMIT = 2 * 2**30
"""Bytes that one cache folder holds at most; entries that were not used for longest go first."""

_FORMAT = 1
_GRAPH, _MANIFEST = "graph.mindir", "manifest.json"
_FORCE = "MS_DEV_FORCE_USE_COMPILE_CACHE"
_STALE = 24 * 3600  # seconds after which an unfinished folder belongs to a process that died


# --- which folder --------------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/mindiffedit/compiled``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else Path.home() / ".cache") / "mindiffedit" / "compiled"


def open_cache(setting=None) -> CompileCache | None:
    """The cache that a pipeline was asked to use.

    Args:
        setting: None for what ``MINDIFFEDIT_CACHE`` says, else the default folder, on a CPU only (on other devices
            the cache is untested, and has to be asked for); False for none; a path; or a ``CompileCache``.

    Returns:
        A ``CompileCache``, or None where there is to be none or the folder is refused (said once).

    Raises:
        TypeError: a setting of another type.
    """
    if isinstance(setting, CompileCache) or setting is False:
        return setting or None
    if setting is None or setting is True:
        asked = os.environ.get(VARIABLE)
        if asked is not None and asked.strip().lower() in ("", "0", "off"):
            return None
        if asked is None and setting is None and devices.device_target() != "CPU":
            return None
        try:
            setting = asked or default_folder()
        except RuntimeError:  # no home folder
            return None
    if not isinstance(setting, (str, os.PathLike)):
        raise TypeError(f"compile_cache: expected None, False or a folder, got {setting!r}")
    cache = CompileCache(setting)
    return cache if cache.ready() else None


# --- one folder of graphs ------------------------------------------------------------------------------------------


class CompileCache:
    """Compiled graphs in one folder, shared by processes.

    Args:
        folder: made on first use, for its owner alone.
        limit: bytes that it may hold.
    """

    def __init__(self, folder, limit: int = DEFAULT_LIMIT):
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        self.limit = limit
        self.found = self.stored = self.uncached = 0
        """First calls so far whose graph was found, was compiled and stored, was compiled and not stored."""

    def __repr__(self) -> str:
        return f"CompileCache({str(self.folder)!r})"

    def ready(self) -> bool:
        """Whether the folder is there, or could be made, and is its owner's alone to write. Warns once if not."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(self.folder)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise OSError("it cannot be written to")
        except OSError as error:
            say_once(
                f"Compiled graphs are not kept: {self.folder} cannot be used ({_reason(error)}). Set {VARIABLE} to a"
                f" folder of your own, or to 0 to silence this."
            )
            return False
        return True

    # --- the one method that the stages call -----------------------------------------------------------------------

    def compiled(
        self,
        function: Callable,
        key: Sequence[Any] = (),
        models: Sequence[Any] = (),
        extra: Sequence[Any] = (),
    ) -> Callable:
        """``mindspore.jit(function)`` that looks here before it compiles.

        Args:
            function: a function of tensors, as ``mindspore.jit`` takes it.
            key: what the stage is called, and the constants that are compiled into it.
            models: the cells whose weights the function reads. A weight that is missing here would have no value.
            extra: further plain values that decide what is compiled, such as the path, size and time of a library
                of native kernels.

        Returns:
            A function of tensors. What has to be in place while a graph is compiled (``portable_kernels``) has to be
            in place when it is called.
        """
        import mindspore

        graphs: dict[tuple, Callable] = {}
        plain = mindspore.jit(function)

        @functools.wraps(function)
        def run(*arguments):
            signature = _signature(arguments)
            if signature is None:
                return plain(*arguments)
            graph = graphs.get(signature)
            if graph is not None:
                return graph(*arguments)
            with _lock:
                # A jit object of its own for each shape: one that failed leaves nothing behind for the next.
                graph, result = self._first_call(function, arguments, signature, key, models, extra)
            graphs[signature] = graph
            return result

        return run

    def digest(self, function, signature, key=(), models=(), extra=()) -> str:
        """The name of a graph: SHA-256, in hex, over everything that is known to decide what is compiled.

        These are: the versions of this project, of MindSpore, mindone and Python; this project's source files; the
        device, the mode, MindSpore's own settings (``MS_*`` variables, jit level and syntax); the kernels that are
        replaced; ``key`` and ``extra``; the function with all that its closure holds; the models (classes, source
        files, settings, constant tensors with their values; of weights name, shape and dtype); and the arguments'
        shapes and dtypes.

        Raises:
            Indescribable: some of it has no description; the graph is then compiled without the cache.
        """
        parts = [_surroundings(), signature, key, extra, fingerprint(function, *models)]
        return hashlib.sha256(_encoded(parts)).hexdigest()

    # --- first calls ------------------------------------------------------------------------------------------------

    def _first_call(self, function, arguments, signature, key, models, extra):
        """The graph for these arguments, and its result."""
        import mindspore

        def without(reason):
            logger.debug("compiled without the cache: %s: %s", key, reason)
            self.uncached += 1
            graph = mindspore.jit(function)
            return graph, graph(*arguments)

        try:
            digest = self.digest(function, signature, key, models, extra)
            weights = _weights(models)
        except Indescribable as error:
            return without(error)
        if not self.ready():
            return without("no folder")
        desk = _desk_of_process(self.folder)
        if desk is None:
            return without("MindSpore's own cache cannot be taken over in this process")
        content = self._read(digest)
        graph = mindspore.jit(function)
        try:
            result, used, written = desk.call(graph, arguments, weights, content)
        except Exception as error:
            # The cache's fault (a graph that cannot be written or read) or the function's own: run it again without,
            # and what is the function's own is raised again.
            if content is not None:
                self._discard(digest, f"MindSpore failed with it: {_reason(error)}")
            return without(f"{type(error).__name__}: {_reason(error)}")
        if content is not None and not used:
            self._discard(digest, "MindSpore could not use it")
            if written is None:
                return without("it is not certain which graph ran")
        if used:
            self.found += 1
            logger.debug("compiled graph found: %s: %s", key, digest[:16])
        elif written is not None and self._write(digest, written):
            self.stored += 1
            logger.debug("compiled graph stored: %s: %s", key, digest[:16])
        else:
            self.uncached += 1
        return graph, result

    # --- files ------------------------------------------------------------------------------------------------------

    def entry(self, digest: str) -> Path:
        """The folder of one graph."""
        return self.folder / f"{digest[:48]}"

    def _read(self, digest: str) -> bytes | None:
        """The stored graph, checked; None where there is none. What is not as it was written is removed."""
        entry = self.entry(digest)
        try:
            if not entry.is_dir():
                return None
            _require_own(entry)
            names = sorted(os.listdir(entry))
            if names != [_GRAPH, _MANIFEST]:
                raise ValueError(f"holds {', '.join(names) or 'nothing'}")
            manifest = json.loads((entry / _MANIFEST).read_bytes())
            content = (entry / _GRAPH).read_bytes()
            # The manifest names the graph too: a folder under another's name would give wrong results in silence.
            if manifest != _manifest_of(digest, content):
                raise ValueError("differs from its manifest")
            os.utime(entry / _MANIFEST)
            return content
        except (OSError, ValueError) as error:
            self._discard(digest, _reason(error))
            return None

    def _discard(self, digest: str, why: str) -> None:
        entry = self.entry(digest)
        if not entry.exists():  # another process has removed it, or is replacing it
            return
        logger.warning("A stored graph is compiled afresh, %s: %s.", entry, why)
        aside = self.folder / _temporary("old")
        with contextlib.suppress(OSError):
            os.rename(entry, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _write(self, digest: str, content: bytes) -> bool:
        """Stores a graph; whether it, or another process's, is there now."""
        entry, building = self.entry(digest), self.folder / _temporary("new")
        try:
            self._make_room(len(content))
            building.mkdir(mode=0o700)
            _write_private(building / _GRAPH, content)
            _write_private(building / _MANIFEST, json.dumps(_manifest_of(digest, content)).encode())
            try:
                os.rename(building, entry)
            except OSError:
                if not entry.is_dir():
                    raise
            return True
        except OSError as error:
            say_once(f"Compiled graphs are not kept: {self.folder} cannot be written to ({_reason(error)}).")
            return False
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Removes the entries used longest ago until ``size`` more bytes fit, and what dead processes left."""
        entries, total = [], size
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if path.name.startswith("."):
                    if time.time() - path.stat().st_mtime > _STALE:
                        shutil.rmtree(path, ignore_errors=True)
                    continue
                if not (path / _MANIFEST).is_file():
                    continue
                bytes_held = sum(file.stat().st_size for file in path.iterdir())
                entries.append(((path / _MANIFEST).stat().st_mtime_ns, bytes_held, path))
                total += bytes_held
        for _, bytes_held, path in sorted(entries):
            if total <= self.limit:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= bytes_held


def _manifest_of(digest: str, content: bytes) -> dict[str, Any]:
    file = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"format": _FORMAT, "graph": digest, "files": {_GRAPH: file}}


def _temporary(kind: str) -> str:
    return f".{kind}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _require_own(path: Path) -> None:
    """PermissionError where another user owns ``path`` or can write to it."""
    if not hasattr(os, "geteuid"):
        return
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        raise PermissionError("it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to it, mode {stat.S_IMODE(status.st_mode):o}")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


# --- MindSpore's own cache, for the length of one call -------------------------------------------------------------

_lock = threading.RLock()
_desk: _Desk | None = None
_desk_tried = False


def _desk_of_process(folder: Path) -> _Desk | None:
    """The one desk of this process; None where MindSpore's cache is not ours to use."""
    global _desk, _desk_tried
    if _taken_by_the_user():
        return None
    if not _desk_tried:
        _desk_tried = True
        _desk = _Desk.opened(folder)
    if _desk is not None and _desk.process != os.getpid():
        return None  # a forked child has its parent's folder
    return _desk


def _taken_by_the_user() -> bool:
    """Whether the program uses MindSpore's cache by itself: its folder and its count would be mixed with ours."""
    from mindspore import context

    own = context._context()
    enabled = getattr(own, "enable_compile_cache", None)
    return bool(enabled) or (enabled is None and os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1")


class _Desk:
    """The private folder that MindSpore reads and writes; it holds one graph at most, during one call."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, os.getpid()
        self.files: Path | None = None
        self.number = 0  # that MindSpore will give to the next graph

    @classmethod
    def opened(cls, folder: Path) -> _Desk | None:
        """A desk that was tried with a small graph; None where MindSpore writes elsewhere, or not at all."""
        import mindspore
        from mindspore import _c_expression, context

        needed = ("set_compile_cache_dep_files", "set_weights_values")
        if not all(hasattr(_c_expression.JitExecutor_, name) for name in needed):
            return None
        parameter = _c_expression.ms_ctx_param
        if os.environ.get("MS_COMPILER_CACHE_PATH") or context._context().get_param(parameter.compile_cache_path):
            return None  # MindSpore's folder is fixed at its first use, which may have been
        desk = cls(folder / _temporary("desk"))
        try:
            desk.folder.mkdir(mode=0o700)
            atexit.register(desk.remove)
            with desk._switched_on({}), devices._not_counted():
                mindspore.jit(_probe)(mindspore.Tensor(np.ones(1, np.float32)))
            files = list(desk.folder.glob("rank_*/graph_cache/compile_cache_*.mindir"))
            if len(files) == 1:
                desk.files, desk.number = files[0].parent, _number(files[0]) + 1
                desk.clear()
                return desk
        except Exception as error:  # whatever another version of MindSpore makes of this
            logger.debug("MindSpore's compile cache cannot be used: %s", error)
        desk.remove()
        return None

    def remove(self) -> None:
        if self.process == os.getpid():
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        for path in self.files.iterdir():
            path.unlink()

    def call(self, graph, arguments, weights: Mapping[str, Any], content: bytes | None):
        """Calls a jit function that compiles, with a stored graph if there is one.

        Returns:
            (result, used, written): whether the stored graph is what ran, and the bytes of the graph that MindSpore
            wrote, if it wrote exactly one.
        """
        placed = None
        self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.clear()
        try:
            if content is not None:
                path = self.files / f"compile_cache_{self.number}.mindir"
                _write_private(path, content)
                placed = (path, _state(path))
            with self._switched_on(weights), devices.CompileCounter() as compilations:
                result = graph(*arguments)
            files = list(self.files.glob("compile_cache_*.mindir"))
            once = compilations.count == 1 and len(files) == 1
            if placed is not None and once and files[0] == placed[0] and _state(files[0]) == placed[1]:
                self.number += 1
                return result, True, None
            written = files[0].read_bytes() if once else None
            self.number = max([self.number, *(_number(file) + 1 for file in files)])
            return result, False, written
        finally:
            with contextlib.suppress(OSError):
                self.clear()

    @contextlib.contextmanager
    def _switched_on(self, weights: Mapping[str, Any]):
        """MindSpore's cache at this desk; what the program had set comes back, by an exception too."""
        from mindspore import _c_expression, context

        own, names = context._context(), _c_expression.ms_ctx_param
        executors = [_c_expression.JitExecutor_.get_instance(), _c_expression.GraphExecutor_.get_instance()]
        before = {name: own.get_param(name) for name in (names.enable_compile_cache, names.compile_cache_path)}
        forced = os.environ.get(_FORCE)
        quiet = _quiet_log()
        try:
            # Not by set_context: it warns, and MindSpore would parse the entry script and import what that imports.
            own.set_param(names.enable_compile_cache, 1)
            own.set_param(names.compile_cache_path, str(self.folder))
            os.environ[_FORCE] = "1"  # the digest has seen to what MindSpore would compare
            for executor in executors:
                executor.set_compile_cache_dep_files([__file__])  # an empty list would switch the cache off
                executor.set_weights_values(dict(weights))
            with quiet:
                yield
        finally:
            for executor in executors:
                executor.set_compile_cache_dep_files([])
                executor.set_weights_values({})
            if forced is None:
                os.environ.pop(_FORCE, None)
            else:
                os.environ[_FORCE] = forced
            for name, value in before.items():
                own.set_param(name, value)


def _probe(tensor):
    return tensor + 1


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _state(path: Path) -> tuple:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


_MODULES_OF_LOG = 17
"""The first entries of MindSpore's table of log levels, up to that of the module which speaks of the cache; the table
of 2.7 and 2.8 has 38."""


@contextlib.contextmanager
def _quiet_log():
    """Holds back MindSpore's warnings: two for every graph, saying that using a cache is at one's own risk.

    Their level is read from the environment when MindSpore is imported and has no other switch than its table in
    memory. Where that is not as expected, the warnings are shown.
    """
    warning, error = 2, 3
    import mindspore

    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(mindspore.__file__), "lib", "libmindspore_core.so"))
        symbol = "_ZN9mindspore25g_ms_submodule_log_levelsE"
        levels = (ctypes.c_int * _MODULES_OF_LOG).in_dll(library, symbol)
    except (OSError, ValueError):
        levels = []
    before = list(levels)
    if not all(0 <= level <= 4 for level in before):
        levels, before = [], []
    for i, level in enumerate(before):
        levels[i] = error if level == warning else level
    try:
        yield
    finally:
        for i, level in enumerate(before):
            levels[i] = level


# --- what decides what a graph is ----------------------------------------------------------------------------------


class Indescribable(TypeError):
    """Something that a graph depends on has no description that another process could compare."""


def _signature(arguments) -> tuple | None:
    """Shapes and dtypes; None where an argument is not a plain tensor."""
    from mindspore import Parameter, Tensor

    if not all(isinstance(value, Tensor) and not isinstance(value, Parameter) for value in arguments):
        return None
    return tuple((tuple(value.shape), str(value.dtype)) for value in arguments)


def _weights(models: Iterable[Any]) -> dict[str, Any]:
    """Parameters by the name that the stored graph has for them."""
    weights: dict[str, Any] = {}
    for model in models:
        for parameter in model.get_parameters():
            if weights.setdefault(parameter.name, parameter) is not parameter:
                raise Indescribable(f"two weights are called {parameter.name}")
    return weights


def _surroundings() -> list[Any]:
    """What is the same for every graph of a process."""
    import mindspore
    from mindspore import context

    from mindiffedit import __version__
    from mindiffedit.runtime import kernels

    settings = {
        name: mindspore.get_context(name)
        for name in ("mode", "device_target", "jit_syntax_level", "deterministic", "jit_level")
        if hasattr(context._context(), name) or name in context.ms_ctx_param.__members__
    }
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MS_", "ENABLE_MS_")) and name != _FORCE and "CACHE" not in name
    }
    return [
        _FORMAT,
        __version__,
        _own_source(),
        mindspore.__version__,
        _version_of("mindone"),
        sys.version,
        platform.machine(),
        sys.byteorder,
        {name: str(value) for name, value in settings.items()},
        variables,
        (
            mindspore.common.jit_config.JitConfig().jit_config_dict.__repr__()
            if hasattr(mindspore.common, "jit_config")
            else ""
        ),
        kernels.missing_kernels(),
    ]


@functools.cache
def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _own_source() -> str:
    """Hash over this project's source files: a change in any of them may change any graph."""
    root, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(_encoded([path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).digest()]))
    return total.hexdigest()


def fingerprint(*values: Any) -> str:
    """SHA-256, in hex, of a description of functions, models and plain values.

    Weights count with name, shape and dtype, all other tensors and arrays with their values. Functions count with
    their code, defaults, closure and the globals that they name; classes with the time and size of their source
    file and the code of their methods where they are not MindSpore's or mindone's.

    Raises:
        Indescribable: an object that has no description.
    """
    total = hashlib.sha256()
    total.update(_encoded(_Describer().of(list(values))))
    return total.hexdigest()


_LIBRARIES = ("mindspore", "mindone", "mindiffedit", "transformers", "numpy", "builtins", "huggingface_hub")
"""Packages whose functions and classes are named in a description: their version or their files stand for them."""


class _Describer:
    """Turns objects into nested lists of plain values. Each object is described once, then by its number."""

    def __init__(self):
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no two objects have the same id

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, str, bytes)):
            return [type(value).__name__, value if not hasattr(value, "value") else str(value)]
        if isinstance(value, (float, complex)):
            return [type(value).__name__, repr(value)]
        if id(value) in self.numbers:
            return ["again", self.numbers[id(value)]]
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)
        return [f"{type(value).__module__}.{type(value).__qualname__}", self._inside(value)]

    def _inside(self, value: Any) -> Any:
        import mindspore
        from mindspore import nn, ops

        if isinstance(value, mindspore.Parameter):
            return [value.name, list(value.shape), str(value.dtype), bool(value.requires_grad)]
        if isinstance(value, mindspore.Tensor):
            if value.dtype == mindspore.bfloat16:
                array = value.astype(mindspore.float32).asnumpy()
            else:
                array = value.asnumpy()
            return [str(value.dtype), self._array(array)]
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic):
            return repr(value)
        if isinstance(value, nn.Cell):
            return [self._class(type(value)), self._cell(value)]
        if isinstance(value, ops.Primitive):
            attributes = {name: attribute for name, attribute in vars(value).items() if name not in _OF_PRIMITIVE}
            return [value.name, self._mapping({**attributes, **getattr(value, "attrs", {})})]
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return [self.of(item) for item in sorted(value, key=repr)]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return self._function(value)
        if isinstance(value, types.BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, logging.LoggerAdapter) or isinstance(value, logging.Logger):
            return ""
        if type(value).__module__.startswith("mindspore._c_expression") or type(value).__name__ == "dtype":
            return str(value)  # dtypes; of torch too, where a config of transformers holds one
        if hasattr(value, "__dict__"):
            return [self._class(type(value)), self._mapping(vars(value))]
        raise Indescribable(f"an object of {type(value).__module__}.{type(value).__qualname__}")

    @staticmethod
    def _array(array: np.ndarray) -> list[Any]:
        if array.dtype.hasobject:
            raise Indescribable("an array of objects")
        data = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return [str(array.dtype), list(array.shape), data]

    def _mapping(self, mapping: Mapping) -> list[Any]:
        # In its own order, which a graph may loop in; but for mindone's configs, whose order changes from one process to
        # the next, and nobody loops over them.
        items = list(mapping.items())
        if type(mapping).__name__ == "FrozenDict":
            items = sorted((item for item in items if item[0] != "_use_default_values"), key=lambda item: item[0])
        return [[self.of(key), self.of(item)] for key, item in items]

    def _cell(self, cell: Any) -> list[Any]:
        from mindspore import nn

        described = []
        for name, attribute in vars(cell).items():
            if name == "init_tensor" and isinstance(cell, nn.Embedding):
                continue  # random values, of which the table was made; `construct` reads the table
            if name not in _of_cell() or name in (
                "_params",
                "_cells",
                "_buffers",
                "_tensor_list",
                "training",
            ):
                described.append([name, self.of(attribute)])
        return described

    def _class(self, cls: type) -> list[Any]:
        if id(cls) in self.numbers and self.numbers[id(cls)] < 0:
            return ["class again", cls.__module__, cls.__qualname__]
        self.numbers[id(cls)] = -1
        self.kept.append(cls)
        described: list[Any] = [cls.__module__, cls.__qualname__, _file_state(cls.__module__)]
        methods = [m for m in vars(cls).values() if isinstance(m, types.FunctionType)]
        if not _is_library(cls.__module__):
            described += [self._function(method) for method in methods]
        elif isinstance(vars(cls).get("construct"), types.FunctionType):
            described.append(_code(vars(cls)["construct"].__code__))  # which may have been replaced
        return described + [self._class(base) for base in cls.__bases__ if base.__module__ != "builtins"]

    def _function(self, function: Any) -> list[Any]:
        bound = []
        if isinstance(function, types.MethodType):
            bound, function = [self.of(function.__self__)], function.__func__
        described = [function.__module__, function.__qualname__, _code(function.__code__), bound]
        described += [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                described.append(self.of(cell.cell_contents))
        if not _is_library(function.__module__):
            described.append(_file_state(function.__module__))
            for name in _names(function.__code__):
                if name in function.__globals__:
                    described.append([name, self.of(function.__globals__[name])])
        return described


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _file_state(module: str | None) -> list[Any]:
    """Size in bytes and time of the file of a module; nothing for this project, whose source is hashed."""
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if path is None or (module or "").partition(".")[0] == "mindiffedit":
        return []
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    return []


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [
        code.co_code.hex(),
        constants,
        list(code.co_names),
        list(code.co_varnames),
        list(code.co_freevars),
    ]


def _names(code: types.CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return sorted({*code.co_names, *inner})


_OF_PRIMITIVE = {"_prim_type", "instance_name", "attrs", "_update_parameter"}


@functools.cache
def _of_cell() -> frozenset:
    """Attributes that every cell has: numbers of its creation, hooks and caches."""
    from mindspore import nn

    return frozenset(vars(nn.Cell()))


def _encoded(value: Any) -> bytes:
    """Bytes that two values share only when they are equal."""

    def plain(item):
        if isinstance(item, bytes):
            return {"bytes": item.hex()}
        if isinstance(item, (tuple, set)):
            return list(item)
        raise Indescribable(f"an object of {type(item).__qualname__} in a key")

    return json.dumps(value, default=plain, sort_keys=True, separators=(",", ":")).encode()
