"""The rows of a batch on several devices or machines, by Ray: each worker is a process that has a model of its own.

A worker that dies is replaced, and the row that it had is done by whichever is free. Ray is imported when workers are
asked for, and what it needs is set in the environment before.
"""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mindiffedit.errors import InputError, first_line
from mindiffedit.runtime import quick_imports
from mindiffedit.service.batch_queue import Queue
from mindiffedit.service.batch_rows import Row
from mindiffedit.service.batch_task import Task, loaded

MAX_DEATHS = 3
"""So many workers may die of one row, or one after the other while they load the model."""

_PATIENCE = 10.0  # seconds for a cluster to answer

# Results are written by the workers; only rows and records are passed on. Ray asks for 75 MiB at least.
_OBJECT_STORE = 100 * 2**20

# MindSpore's classes for protobuf are of an old kind, which only this implementation takes. MindSpore asks for it, but
# in a process of Ray's another one is there already.
_ENVIRONMENT = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}

_RESOURCES = {"CPU": "CPU", "GPU": "GPU", "Ascend": "NPU"}
"""What Ray calls a device of ours."""


class Worker:
    """A process of Ray's with a model on a device.

    Args:
        task: what its rows have in common.
        number: of the worker, from 0 on.
    """

    def __init__(self, task: Task, number: int):
        os.environ.pop("DEVICE_ID", None)  # Ray lets the process see its own device alone, which is number 0 then
        quick_imports.prepare_process()
        self.task, self.number = task, number

    def load(self) -> None:
        """Load the model, which takes a while."""
        self.editor = loaded(self.task.args, self.number)

    def do(self, row: Row) -> dict[str, Any]:
        """The record of a row that is done, or failed."""
        return self.task.do(self.editor, row)


def records(args: Namespace, task: Task, queue: Queue) -> Iterator[dict[str, Any]]:
    """Do all rows of a queue; gives their records as they come.

    Args:
        args: of `mindiffedit batch`: `workers`, `ray_address`, `device` and `cores` count.
        task: what the rows have in common.
        queue: the rows.

    Raises:
        InputError: Ray is not installed or not to be reached, there are fewer devices than workers, or the model cannot
            be loaded.
        RuntimeError: Every worker has died again and again while it loaded the model.
    """
    ray = _started(args)
    try:
        resource, count = _devices(ray, args)
        device: dict[str, dict[str, Any]] = {"CPU": {}, "GPU": {"num_gpus": 1}, "NPU": {"resources": {"NPU": 1}}}
        cores = args.cores if resource == "CPU" else 1
        start = ray.remote(num_cpus=cores, runtime_env={"env_vars": _ENVIRONMENT}, **device[resource])(Worker).remote
        yield from _Run(ray, lambda i: start(task, i), count, task, queue).records()
    finally:
        ray.shutdown()


