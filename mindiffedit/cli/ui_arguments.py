"""What `mindiffedit ui` takes beside the options of the model."""

from __future__ import annotations

import argparse

HOST = "127.0.0.1"


def build(ui: argparse.ArgumentParser) -> None:
    ui.add_argument("--host", metavar="NAME", default=HOST, help=_HOST)
    ui.add_argument("--port", metavar="N", type=int, help="(default: the first free one from 7860 on)")
    ui.add_argument("--share", action="store_true", help=_SHARE)


_HOST = "address to listen on; 0.0.0.0: all of this machine's, for whoever can reach it (default: %(default)s)"
_SHARE = "also make a public link, through a server of Gradio's makers; whoever has it can use the page"
