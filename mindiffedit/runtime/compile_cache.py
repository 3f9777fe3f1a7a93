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
- It warns of each graph that it finds, and of each that it does not. ``MS_SUBMODULE_LOG_v={PIPELINE:3}`` silences
  this, if it is set before MindSpore is imported; nothing else does.

Hence: a file for each graph, named by a hash of everything that decides what the graph is (``graph_keys``); a SHA-256
in it, checked on the bytes that MindSpore is then given in a private folder, the desk; the weights handed over from the
process; and compiling as ever wherever something is not as expected. Front-end graphs decide what runs, so a cache
folder that another user can write to is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindiffedit.errors import first_line
from mindiffedit.runtime import devices, turns
from mindiffedit.runtime.graph_keys import Indescribable, graph_key
from mindiffedit.runtime.notices import say_once

__all__ = ["DEFAULT_LIMIT", "VARIABLE", "CompileCache", "default_folder", "open_cache"]

logger = logging.getLogger(__name__)

VARIABLE = "MINDIFFEDIT_CACHE"
"""Environment variable: a folder; or ``0``, ``off`` or nothing to compile without a cache."""

DEFAULT_LIMIT = 2 * 2**30
"""Bytes that one cache folder holds at most; entries that were not used for longest go first."""

_FORCE = "MS_DEV_FORCE_USE_COMPILE_CACHE"
_STALE = 24 * 3600  # seconds after which a file without a name, or a desk, belongs to a process that died


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


class CompileCache:
    """Compiled graphs in one folder, shared by processes.

    Args:
        folder: made on first use, for its owner alone.
        limit: bytes that it may hold.

    Attributes:
        found, stored, uncached: graphs so far that were found, were compiled and stored, were compiled and not stored.
    """

    def __init__(self, folder, limit: int = DEFAULT_LIMIT):
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        self.limit = limit
        self.found = self.stored = self.uncached = 0

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
                f"Compiled graphs are not kept: {self.folder} cannot be used ({first_line(error)}). Set {VARIABLE} to"
                f" a folder of your own, or to 0 to silence this."
            )
            return False
        return True

    def first_call(
        self,
        function: Callable,
        arguments: Sequence[Any],
        key: Sequence[Any] = (),
        models: Sequence[Any] = (),
        extra: Sequence[Any] = (),
        jit_level: str = "O0",
    ) -> tuple[Callable, Any]:
        """``mindspore.jit(function)`` for these arguments' shapes, looked for here before it is compiled, and called.

        Args:
            function: a function of tensors, as ``mindspore.jit`` takes it.
            arguments: the tensors of its first call.
            key: what the stage is called, and the constants that are compiled into it.
            models: the cells whose weights the function reads. A weight that is missing here would have no value.
            extra: further plain values that decide what is compiled, such as the path, size and time of a library
                of native kernels.
            jit_level: of ``mindspore.jit``; among ``extra``, too, where it may differ.

        Returns:
            The graph, and what it gave for ``arguments``. What has to be in place while a graph is compiled
            (``portable_kernels``) has to be in place now.
        """
        import mindspore

        def without(reason):
            logger.debug("compiled without the cache: %s: %s", key, reason)
            self.uncached += 1
            # A jit object of its own: one that failed leaves nothing behind for the next.
            graph = mindspore.jit(function, jit_level=jit_level)
            return graph, graph(*arguments)

        with turns.turn():
            try:
                name = graph_key(function, arguments, key, models, extra)
                weights = _weights(models)
            except Indescribable as error:
                return without(error)
            if not self.ready():
                return without("no folder")
            desk = _desk_of_process(self.folder)
            if desk is None:
                return without("MindSpore's own cache cannot be taken over in this process")
            content = self._read(name)
            graph = mindspore.jit(function, jit_level=jit_level)
            try:
                result, held = desk.call(graph, arguments, weights, content)
            except Exception as error:
                # The cache's fault (a graph that cannot be written or read) or the function's own: run it again
                # without, and what is the function's own is raised again.
                if content is not None:
                    self._discard(name, f"MindSpore failed with it: {first_line(error)}")
                return without(f"{type(error).__name__}: {first_line(error)}")
            if content is not None and held != content:
                self._discard(name, "MindSpore could not use it")
                if held is None:
                    return without("it is not certain which graph ran")
            if held is not None and held == content:
                self.found += 1
            elif held is not None and self._write(name, held):
                self.stored += 1
            else:
                self.uncached += 1
            return graph, result

    # --- files: 32 bytes of SHA-256 over name and graph, then the graph ---------------------------------------------

    def _read(self, name: str) -> bytes | None:
        """The stored graph, checked; None where there is none. What is not as it was written is removed."""
        path = self.folder / name
        try:
            _require_own(path)
            file = path.read_bytes()
            if file[:32] != _checksum(name, file[32:]):
                raise ValueError("it is not what was written")
            os.utime(path)
            return file[32:]
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._discard(name, first_line(error))
            return None

    def _discard(self, name: str, why: str) -> None:
        logger.warning("A stored graph is compiled afresh, %s: %s.", self.folder / name, why)
        _remove(self.folder / name)

    def _write(self, name: str, content: bytes) -> bool:
        """Stores a graph, whole or not at all; whether it is there now."""
        try:
            self._make_room(len(content))
            handle, building = tempfile.mkstemp(prefix=".new-", dir=self.folder)  # readable by its owner alone
            try:
                with open(handle, "wb") as file:
                    file.write(_checksum(name, content) + content)
                os.replace(building, self.folder / name)
            finally:
                _remove(Path(building))
            return True
        except OSError as error:
            say_once(f"Compiled graphs are not kept: {self.folder} cannot be written to ({first_line(error)}).")
            return False

    def _make_room(self, size: int) -> None:
        """Removes the graphs used longest ago until ``size`` more bytes fit, and what dead processes left.

        So do the folders go that graphs had in earlier versions.
        """
        graphs, now = [], time.time()
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                if path.name.startswith(".") or path.is_dir():
                    if now - status.st_mtime > _STALE:
                        _remove(path)
                else:
                    graphs.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(held for _, held, _ in graphs)
        for _, held, path in sorted(graphs):
            if total > self.limit:
                _remove(path)
                total -= held


