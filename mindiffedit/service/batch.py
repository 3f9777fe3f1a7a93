"""`mindiffedit batch`: the rows of a file, each an edit; what is done is not done again.

What makes the same pixels is done once: a row's options, its files, the model and the versions tell it from a changed
one. Rows run here one after the other, or by Ray (`batch_ray`); under `msrun` each process has its share of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import logging
import os
import re
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import xxhash

from mindiffedit import __version__
from mindiffedit.cli import checks, loading
from mindiffedit.cli.job import Job, working_limits
from mindiffedit.cli.wording import FAILED as FAILED_CODE
from mindiffedit.cli.wording import OK
from mindiffedit.errors import InputError, first_line
from mindiffedit.images import pictures, writing
from mindiffedit.service import editor
from mindiffedit.service.batch_queue import Queue
from mindiffedit.service.batch_rows import Row, read_rows
from mindiffedit.service.batch_table import DONE, FAILED, Table, latest_records
from mindiffedit.service.batch_task import Task, loaded

LIBRARIES = ("mindspore", "mindone")
"""A row is done again when mindiffedit or one of these has another version: they compute the pixels."""

_READERS = 16  # threads that look at files: it is the storage that they wait for
_MANY = 1000  # rows that are looked at together
_ORIENTATION = 0x0112  # of EXIF; from 5 on a picture lies on its side
_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")


def run(args: Namespace) -> tuple[str, dict[str, Any], int]:
    """Do all rows of `args.jobs` that are not done yet; returns a line for people, an object and the exit code.

    Raises:
        InputError: what is wrong with all rows: the jobs file, the folder, an option, the model.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # msrun starts the command once more, for a server that nobody asks
        return "the scheduler of msrun has no rows.", {"command": "batch", "rows": 0}, OK
    begun = time.perf_counter()
    _check(args)
    share, by_msrun = share_of(args), "MS_ROLE" in os.environ
    rows = read_rows(Path(args.jobs))
    folder = _folder(args.output)
    mine = rows if share is None else rows[share[0] - 1 :: share[1]]
    count = Counter({DONE: 0, FAILED: 0})
    with Table(folder, share) as table:
        job = editor.job_of_model(args)
        loading.find_model(job)
        loading.fetch_model(job)
        task = _task(args, job, folder)
        bad, todo = _sorted_out(task, rows, mine, args.quiet)
        earlier = len(mine) - len(bad) - len(todo)
        writing.remove_drafts([table.path, *(folder / row.output for row in todo)])
        queue = Queue(zip(todo, _sizes(task, job, todo, args.quiet)))
        with (
            _bar(total=len(mine), initial=earlier, disable=args.quiet) as bar,
            contextlib.closing(_records(args, task, queue, share)) as records,
        ):
            for record in itertools.chain((task.failed(row, str(row.error)) for row in bad), records):
                table.append(record)
                count[record["state"]] += 1
                bar.set_postfix(failed=count[FAILED], refresh=False)
                bar.update()
        if bad or todo:
            table.tidy(row.id for row in mine)
    result = {
        "command": "batch",
        "jobs": args.jobs,
        "output": args.output,
        "table": str(Path(args.output) / table.path.name),
        "rows": len(mine),
        **count,
        "earlier": earlier,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    line = "{table}: {rows} rows, {done} done, {failed} failed, {earlier} done before, {seconds:.1f} s".format(**result)
    # msrun ends all processes when one of them ends with another code, and a bad row is not the end of the run.
    return line, result, FAILED_CODE if count[FAILED] and not by_msrun else OK


# --- what was asked for ------------------------------------------------------------------------------


def _check(args: Namespace) -> None:
    checks.check_names(args)
    checks.check_numbers(vars(args))
    checks.mask_options_of(args)
    for name in ("workers", "cores"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise InputError("{parameter} has to be 1 or more, but is {count}.", f"--{name}", count=count)
    for name in ("workers", "ray_address"):
        if getattr(args, name) is not None and (args.shard is not None or "MS_ROLE" in os.environ):
            raise InputError(
                "{parameter} shares the rows out by Ray, and --shard and msrun do so without; leave one of them out.",
                f"--{name.replace('_', '-')}",
            )


def share_of(args: Namespace, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Which share of the rows this process does, (number from 1, of how many); None for all.

    It is that of --shard, else that of the process's rank under msrun or another launcher of Ascend's.

    Raises:
        InputError: what was given is no share.
    """
    if args.shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
        number, count = (int(part) for part in match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise InputError("--shard has to be I/N, from 1/N to N/N, but is {shard!r}.", shard=args.shard)
        return number, count
    # msrun sets RANK_ID, too, but to 0 for all processes of a machine where it does not know their ranks.
    names = ("MS_NODE_ID", "MS_WORKER_NUM") if "MS_ROLE" in environment else ("RANK_ID", "RANK_SIZE")
    rank, size = (environment.get(name, "") for name in names)
    if "MS_ROLE" not in environment and not (rank and size):
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(
            "the environment says no rank of this process: {rank_name} is {rank!r} and {size_name} {size!r}; give "
            "msrun --node_rank on each machine, or --shard I/N.",
            rank_name=names[0],
            rank=rank,
            size_name=names[1],
            size=size,
        )
    return None if size == "1" else (int(rank) + 1, int(size))


def _folder(name: str) -> Path:
    """The folder of the results, an absolute path; it is made where it is not there."""
    folder = Path(name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "--output {folder}: the folder cannot be made ({why}); give another.", folder=name, why=first_line(error)
        ) from error
    writing.check_writable(folder, "the results")
    return folder


def defaults_of(args: Namespace) -> dict[str, Any]:
    """The rows' options that stand on the command line."""
    options = {name: getattr(args, name, None) for name in editor.OPTIONS}
    if not options["reference"]:
        del options["reference"]
    return {name: value for name, value in options.items() if value is not None}


def identity(job: Job, args: Namespace) -> dict[str, Any]:
    """What tells a model and its way of running from another one: the content of its files, and options."""
    files = [] if job.single_file is None else [job.single_file]
    if job.folder is not None:
        files += [path for pattern in ("*.json", "*/*") for path in sorted(job.folder.glob(pattern))]
    files += [Path(path) for path, _ in job.loras + job.embeddings]
    if args.caption_model is not None and os.path.isdir(args.caption_model):
        files += sorted(Path(args.caption_model).glob("*"))
    total = xxhash.xxh3_128()
    for path in files:
        if path.suffix in _MODEL_FILES and path.is_file():
            total.update(path.name.encode("utf-8", "surrogateescape"))
            with open(path, "rb") as stream:
                while chunk := stream.read(2**22):
                    total.update(chunk)
    names = ("device", "cores", "mode", "dtype", "variant", "config", "no_safety_checker", "caption_model")
    return {
        "files": total.hexdigest(),
        "weights": [weight for _, weight in job.loras] + [word for _, word in job.embeddings],
        **{name: getattr(args, name) for name in names},
    }


# --- the rows ----------------------------------------------------------------------------------------


def _task(args: Namespace, job: Job, folder: Path) -> Task:
    versions = {"mindiffedit": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}
    home = Path(args.jobs).absolute().parent
    return Task(args, defaults_of(args), home, folder, identity(job, args), versions)


def _sorted_out(task: Task, rows: list[Row], mine: list[Row], quiet: bool) -> tuple[list[Row], list[Row]]:
    """Of the rows of this process those that cannot be done, and those that are still to be done.

    One that would overwrite what any row reads cannot be done.
    """
    inputs = {os.path.normpath(path): row for row in rows for path in task.paths(row).values() if path is not None}
    good: list[Row] = []
    bad: list[Row] = []
    for row in mine:
        reader = None if row.error else inputs.get(os.path.normpath(task.folder / row.output))
        if reader is not None:
            what = f"its output {row.output} would overwrite what row {reader.number} reads; give it another name."
            row = dataclasses.replace(row, error=what)
        (bad if row.error else good).append(row)
    known = latest_records(task.folder, {row.id for row in good})
    finished = _each(lambda row: task.is_finished(row, known.get(row.id)), good, "results", quiet)
    return bad, [row for row, is_finished in zip(good, finished) if not is_finished]


def _sizes(task: Task, job: Job, rows: list[Row], quiet: bool) -> list[tuple[int, int] | None]:
    """The size that the model works at for each row: that of its graphs; None where it is not known yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about pictures that are judged when they are read
        sizes = [*_each(lambda row: _picture_size(task.paths(row)["picture"]), rows, "sizes", quiet)]
    if not job.configs:  # a model of one file says what it works at when it is loaded
        return sizes
    limits = {size: working_limits(job.configs, size) for size in {_size_option(task, row) for row in rows}}
    return [size and pictures.working_size(size, *limits[_size_option(task, row)]) for row, size in zip(rows, sizes)]


def _size_option(task: Task, row: Row) -> int | None:
    size = str(task.options(row).get("size"))
    return int(size) if size.isdecimal() and 0 < int(size) <= checks.MAX_SIZE else None


def _picture_size(path: Path | None) -> tuple[int, int] | None:
    """(width, height) as its header says; None of an address, and of what is no picture, as its row will say."""
    if path is None:
        return None
    try:
        with PIL.Image.open(path) as picture:
            size = picture.size
            return size[::-1] if picture.getexif().get(_ORIENTATION, 1) >= 5 else size
    except Exception:  # a damaged header makes Pillow raise nearly anything
        return None


def _records(
    args: Namespace, task: Task, queue: Queue, share: tuple[int, int] | None
) -> Generator[dict[str, Any], None, None]:
    """The records of the rows of a queue, as they come."""
    if not queue:
        return
    if args.workers is not None or args.ray_address is not None:
        from mindiffedit.service import batch_ray

        yield from batch_ray.records(args, task, queue)
        return
    model = loaded(args, 0 if share is None else share[0] - 1)
    log = logging.getLogger("mindiffedit")
    log.setLevel(logging.ERROR)  # notes are in the rows' reports
    try:
        while queue:
            yield task.do(model, queue.take("here"))
    finally:
        log.setLevel(logging.NOTSET)


def _each(function: Callable[[Row], Any], rows: list[Row], what: str, quiet: bool) -> Iterator[Any]:
    """What a function that looks at files says of each row."""
    bar = _bar(desc=what, total=len(rows), disable=quiet or len(rows) < _MANY, leave=False)
    with bar, ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(rows), _MANY):
            for value in readers.map(function, rows[start : start + _MANY]):
                bar.update()
                yield value


def _bar(**options):
    """A progress bar on stderr: how many of how many, the rate, and the time that remains."""
    from tqdm import tqdm

    return tqdm(unit="row", file=sys.stderr, dynamic_ncols=True, **options)
