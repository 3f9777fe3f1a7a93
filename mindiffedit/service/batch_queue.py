"""The rows that are still to be done, by the size that the model works at.

Every size has compiled graphs of its own. A worker stays at its size while there are rows of it; then it goes to where
the most rows are for each worker that is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable

from mindiffedit.service.batch_rows import Row


class Queue:
    """Rows by size; true while there are any.

    Args:
        rows: each with its size, whatever tells it from others.
    """

    def __init__(self, rows: Iterable[tuple[Row, Hashable]]):
        self._groups: dict[Hashable, deque[Row]] = {}
        self._sizes: dict[Hashable, Hashable] = {}  # that each worker is at
        self._sizes_of_rows: dict[int, Hashable] = {}  # of rows that are in hand
        for row, size in rows:
            self._groups.setdefault(size, deque()).append(row)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, worker: Hashable) -> Row:
        """The next row for a worker, by any name of its own; the queue must not be empty."""
        size = self._sizes.pop(worker, None)
        if size not in self._groups:
            there = Counter(self._sizes.values())
            size = max(self._groups, key=lambda size: len(self._groups[size]) / (1 + there[size]))
        self._sizes[worker] = size
        row = self._groups[size].popleft()
        if not self._groups[size]:
            del self._groups[size]
        self._sizes_of_rows[row.number] = size
        return row

    def put_back(self, row: Row) -> None:
        """A row that was taken and not done is the next of its size."""
        self._groups.setdefault(self._sizes_of_rows[row.number], deque()).appendleft(row)