def _checksum(name: str, content: bytes) -> bytes:
    # With the name: a graph under another's would give wrong results in silence.
    return hashlib.sha256(name.encode() + content).digest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _require_own(path: Path) -> None:
    """PermissionError where another user owns ``path`` or can write to it."""
    status = path.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise PermissionError("it belongs to another user")
    if hasattr(os, "geteuid") and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to it, mode {stat.S_IMODE(status.st_mode):o}")


def _weights(models: Iterable[Any]) -> dict[str, Any]:
    """Parameters by the name that the stored graph has for them."""
    weights: dict[str, Any] = {}
    for model in models:
        for parameter in model.get_parameters():
            if weights.setdefault(parameter.name, parameter) is not parameter:
                raise Indescribable(f"two weights are called {parameter.name}")
    return weights


# --- MindSpore's own cache, for the length of one call -------------------------------------------------------------

_desks: list[_Desk | None] = []  # the one of this process, or None where there can be none; empty before the first use


def _desk_of_process(folder: Path) -> _Desk | None:
    """The one desk of this process; None where MindSpore's cache is not ours to use."""
    if _taken_by_the_user():
        return None
    if not _desks:
        _desks.append(_Desk.opened(folder))
    return _desks[0]


def _taken_by_the_user() -> bool:
    """Whether the program uses MindSpore's cache by itself: its folder and its count would be mixed with ours."""
    from mindspore import context

    enabled = getattr(context._context(), "enable_compile_cache", None)
    return bool(enabled) or (enabled is None and os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1")


class _Desk:
    """The private folder that MindSpore reads and writes; it holds one graph at most, during one call."""

    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(prefix=".desk-", dir=folder))
        self.files = self.folder  # where in it MindSpore looks: known from the first graph on
        self.number = 0  # that MindSpore will give to the next graph
        atexit.register(_remove, self.folder)

    @classmethod
    def opened(cls, folder: Path) -> _Desk | None:
        """A desk that was tried with a small graph; None where MindSpore writes elsewhere, or not at all."""
        import mindspore
        from mindspore import context

        path = context._context().get_param(context.ms_ctx_param.compile_cache_path)
        if os.environ.get("MS_COMPILER_CACHE_PATH") or path:
            return None  # MindSpore's folder is fixed at its first use, which may have been
        try:
            desk = cls(folder)
            tensor = mindspore.Tensor([1.0], mindspore.float32)
            with devices.not_counted():
                _, held = desk.call(mindspore.jit(_probe), [tensor], {}, None)
            return desk if held else None
        except Exception as error:  # whatever another version of MindSpore makes of this
            logger.debug("MindSpore's compile cache cannot be used: %s", error)
            return None

    def call(self, graph, arguments, weights: Mapping[str, Any], content: bytes | None):
        """Calls a jit function that compiles, with a stored graph if there is one.

        Returns:
            (result, held): ``held`` are the bytes of the graph that ran, if it is the only one on the desk:
            ``content`` where that was used, else what MindSpore wrote. None where that is not certain.
        """
        placed = self.files / f"compile_cache_{self.number}.mindir"
        if content is not None:
            self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
            placed.write_bytes(content)
        try:
            with self._switched_on(weights):
                result = graph(*arguments)
            files = self._graphs()
            if len(files) != 1:
                return result, None
            self.files = files[0].parent
            return result, files[0].read_bytes()
        finally:
            files = self._graphs()
            written = [int(path.stem.rpartition("_")[2]) for path in files if path != placed]
            self.number = max(written, default=self.number) + 1
            for path in files:
                _remove(path)

    def _graphs(self) -> list[Path]:
        return list(self.folder.rglob("compile_cache_*.mindir"))

    @contextlib.contextmanager
    def _switched_on(self, weights: Mapping[str, Any]):
        """MindSpore's cache at this desk; what the program had set comes back, by an exception too."""
        from mindspore import _c_expression, context

        settings, names = context._context(), _c_expression.ms_ctx_param
        executors = [_c_expression.JitExecutor_.get_instance(), _c_expression.GraphExecutor_.get_instance()]
        before = {name: settings.get_param(name) for name in (names.enable_compile_cache, names.compile_cache_path)}
        forced = os.environ.get(_FORCE)
        try:
            # Not by set_context: it warns, and MindSpore would parse the entry script and import what that imports.
            settings.set_param(names.enable_compile_cache, 1)
            settings.set_param(names.compile_cache_path, str(self.folder))
            os.environ[_FORCE] = "1"  # the key has seen to what MindSpore would compare
            for executor in executors:
                executor.set_compile_cache_dep_files([__file__])  # an empty list would switch the cache off
                executor.set_weights_values(dict(weights))
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
                settings.set_param(name, value)


def _probe(tensor):
    return tensor + 1
