"""The arguments of `mindiffedit ui` that are its own."""

from __future__ import annotations

import argparse


def add(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds them to the command's parser, which is returned."""
    add = command.add_argument
    what = "address to listen on; 0.0.0.0: all of this machine's, for whoever can reach it"
    add("--host", metavar="NAME", default="127.0.0.1", help=f"{what} (default: %(default)s)")
    add("--port", metavar="N", type=int, help="port to listen on (default: the first free one from 7860 on)")
    what = "also make a public link, through a server of Gradio's makers; whoever has it can use the page"
    add("--share", action="store_true", help=what)
    add("--size", metavar="N", type=int, help="work on at most N x N pixels (default: about the model's own size)")
    return command
