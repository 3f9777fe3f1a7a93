"""Who may use MindSpore now: one thread at a time, in the process in which it was started.

MindSpore's mode, its kernels (see ``kernels``) and the weights of a model with a LoRA are there once in a process, and
two threads that change them under one another get each other's results. So every public call is a *turn*: it runs
alone, as if no other thread were there. Callbacks are the user's, and may wait for another thread: the turn is given up
while they run. Between them nothing changes, so what was found out in a turn need not be found out again (``once``).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["in_turn", "once", "require_own_process", "turn", "turn_given_up"]

_lock = threading.RLock()
_mine = threading.local()  # depth: how often this thread has the lock; known: what it found out since it got it
_was_running = _inherited = False


@contextlib.contextmanager
def turn():
    """Waits until no other thread is in such a block, then runs its own; re-entrant. Also a decorator, ``@turn()``.

    Raises:
        RuntimeError: see ``require_own_process``.
    """
    require_own_process()
    with _lock:
        if not in_turn():
            _mine.depth, _mine.known = 0, {}
        _mine.depth += 1
        try:
            yield
        finally:
            _mine.depth -= 1


@contextlib.contextmanager
def turn_given_up():
    """Lets other threads have their turns during the block; does nothing in a thread that has none."""
    depth = _mine.depth if in_turn() else 0
    for _ in range(depth):
        _mine.depth -= 1
        _lock.release()
    try:
        yield
    finally:
        for _ in range(depth):
            _lock.acquire()
        if depth:
            _mine.depth, _mine.known = depth, {}


def in_turn() -> bool:
    """Whether this thread has the turn."""
    return getattr(_mine, "depth", 0) > 0


def once(key: Hashable, compute: Callable[[], Any]) -> Any:
    """``compute()``, or within a turn what it gave the first time for ``key``."""
    if not in_turn():
        return compute()
    if key not in _mine.known:
        _mine.known[key] = compute()
    return _mine.known[key]


# --- processes -----------------------------------------------------------------------------------------------------


def require_own_process() -> None:
    """RuntimeError in a process that was forked from one where MindSpore was running: its threads are not here."""
    if _inherited:
        raise RuntimeError(
            "This process was forked from one in which MindSpore was already running, and would wait for MindSpore's"
            " threads for ever. Start workers by multiprocessing.get_context('spawn'), or fork before any model is"
            " loaded, and load the models in each worker."
        )


def _running() -> bool:
    mindspore = sys.modules.get("mindspore")
    if mindspore is None or not hasattr(mindspore, "hal"):  # not imported, or only half yet
        return False
    return mindspore.hal.is_initialized(mindspore.get_context("device_target"))


def _before_fork() -> None:
    global _was_running
    _was_running = _inherited or _running()


def _in_child() -> None:
    global _inherited, _lock
    _inherited, _lock = _was_running, threading.RLock()  # another thread of the parent may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
