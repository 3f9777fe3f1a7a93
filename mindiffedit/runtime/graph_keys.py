"""What decides what a compiled graph is, as one hash: equal for two processes only where their graphs are.

A graph holds every Python value and every constant tensor that its function reads; of a weight it holds name, shape and
dtype. So everything that a function can reach is described, and what cannot be described has no key.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindiffedit.runtime.machine import version_of

__all__ = ["Indescribable", "fingerprint", "graph_key"]


class Indescribable(TypeError):
    """Something that a graph depends on has no description that another process could compare."""


def graph_key(function, arguments, key=(), models=(), extra=()) -> str:
    """The name of a graph: SHA-256, in hex, over everything that is known to decide what is compiled.

    These are: the versions of this project, of MindSpore, mindone and Python; this project's source files; the device,
    the mode, MindSpore's own settings (``MS_*`` variables, jit level and syntax); the kernels that are replaced;
    ``key`` and ``extra``; the function and the models, see ``fingerprint``; and the arguments' shapes and dtypes.

    Args:
        function, arguments: what is compiled, for which tensors.
        key, extra: plain values.
        models: the cells that the function runs.

    Raises:
        Indescribable: some of it has no description, or an argument is no plain tensor.
    """
    from mindspore import Parameter, Tensor

    if not all(isinstance(value, Tensor) and not isinstance(value, Parameter) for value in arguments):
        raise Indescribable("an argument that is no plain tensor")
    shapes = [(list(value.shape), str(value.dtype)) for value in arguments]
    return _hash([_surroundings(), shapes, key, extra, fingerprint(function, *models)])


def fingerprint(*values: Any) -> str:
    """SHA-256, in hex, of a description of functions, models and plain values.

    Weights count with name, shape and dtype, all other tensors and arrays with their values. Functions count with
    their code, defaults, closure and the globals that they name; classes with their source file and the code of their
    methods, those of MindSpore and other known libraries with their names only.

    Raises:
        Indescribable: an object that has no description.
    """
    return _hash(_Description().of(list(values)))


def _hash(value: Any) -> str:
    def plain(item):
        if isinstance(item, bytes):
            return {"bytes": item.hex()}
        raise Indescribable(f"an object of {type(item).__qualname__} in a key")

    return hashlib.sha256(json.dumps(value, default=plain, sort_keys=True).encode()).hexdigest()


def _surroundings() -> list[Any]:
    """What is the same for every graph of a process."""
    import mindspore

    from mindiffedit import __version__
    from mindiffedit.runtime import kernels, launches

    settings = [
        mindspore.get_context(name)
        for name in ("mode", "device_target", "jit_syntax_level", "deterministic", "jit_level")
    ]
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MS_", "ENABLE_MS_")) and "CACHE" not in name and "LOG" not in name
    }
    return [
        [__version__, _own_source()],
        [mindspore.__version__, version_of("mindone"), sys.version, platform.machine(), sys.byteorder],
        [settings, str(mindspore.context.get_jit_config()), variables],
        [kernels.missing_kernels(), launches.scores_at_once()],
    ]


@functools.cache
def _own_source() -> str:
    """Hash over this project's source files: a change in any of them may change any graph."""
    root = Path(__file__).resolve().parents[1]
    return _hash([[str(path.relative_to(root)), path.read_bytes()] for path in sorted(root.rglob("*.py"))])


_LIBRARIES = ("mindspore", "mindone", "mindiffedit", "transformers", "numpy", "builtins", "huggingface_hub")
"""Packages whose functions and classes are named in a description: their version or their files stand for them."""

_OF_PRIMITIVE = {"_prim_type", "instance_name", "attrs", "_update_parameter"}


