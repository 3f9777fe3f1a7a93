"""The arguments of `mindiffedit serve` that are its own."""

from __future__ import annotations

import argparse
import re

TOKEN_VARIABLE = "MINDIFFEDIT_TOKEN"


def add(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds them to the command's parser, which is returned."""
    add = command.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0: any that is free (default: %(default)s)")
    what = "compile the graphs of pictures of these sizes before /readyz says yes"
    add("--warm-up", type=_sizes, default=[], metavar="WxH,...", help=what)
    group = command.add_argument_group("who may call")
    add = group.add_argument
    what = f"what clients have to send as a bearer token; better in the variable {TOKEN_VARIABLE}, which no list shows"
    add("--token", metavar="TEXT", help=f"{what} (default: none is asked for)")
    what = "a page's origin, such as https://example.org, that may call from a browser; several times for several"
    add("--allow-origin", metavar="URL", action="append", default=[], help=what)
    what = "a name by which the server may be called, where it listens on this machine alone; several times for several"
    add("--allow-host", metavar="NAME", action="append", default=[], help=what)
    what = "take http(s) URLs of pictures; those of this machine and its network are refused"
    add("--allow-urls", action="store_true", help=what)
    group = command.add_argument_group("limits")
    for name, default, text in (
        ("--max-waiting", 16, "requests that may wait for the one that runs; beyond, the answer is 429"),
        ("--max-body", 32, "MiB of a request"),
        ("--max-pixels", 4096 * 4096, "pixels of a picture"),
        ("--max-size", 1024, "largest N of a request's size: pixels of a side that the model works at"),
        ("--max-seconds", 600, "seconds of a request, its waiting included"),
    ):
        kind = _at_least_zero if name == "--max-waiting" else _positive
        group.add_argument(name, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    return command


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _at_least_zero(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size.strip()) for size in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 512x512,768x512")
    return [(int(size[1]), int(size[2])) for size in found if size]
