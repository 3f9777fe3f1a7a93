"""The server: edits and masks over HTTP, as OpenAI's image-edit endpoint takes and gives them.

A request takes a place in the queue, is read and understood in the event loop and its thread pool, and waits for the
one thread that owns the device (`worker`). What is wrong with it is found before that. Errors have OpenAI's shape and
name no path; everything that is kept of a request is a number in the metrics.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mindiffedit import __version__, masks
from mindiffedit.cli.wording import on_one_line
from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images import writing
from mindiffedit.options import NumericalError
from mindiffedit.service.editor import Cancelled, Editor
from mindiffedit.service.fields import FORMATS, Asked, Limits, body_schema, field_of, in_fields, understood
from mindiffedit.service.worker import Busy, Closing, Worker

MAX_FIELDS = 64
MAX_FIELD = 64 * 2**10
MAX_READING = 60.0
"""Fields of a form, bytes of a text among them, and seconds in which a request's body has to be there."""

_WARM_UP_PRESETS = ("exact", "balanced", "fast")
_logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        limits: what a request may ask for.
        max_waiting: requests that may wait, beside the one that runs.
        max_seconds: a request, its waiting included.
        token: what clients have to send as a bearer token; None: nothing.
        origins: of pages in browsers that may call, beside the server's own, such as "https://example.org".
        hosts: names by which the server may be called; None: any. Where it listens on this machine alone, its own
            names keep a page elsewhere from reaching it by a name that it has led here.
        warm_up: sizes (width, height) of pictures whose graphs are compiled before the server is ready.
    """

    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 16
    max_seconds: float = 600.0
    token: str | None = None
    origins: Sequence[str] = ()
    hosts: Sequence[str] | None = None
    warm_up: Sequence[tuple[int, int]] = ()


class Refusal(HTTPException):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code, self.param = code, param

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {"message": on_one_line(self.detail), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status_code, self.headers)


def create_app(editor: Editor, settings: Settings | None = None, worker: Worker | None = None) -> FastAPI:
    """The application, for any ASGI server; `serve` in the command line runs it under uvicorn.

    Args:
        editor: with its model loaded.
        settings: None: the defaults.
        worker: what runs the edits; None: one of its own. It is closed with the application.
    """
    settings = settings or Settings()
    worker = worker or Worker(settings.max_waiting)
    metrics = _Metrics(editor, worker)
    stop, ready = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        warming = worker.submit(_warm_up, editor, settings.warm_up, stop)
        warming.add_done_callback(lambda done: _is_ready(done, ready))
        yield
        stop.set()
        worker.close()

    app = FastAPI(
        title="mindiffedit",
        version=__version__,
        description="Edits a picture by two sentences: what it shows, and what it should show.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.worker = worker
    app.add_middleware(_Guard, settings=settings, metrics=metrics)
    if settings.origins:
        headers = ["Authorization", "Content-Type"]
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=headers)

    @app.exception_handler(HTTPException)  # unknown paths and methods, too
    async def refused(request: Request, error):
        answer = error if isinstance(error, Refusal) else Refusal(error.status_code, str(error.detail))
        return answer.response()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_ERRORS)
    async def readyz() -> dict[str, str]:
        """Whether the graphs of the sizes that were to be warmed up are compiled."""
        if worker.closing or not ready.is_set():
            raise Refusal(503, "closing" if worker.closing else "warming up", code="not_ready", Retry_After="5")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers():
        """For Prometheus."""
        return Response(await run_in_threadpool(generate_latest, metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        model = {"id": editor.model, "object": "model", "created": 0, "owned_by": "mindiffedit"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/images/edits", openapi_extra=body_schema("edit"), responses=_ERRORS)
    async def edits(request: Request) -> dict[str, Any]:
        """A picture edited from `source_prompt` to `prompt`, in the mask or in what differs between the two."""
        return await _answered(request, "edit", lambda asked, cancelled: _edit(editor, asked, metrics, cancelled))

    @app.post("/v1/masks", openapi_extra=body_schema("mask"), responses=_ERRORS)
    async def found_masks(request: Request) -> dict[str, Any]:
        """Where `source_prompt` and `prompt` differ in the picture, white on black, at its size."""
        return await _answered(request, "mask", lambda asked, cancelled: _find_mask(editor, asked, metrics, cancelled))

    async def _answered(request: Request, command: str, work: Callable[[Asked, threading.Event], dict]):
        try:
            with worker.place():
                fields = await _fields(request)
                asked = await run_in_threadpool(_checked, editor, fields, command, settings.limits)
                cancelled = threading.Event()
                return await _result(request, worker.submit(work, asked, cancelled), cancelled, settings.max_seconds)
        except Busy as error:
            message = f"the queue of {worker.places} requests is full; try again in {error.retry_after} s."
            raise Refusal(429, message, code="queue_full", Retry_After=str(error.retry_after)) from error
        except Closing as error:
            raise Refusal(503, "the server is closing; try another.", code="closing", Retry_After="5") from error
        except (InputError, InputTypeError) as error:
            raise Refusal(400, in_fields(str(error)), param=field_of(error.parameter)) from error
        except NumericalError as error:
            raise Refusal(400, error.message, code="not_finite") from error

    return app


class Server(uvicorn.Server):
    """uvicorn's, which tells the application at once that it is to end: what waits would keep its connections open."""

    def __init__(self, app: FastAPI, **options):
        super().__init__(uvicorn.Config(app, server_header=False, ws="none", **options))
        self.worker: Worker = app.state.worker

    async def shutdown(self, sockets=None):
        self.worker.close()
        await super().shutdown(sockets)


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "a field does not fit",
        401: "the bearer token is missing or wrong",
        403: "from a page of another origin",
        408: "the body did not come in time",
        413: "the body is too large",
        415: "no form",
        421: "by a name that is not the server's",
        429: "the queue is full",
        503: "not ready, or closing",
        504: "it took too long",
    }.items()
}


