"""What `mindiffedit batch` takes beside the options of `edit`."""

from __future__ import annotations

import argparse


def add(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add them to the command's parser; returns it."""
    command.add_argument(
        "jobs",
        metavar="JOBS",
        help="a JSON object in each line, or a CSV with a header (.csv): picture, source, target, and if wanted id, "
        "output, mask, and any option of `edit` such as seed or mask_level; relative paths begin where this file is",
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder of the pictures and of results.jsonl, a line for each row; what is done there is not done again",
    )
    command.add_argument(
        "--cores",
        metavar="N",
        type=int,
        default=1,
        help="cores of the processor that a row is computed on, on a CPU; its pixels depend on how many, in the last "
        "digits, and not on the number of workers (default: 1)",
    )
    group = command.add_argument_group("several devices or machines")
    group.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes that have a model each, on devices or cores of their own, started by Ray "
        "(pip install 'mindiffedit[ray]'; default: none, the rows are done in this process)",
    )
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the Ray cluster that they run in; without --workers one for each of its devices",
    )
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="do every N-th row, from the I-th on (default: all; under msrun the share of the process's rank)",
    )
    return command
