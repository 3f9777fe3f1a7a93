"""`mindiffedit serve`: the server under uvicorn, until it is told to end."""

from __future__ import annotations

import logging
import os
from argparse import Namespace

from mindiffedit.cli.serve_arguments import TOKEN_VARIABLE
from mindiffedit.errors import InputError, cut

_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_CONNECTIONS = 512


def serve(args: Namespace) -> tuple[str, dict]:
    """Load the model, and answer until a signal comes: what runs ends then, and the rest is refused."""
    try:
        from mindiffedit.service import server
    except ImportError as error:
        raise InputError(
            "`mindiffedit serve` needs {name}, which is not installed; pip install 'mindiffedit[serve]' installs it.",
            None,
            name=error.name or "FastAPI",
        ) from error
    from mindiffedit.service.editor import Editor
    from mindiffedit.service.fields import Limits
    from mindiffedit.service.worker import Worker

    if not 0 <= args.port < 2**16:
        raise InputError("{parameter} is {port}; give a number from 0 to 65535.", "--port", port=args.port)
    token = os.environ.get(TOKEN_VARIABLE) if args.token is None else args.token
    if token is not None and not token.strip():
        raise InputError("{parameter} is empty; leave it out, or give a long random text.", "--token")
    local = args.host in _OWN_NAMES
    settings = server.Settings(
        limits=Limits(args.max_body * 2**20, args.max_pixels, args.max_size, args.allow_urls),
        max_waiting=args.max_waiting,
        max_seconds=args.max_seconds,
        token=token,
        origins=args.allow_origin,
        hosts=(*_OWN_NAMES, *args.allow_host) if local else args.allow_host or None,
        warm_up=args.warm_up,
    )
    worker = Worker(settings.max_waiting)
    # Loaded where it is going to run: some devices belong to the thread that opened them.
    editor = worker.submit(Editor.load, args).result()
    # Of requests nothing is noted here: their clients are told what is to be said.
    for name in ("mindiffedit", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)

    running = server.Server(
        server.create_app(editor, settings, worker),
        host=args.host,
        port=args.port,
        log_level="warning" if args.quiet else "info",
        limit_concurrency=MAX_CONNECTIONS,
    )
    try:
        running.run()
    except SystemExit as error:  # uvicorn has said why on stderr
        raise OSError(f"nothing can listen on {cut(args.host, 100)}, port {args.port}") from error
    return f"served {editor.model} on {args.host}", {}