# --- one request -----------------------------------------------------------------------------------


async def _fields(request: Request) -> dict[str, str | bytes]:
    """The fields of a form: texts, and the contents of files."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(415, "send a form, as multipart/form-data.")
    try:
        reading = request.form(max_files=4, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
        form = await asyncio.wait_for(reading, MAX_READING)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"the request was not here in {MAX_READING:.0f} s; send it faster.") from error
    except ValueError as error:  # a charset that decodes to no text
        raise Refusal(400, "the form cannot be read; send its texts in UTF-8.") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        fields: dict[str, str | bytes] = {}
        for key, value in form.multi_items():
            name = key.removesuffix("[]")  # as OpenAI's client calls a list
            if name in fields:
                raise InputError("{name!r} is there twice; give it once.", name, name=name)
            fields[name] = value if isinstance(value, str) else await value.read()
        return fields


def _checked(editor: Editor, fields: Mapping[str, str | bytes], command: str, limits: Limits) -> Asked:
    asked = understood(fields, command, limits)
    editor.check(asked.picture, asked.options, asked.mask, command=command)
    return asked


async def _result(request: Request, future, cancelled: threading.Event, seconds: float) -> dict[str, Any]:
    """The result of submitted work, unless time is up, the worker closes or the client goes."""
    gone = asyncio.create_task(_disconnected(request))
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientDisconnect if gone.done() else Refusal(504, f"it took more than {seconds:g} s.", code="timeout")
        if future.cancelled():
            raise Closing
        return await waiting
    finally:
        cancelled.set()  # nobody waits for it any more
        waiting.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- what the worker does --------------------------------------------------------------------------


def _edit(editor: Editor, asked: Asked, metrics: _Metrics, cancelled: threading.Event) -> dict[str, Any]:
    data = []
    for number in range(asked.count):
        options = dict(asked.options)
        if number:
            options["seed"] = int(options.get("seed", 0)) + number
        edited = editor.edit(asked.picture, options, mask=asked.mask, cancelled=cancelled)
        for stage, seconds in edited.seconds.items():
            metrics.seconds.labels(stage).observe(seconds)
        # JSON has no NaN.
        settings = json.loads(json.dumps(edited.settings), parse_constant=lambda name: None)
        data.append({**_encoded(edited.image, asked), "settings": settings})
    size = f"{edited.image.width}x{edited.image.height}"
    return {"created": int(time.time()), "data": data, "output_format": asked.format, "size": size}


def _find_mask(editor: Editor, asked: Asked, metrics: _Metrics, cancelled: threading.Event) -> dict[str, Any]:
    with metrics.seconds.labels("mask").time():
        mask, _ = editor.find_mask(asked.picture, asked.options, cancelled=cancelled)
    picture = masks.as_picture(mask, asked.picture.size)
    share = float(mask.mean(dtype=np.float64))
    return {"created": int(time.time()), "data": [{**_encoded(picture, asked), "mask_share": share}]}


def _encoded(picture: PIL.Image.Image, asked: Asked) -> dict[str, str]:
    text = base64.b64encode(writing.encoded(picture, FORMATS[asked.format])).decode()
    return {"url": f"data:image/{asked.format};base64,{text}"} if asked.as_url else {"b64_json": text}


def _warm_up(editor: Editor, sizes: Sequence[tuple[int, int]], stop: threading.Event) -> None:
    """Everything that an edit of these sizes may run, once; graphs do not depend on the number of steps."""
    editor.keep_sizes(len(sizes))
    texts = {"source": "a picture", "target": "another picture"}
    for size in sizes:
        picture = PIL.Image.linear_gradient("L").resize(size).convert("RGB")
        for preset in _WARM_UP_PRESETS:
            editor.edit(picture, {**texts, "preset": preset, "steps": 8, "strength": 1, "guidance": 5}, cancelled=stop)


def _is_ready(warming, ready: threading.Event) -> None:
    if warming.cancelled() or isinstance(warming.exception(), Cancelled):
        return
    if warming.exception() is None:
        ready.set()
    else:
        _logger.error("the warm-up failed; the server will not be ready", exc_info=warming.exception())


# --- every request ---------------------------------------------------------------------------------


class _Metrics:
    def __init__(self, editor: Editor, worker: Worker):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("mindiffedit_requests", "Answers.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "mindiffedit_stage_seconds",
            "Seconds of an edit's stages.",
            ["stage"],
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
            registry=registry,
        )
        for name, text, value in (
            ("mindiffedit_requests_held", "Requests in the queue, the one that runs among them.", lambda: worker.held),
            ("mindiffedit_running", "Whether something runs on the device.", lambda: worker.running),
            ("mindiffedit_graphs_made", "Graphs compiled, or read from the cache.", lambda: editor.graphs_made),
        ):
            Gauge(name, text, registry=registry).set_function(value)


class _Guard:
    """What holds for every request: who may ask, how much may be sent, the headers, and no answer but ours."""

    _HEADERS = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    # FastAPI's page has a script in it and loads the others from there.
    _OF_DOCS = (
        "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; connect-src 'self'; "
        "style-src 'unsafe-inline' https://cdn.jsdelivr.net; img-src 'self' data: https://fastapi.tiangolo.com; "
        "frame-ancestors 'none'"
    )
    _PATHS = ("/v1/images/edits", "/v1/masks", "/v1/models", "/healthz", "/readyz", "/metrics", "/docs")

    def __init__(self, app, settings: Settings, metrics: _Metrics):
        self.app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, status, size = scope["path"], 0, 0

        async def limited_receive():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.limits.body:
                raise Refusal(413, f"the request is longer than {self._settings.limits.body} bytes; send less.")
            return message

        async def counted_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in self._HEADERS.items():
                    headers.setdefault(name, value)
                if path == "/docs":
                    headers["Content-Security-Policy"] = self._OF_DOCS
            await send(message)

        try:
            self._admit(path, Headers(scope=scope))
            await self.app(scope, limited_receive, counted_send)
        except ClientDisconnect:
            status = 499  # nobody reads an answer
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted_send)
        except Exception:
            _logger.exception("a request failed")
            if status:
                raise
            await Refusal(500, "an error of the server; its log says which.").response()(scope, receive, counted_send)
        finally:
            self._metrics.requests.labels(path if path in self._PATHS else "other", status).inc()

    def _admit(self, path: str, headers: Headers) -> None:
        """Refuses who may not ask, and what says itself that it is too long."""
        settings, host = self._settings, headers.get("host", "")
        if settings.hosts is not None and _name_of(host) not in settings.hosts:
            raise Refusal(421, "the server is not known by this name; see its option --allow-host.")
        # A form can be sent from any page, without a browser's asking first.
        origin = headers.get("origin")
        if origin is not None and origin not in settings.origins and origin.partition("://")[2] != host:
            raise Refusal(403, "pages of another origin may not call; see the server's option --allow-origin.")
        if settings.token is not None and path.startswith(("/v1/", "/metrics")):
            kind, _, token = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(token.encode("latin-1"), settings.token.encode()):
                raise Refusal(
                    401, "send the server's token as `Authorization: Bearer TOKEN`.", code="invalid_api_key",
                    WWW_Authenticate="Bearer",
                )  # fmt: skip
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > settings.limits.body:
            raise Refusal(413, f"the request is longer than {settings.limits.body} bytes; send less.")


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