class _Run:
    """Workers, what each of them has in hand, and how often they died."""

    def __init__(self, ray, start, count: int, task: Task, queue: Queue):
        self.ray, self.start, self.task, self.queue = ray, start, task, queue
        self.actors: dict[int, Any] = {}
        self.in_hand: dict[Any, tuple[int, Row | None]] = {}  # a worker and its row by Ray's reference; None: it loads
        self.idle: list[int] = []
        self.deaths: Counter = Counter()  # by row, and by worker since it loaded its model
        self.reason: BaseException | None = None  # why the last worker was given up
        for i in range(count):
            self._load(i)

    def records(self) -> Iterator[dict[str, Any]]:
        while self.queue or any(row is not None for _, row in self.in_hand.values()):
            while self.idle and self.queue:
                i = self.idle.pop()
                taken = self.queue.take(i)
                self.in_hand[self.actors[i].do.remote(taken)] = i, taken
            if not self.in_hand:
                raise self.reason or RuntimeError("no worker of Ray's is left.")
            (reference,), _ = self.ray.wait([*self.in_hand], num_returns=1)
            i, row = self.in_hand.pop(reference)
            record = self._record(reference, i, row)
            if record is not None:
                yield record

    def _load(self, i: int) -> None:
        """Start a worker, or another one in its place."""
        self.actors[i] = self.start(i)
        self.in_hand[self.actors[i].load.remote()] = i, None

    def _record(self, reference, i: int, row: Row | None) -> dict[str, Any] | None:
        """What a worker gave for its row; None if that was nothing."""
        errors = self.ray.exceptions
        try:
            record = self.ray.get(reference)
        except errors.RayTaskError as error:  # it lives, and cannot load the model: the next one could not, either
            self.reason = error.cause if isinstance(error.cause, Exception) else error
            self._return(row)
            return None
        except errors.RayError as error:
            return self._after_death(i, row, error)
        if row is None:
            self.deaths[i] = 0
        self.idle.append(i)
        return record

    def _after_death(self, i: int, row: Row | None, error: BaseException) -> dict[str, Any] | None:
        """Replace a worker; the record of its row where that is given up."""
        self.ray.kill(self.actors[i])  # Ray may only have lost sight of it
        what = i if row is None else row.id
        self.deaths[what] += 1
        if row is None and self.deaths[what] >= MAX_DEATHS:
            self.reason = RuntimeError(f"the workers die while they load the model: {first_line(error)}.")
            return None
        self._load(i)
        if row is not None and self.deaths[what] >= MAX_DEATHS:
            return self.task.failed(row, f"{MAX_DEATHS} workers have died of it; the last: {_cause(error)}.")
        self._return(row)
        return None

    def _return(self, row: Row | None) -> None:
        if row is not None:
            self.queue.put_back(row)


def _cause(error: BaseException) -> str:
    """What Ray says of a death: its last line that has words, which is the reason."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


# --- starting ----------------------------------------------------------------------------------------


def _started(args: Namespace):
    """Ray, connected to a cluster or started on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if args.ray_address is not None:
        _check_address(args.ray_address)
    else:
        # Its ports are open to this machine only; the name is that of the systems that this was made for.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--workers and --ray-address need Ray ({why}); install it: pip install 'mindiffedit[ray]'.",
            why=first_line(error),
        ) from error
    quiet = dict(log_to_driver=False, logging_level="ERROR")
    if args.ray_address is not None:
        try:
            ray.init(address=args.ray_address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                "--ray-address {address}: there is no cluster to join ({why}); start one by `ray start --head`, and "
                "set RAY_AUTH_MODE=token where it asks for a token.",
                address=args.ray_address,
                why=first_line(error),
            ) from error
    else:
        cores = len(os.sched_getaffinity(0))
        ray.init(
            address="local",
            num_cpus=max(cores, args.workers * args.cores),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            **quiet,
        )
    return ray


def _check_address(address: str) -> None:
    """Ray itself tries for minutes where nobody answers."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            "--ray-address {address}: nobody answers there ({why}); give HOST:PORT of a cluster's head, as `ray start "
            "--head` says it.",
            address=address,
            why=first_line(error),
        ) from error


def _devices(ray, args: Namespace) -> tuple[str, int]:
    """What Ray calls the device, and how many workers there will be: as many as asked for, or one for each."""
    there = ray.cluster_resources()
    others = [name for name in ("NPU", "GPU") if there.get(name)]
    if args.device is None and others:
        raise InputError(
            "Ray sees {count:g} {name}s; say by --device whether the workers run on them, or --device CPU.",
            count=there[others[0]],
            name=others[0],
        )
    resource = _RESOURCES[args.device or "CPU"]
    most = int(there.get(resource, 0) / (args.cores if resource == "CPU" else 1))
    count = args.workers or most
    if not 0 < count <= most:
        raise InputError(
            "--workers {count}: what Ray sees of {name} is enough for {most}; give at most that many.",
            count=count,
            name=resource,
            most=most,
        )
    return resource, count
