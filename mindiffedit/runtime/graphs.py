"""Compiled graphs in memory: one for each stage and shape, a limited number of them, none over a changed model."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
from mindspore.common.api import JitExecutor_, ms_compile_cache

from mindiffedit.runtime import devices, native, turns
from mindiffedit.runtime.kernels import portable_kernels
from mindiffedit.runtime.reuse import places_of, same_places

MAX_GRAPHS = 17
"""Graphs that a pipeline keeps: its text encoder, and eight of an edit for each of two sizes of pictures.

Without a limit, every new size would stay. What goes comes back from the compile cache.
"""

MAX_GRAPHS_WITHOUT_CACHE = 64
"""The same where what has gone has to be compiled again."""


JIT_LEVELS = ("O0", "O1")
"""How far MindSpore fuses operators: not at all, or into kernels that it makes itself (Ascend)."""


def max_graphs(cache) -> int:
    """How many graphs a pipeline keeps by default, with this ``CompileCache`` or None."""
    return MAX_GRAPHS_WITHOUT_CACHE if cache is None else MAX_GRAPHS


class Graphs:
    """Compiles functions, once for every combination of shapes and dtypes.

    A graph reads the memory that a weight had when it was compiled. ``ops.assign`` writes there; ``set_data`` and
    ``load_param_into_net`` give the weight another, which a graph does not notice, and neither does it notice another
    layer or attention processor. Graphs over a model that has changed so are dropped, looked for once in a turn.

    Args:
        cache: a ``compile_cache.CompileCache`` that a graph is looked for in before it is compiled, or None.
        limit: graphs kept; the one that was used longest ago goes first.

    Attributes:
        jit_level: of ``mindspore.jit``, for what is compiled from now on.
        made: graphs that were compiled, or read from the cache, so far.
    """

    def __init__(self, cache=None, limit: int = MAX_GRAPHS_WITHOUT_CACHE):
        self.cache, self.limit, self.made = cache, limit, 0
        self.jit_level = JIT_LEVELS[0]
        self._graphs: collections.OrderedDict[tuple, _Graph] = collections.OrderedDict()
        self._places: dict[int, list[Any]] = {}  # of each model, as its graphs know it

    def __len__(self) -> int:
        return len(self._graphs)

    def compiled(self, function: Callable, key: Sequence[Any], model: Any = None) -> Callable:
        """``mindspore.jit(function)`` for tensors as arguments.

        The kernels of ``portable_kernels`` are in place while a graph is compiled, and only then.

        Args:
            function: a function of tensors.
            key: as for ``CompileCache.first_call``.
            model: the cell that the function runs, if any.
        """

        def run(*arguments):
            with turns.turn():
                if _ownerless:
                    phases = set(_ownerless)
                    _ownerless.difference_update(phases)
                    _release(phases)
                if model is not None:
                    turns.once((id(self), id(model)), lambda: self._renew(model))
                shapes = tuple((tuple(argument.shape), argument.dtype) for argument in arguments)
                place = (function, shapes, self.jit_level)
                graph = self._graphs.get(place)
                if graph is not None:
                    self._graphs.move_to_end(place)
                    return graph.run(*arguments)
                while len(self._graphs) >= self.limit:
                    self._graphs.popitem(last=False)[1].release()
                graph = _Graph(function, model, self.jit_level)
                with portable_kernels():
                    result = graph.first_run(self.cache, key, *arguments)
                self._graphs[place] = graph
                self.made += 1
                if model is not None:
                    self._places[id(model)] = places_of(model)  # weights may have moved to the device for it
                return result

        return run

    def clear(self) -> None:
        """Drops all graphs."""
        self._drop(lambda graph: True)

    def _drop(self, chosen: Callable[[_Graph], bool]) -> None:
        for place in [place for place, graph in self._graphs.items() if chosen(graph)]:
            self._graphs.pop(place).release()

    def _renew(self, model) -> None:
        before, now = self._places.get(id(model)), places_of(model)
        if before is not None and not same_places(before, now):
            self._drop(lambda graph: graph.model is model)
        self._places[id(model)] = now


_ownerless: set[str] = set()
"""MindSpore's names of graphs whose pipeline is gone: found at any moment, they are given back in the next turn."""


def _release(phases: set[str]) -> None:
    """Gives the memory of graphs back, which MindSpore otherwise holds until the process ends, with their weights."""
    JitExecutor_.get_instance().del_net_res(None, phases)
    ms_compile_cache.difference_update(phases)
    phases.clear()
    devices.give_memory_back()


class _Graph:
    """A function compiled for one combination of shapes.

    Attributes:
        function, model, jit_level: what was compiled, over which model, and how.
        run: the graph, once ``first_run`` has compiled it.
    """

    def __init__(self, function: Callable, model, jit_level: str):
        self.function, self.model, self.jit_level = function, model, jit_level
        self._phases: set[str] = set()
        weakref.finalize(self, _ownerless.update, self._phases).atexit = False

    def first_run(self, cache: Any | None, key: Sequence[Any], *arguments):
        devices.watch_compilations()
        before = set(ms_compile_cache)
        if cache is None:
            self.run = ms.jit(
                self.function, jit_level=self.jit_level
            )  # an object of its own: nothing is shared with the graphs of other shapes
            result = self.run(*arguments)
        else:
            models = () if self.model is None else (self.model,)
            extra = (*native.identity(), self.jit_level)
            self.run, result = cache.first_call(self.function, arguments, key, models, extra, self.jit_level)
        name = f"{self.function.__module__}.{self.function.__name__}."
        self._phases.update(phase for phase in ms_compile_cache - before if phase.startswith(name))
        return result

    def release(self) -> None:
        """Gives the graph's memory back."""
        _release(self._phases)
