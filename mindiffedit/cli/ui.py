"""The command `mindiffedit ui`: the page is there first, then the model is loaded, and both go on until interrupted."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import Future
from typing import Any

from mindiffedit.cli import checks
from mindiffedit.errors import InputError

MAX_PORT = 65535


def serve(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        InputError: Gradio is not installed, the address is none or taken, or the model cannot be loaded.
    """
    if args.port is not None and not 1 <= args.port <= MAX_PORT:
        raise InputError("--port {port} is none; give one from 1 to {most}.", port=args.port, most=MAX_PORT)
    checks.check_numbers({"size": args.size})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is to be removed is
    with tempfile.TemporaryDirectory(prefix="mindiffedit-ui-") as folder:
        _settle_gradio(folder)
        try:
            from mindiffedit.service.page import LAUNCH, build_page
        except ModuleNotFoundError as error:
            raise InputError("the page needs {name}; pip install 'mindiffedit[serve]'.", name=error.name) from error
        from mindiffedit.service.editor import Editor

        editor: Future[Editor] = Future()
        page = build_page(editor.result, of_demo=args.model == "demo", fixed={"size": args.size})
        address = {"server_name": args.host, "server_port": args.port, "share": args.share}
        try:
            _, url, shared = page.launch(**LAUNCH, **address, quiet=True, prevent_thread_lock=True)
        except OSError as error:
            raise InputError(
                "--host {host} and --port {port}: no page can be opened there; give another port, or none.",
                host=args.host,
                port=args.port,
            ) from error
        print(f"mindiffedit: the page is at {shared or url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        try:
            editor.set_result(Editor.load(args))
            page.block_thread()
        except BaseException as error:
            if not editor.done():
                editor.set_exception(error)  # for an edit that waits for it
            raise
        finally:
            page.close(verbose=False)
    return f"the page at {url} is closed", {}


def _settle_gradio(folder: str) -> None:
    """What Gradio reads when it is imported: pictures do not outlive the command, and nobody is told of it."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # It asks its own address whether it is there; a proxy would not know it.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
