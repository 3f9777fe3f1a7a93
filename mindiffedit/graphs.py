"""Compiled graphs in memory: one for each stage and shape, a limited number of them."""

from __future__ import annotations

import collections
from typing import Any, Callable, Optional, Sequence

import mindspore as ms
from mindspore.common.api import JitExecutor_, ms_compile_cache

from . import native, turns
from .kernels import portable_kernels

MAX_GRAPHS = 16
"""Graphs that a pipeline keeps: those of two sizes of pictures. Without a limit every new size would stay."""

MAX_GRAPHS_WITHOUT_CACHE = 64
"""The same where a graph that has gone has to be compiled again."""


class Graphs:
    """Compiles functions, once for every combination of shapes and dtypes.

    What goes comes back from the compile cache. It is then a quarter of the size of a graph that was compiled here,
    which MindSpore keeps with all that it went through, so of each function only the newest of those stays.

    Args:
        cache: a ``compile_cache.CompileCache`` that a graph is looked for in before it is compiled, or None.
        limit: graphs kept; the one that was used longest ago goes first. None: ``MAX_GRAPHS``, or
            ``MAX_GRAPHS_WITHOUT_CACHE``.
    """

    def __init__(self, cache=None, limit: Optional[int] = None):
        usual = MAX_GRAPHS_WITHOUT_CACHE if cache is None else MAX_GRAPHS
        self.cache, self.limit = cache, usual if limit is None else limit
        self._graphs: "collections.OrderedDict[tuple, _Graph]" = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def compiled(
        self,
        function: Callable,
        key: Sequence[Any],
        models: Sequence[Any] = (),
        after: Callable[[], Any] = lambda: None,
    ) -> Callable:
        """``mindspore.jit(function)`` for tensors as arguments; see ``CompileCache.compiled`` for ``key`` and ``models``.

        The kernels of ``portable_kernels`` are in place while a graph is compiled, and only then. ``after`` is called
        when one was: weights may have moved to the device for it.
        """

        def run(*arguments):
            with turns.turn():
                shapes = tuple((tuple(argument.shape), argument.dtype) for argument in arguments)
                place = (function, shapes)
                graph = self._graphs.get(place)
                if graph is not None:
                    self._graphs.move_to_end(place)
                    return graph.run(*arguments)
                while len(self._graphs) >= self.limit:
                    self._graphs.popitem(last=False)[1].release()
                graph = _Graph(function, self.cache, key, models)
                with portable_kernels():
                    result = graph.first_run(*arguments)
                if graph.is_stored:
                    self._forget(function, lambda other: other.is_stored)
                self._graphs[place] = graph
                after()
                return result

        run.forget = lambda: self._forget(function)
        return run

    def _forget(self, function: Callable, chosen: Callable[["_Graph"], bool] = lambda graph: True) -> None:
        for place in [place for place, graph in self._graphs.items() if place[0] is function and chosen(graph)]:
            self._graphs.pop(place).release()


class _Graph:
    """A function compiled for one combination of shapes.

    Attributes:
        run: the function.
        is_stored: whether it was compiled here and is in the cache.
    """

    def __init__(self, function: Callable, cache: Optional[Any], key, models):
        self._name = f"{function.__module__}.{function.__name__}."
        self._cache, self._phases, self.is_stored = cache, set(), False
        # A jit object of its own: nothing is shared with the graphs of other shapes.
        if cache is None:
            self.run = ms.jit(function)
        else:
            self.run = cache.compiled(function, key, models=models, extra=native.identity())

    def first_run(self, *arguments):
        before, stored = set(ms_compile_cache), getattr(self._cache, "stored", 0)
        result = self.run(*arguments)
        self.is_stored = getattr(self._cache, "stored", 0) > stored
        self._phases = {phase for phase in ms_compile_cache - before if phase.startswith(self._name)}
        return result

    def release(self) -> None:
        """Gives the graph's memory back, which MindSpore otherwise holds until the process ends."""
        JitExecutor_.get_instance().del_net_res(None, self._phases)
        ms_compile_cache.difference_update(self._phases)