class _Description:
    """Turns objects into nested lists of plain values. Each object is described once, then by its number."""

    def __init__(self):
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no two objects have the same id

    def of(self, value: Any) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            return [kind, repr(value)]
        if id(value) in self.numbers:
            return ["again", self.numbers[id(value)]]
        self.numbers[id(value)] = len(self.numbers)
        self.kept.append(value)
        return [kind, self._inside(value)]

    def _inside(self, value: Any) -> Any:
        import mindspore
        from mindspore import nn, ops

        kind = type(value)
        if isinstance(value, mindspore.Parameter):
            return [value.name, list(value.shape), str(value.dtype), bool(value.requires_grad)]
        if isinstance(value, mindspore.Tensor):
            wide = value.astype(mindspore.float32) if value.dtype == mindspore.bfloat16 else value
            return [str(value.dtype), self._inside(wide.asnumpy())]
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise Indescribable("an array of objects")
            return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
        if isinstance(value, nn.Cell):
            return [self._class(kind), self._items(_attributes(value))]
        if isinstance(value, ops.Primitive):
            own = {name: item for name, item in vars(value).items() if name not in _OF_PRIMITIVE}
            return [value.name, self._items({**own, **getattr(value, "attrs", {})})]
        if isinstance(value, Mapping):
            return self._items(value)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return [self.of(item) for item in sorted(value, key=repr)]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return [value.__name__, _source_of(value.__name__)]
        if isinstance(value, types.MethodType):
            return [self.of(value.__self__), self._function(value.__func__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.BuiltinFunctionType):
            return [value.__module__, value.__qualname__]
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, (logging.Logger, logging.LoggerAdapter)):
            return []
        if kind.__module__.startswith("mindspore._c_expression") or kind.__name__ == "dtype":
            return str(value)  # dtypes; of torch too, where a config of transformers holds one
        if hasattr(value, "__dict__"):
            return [self._class(kind), self._items(vars(value))]
        raise Indescribable(f"an object of {kind.__module__}.{kind.__qualname__}")

    def _items(self, mapping: Mapping) -> list[Any]:
        # In its own order, which a graph may loop in; but for mindone's configs, whose order changes from one process
        # to the next, and nobody loops over them.
        items = list(mapping.items())
        if type(mapping).__name__ == "FrozenDict":
            items = sorted((item for item in items if item[0] != "_use_default_values"), key=lambda item: item[0])
        return [[self.of(key), self.of(item)] for key, item in items]

    def _class(self, cls: type) -> list[Any]:
        name: list[Any] = [cls.__module__, cls.__qualname__]
        if self.numbers.get(id(cls), 0) < 0:
            return name
        self.numbers[id(cls)] = -1
        self.kept.append(cls)
        methods = [method for method in vars(cls).values() if isinstance(method, types.FunctionType)]
        if not _is_library(cls.__module__):
            name += [_source_of(cls.__module__), *[self._function(method) for method in methods]]
        elif isinstance(vars(cls).get("construct"), types.FunctionType):
            name.append(_code(vars(cls)["construct"].__code__))  # which may have been replaced
        return name + [self._class(base) for base in cls.__bases__ if base.__module__ != "builtins"]

    def _function(self, function: Any) -> list[Any]:
        described = [function.__module__, function.__qualname__, _code(function.__code__)]
        described += [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                described.append(self.of(cell.cell_contents))
        if not _is_library(function.__module__):
            described.append(_source_of(function.__module__))
            names = [name for name in _names(function.__code__) if name in function.__globals__]
            described += [[name, self.of(function.__globals__[name])] for name in names]
        return described


def _attributes(cell: Any) -> dict[str, Any]:
    """A cell's own attributes: none that every cell has (numbers of its creation, hooks, caches), but its contents."""
    from mindspore import nn

    contents = {"_params", "_cells", "_buffers", "_tensor_list", "training"}
    own = {name: value for name, value in vars(cell).items() if name in contents or name not in _of_every_cell()}
    if isinstance(cell, nn.Embedding):
        own.pop("init_tensor", None)  # random values, of which the table was made; `construct` reads the table
    return own


@functools.cache
def _of_every_cell() -> frozenset:
    from mindspore import nn

    return frozenset(vars(nn.Cell()))


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


@functools.cache
def _source_of(module: str) -> str:
    """Hash of the file of a user's module; nothing for libraries, and where there is no file."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or _is_library(module):
        return ""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return ""


def _code(code: types.CodeType) -> list[Any]:
    def constant(item):
        if isinstance(item, types.CodeType):
            return _code(item)
        return repr(sorted(item, key=repr) if isinstance(item, frozenset) else item)  # sets have no order of their own

    constants = [constant(item) for item in code.co_consts]
    return [code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars]


def _names(code: types.CodeType) -> list[str]:
    inner = [name for item in code.co_consts if isinstance(item, types.CodeType) for name in _names(item)]
    return sorted({*code.co_names, *inner})
