"""What `mindiffedit ui` takes beside the options of the model."""

from __future__ import annotations

import argparse


def build(ui: argparse.ArgumentParser) -> None:
    ui.add_argument("--host", metavar="NAME", default="127.0.0.1", help=_HOST)
    ui.add_argument("--port", metavar="N", type=int, help=_PORT)
    ui.add_argument("--share", action="store_true", help=_SHARE)


_HOST = "address to listen on; 0.0.0.0: all of this machine's, for whoever can reach it (default: %(default)s)"
_PORT = "port to listen on (default: the first free one from 7860 on)"
_SHARE = "also make a public link, through a server of Gradio's makers; whoever has it can use the page"
