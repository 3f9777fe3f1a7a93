"""One thread that owns the device. Others hold a place in its queue, which is of limited length, and hand it work."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class Busy(Exception):
    """There is no place left. `retry_after` (s, at least 1) is about when there will be one."""

    def __init__(self, retry_after: int):
        super().__init__(f"no place left for {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The worker ends what runs, and begins nothing any more."""


class Worker:
    """Runs work one after the other.

    Args:
        max_waiting: places of the queue, beside that of what runs.

    Attributes:
        held: places that are taken, that of what runs among them.
        running: whether something runs.
        closing: whether `close` was called.
    """

    def __init__(self, max_waiting: int):
        self.places, self.held, self.running, self.closing = max_waiting + 1, 0, False, False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "device")
        self._seconds: deque[float] = deque(maxlen=20)  # of the last pieces of work

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue while the block runs; taken before the request is read, so that memory is limited, too.

        Raises:
            Busy, Closing: there is none.
        """
        with self._lock:
            if self.closing:
                raise Closing
            if self.held >= self.places:
                mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
                raise Busy(max(1, math.ceil(mean)))
            self.held += 1
        try:
            yield
        finally:
            with self._lock:
                self.held -= 1

    def submit(self, work: Callable, *arguments) -> Future:
        """Work for the thread. The future is cancelled where `close` comes before its turn.

        Raises:
            Closing: after `close`.
        """
        try:
            return self._pool.submit(self._timed, work, *arguments)
        except RuntimeError as error:
            raise Closing from error

    def _timed(self, work: Callable, *arguments):
        begun, self.running = time.monotonic(), True
        try:
            return work(*arguments)
        finally:
            self.running = False
            self._seconds.append(time.monotonic() - begun)

    def close(self) -> None:
        """Cancels what waits and lets end what runs; does not wait for it."""
        self.closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
