"""The server: OpenAI's client against it, its queue, what it refuses, what it fetches, and hostile requests.

Most tests run with an editor that computes nothing; what it is asked is checked as by the real one. A few run the demo
model, over a connection, under uvicorn.
"""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mindiffedit import demo
from mindiffedit.cli import command as cli
from mindiffedit.options import NumericalError
from mindiffedit.service import editor as editor_module
from mindiffedit.service import fetching, server
from mindiffedit.service.editor import OPTIONS, Cancelled, Edited, Editor
from mindiffedit.service.fields import Limits
from mindiffedit.service.server import Server, Settings, create_app

DEADLINE = 60
"""Seconds after which a test gives up what it waits for."""

HTTP = httpx.Client(timeout=DEADLINE)

TEXTS = {"prompt": demo.SAMPLE_PROMPTS["target"], "source_prompt": demo.SAMPLE_PROMPTS["source"]}


def file_of(picture, kind="PNG"):
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
PNG = file_of(PICTURE)


class FakeEditor:
    """Gives every picture back, when `gate` is open; checks options as the real one does."""

    model, device, captions, graphs_made = "demo", "CPU", False, 7

    def __init__(self):
        self.gate, self.started, self.cancelled = threading.Event(), queue.Queue(), queue.Queue()
        self.gate.set()
        self.fault = None

    def keep_sizes(self, count):
        pass

    def check(self, picture, options, mask=None, *, command="edit"):
        with editor_module._as_given():
            args = editor_module._parsed(command, options)
            args.picture, args.mask = picture, mask
            editor_module.read_pictures(editor_module.begin(args))

    def _run(self, options, cancelled):
        self.started.put(dict(options))
        while not self.gate.wait(0.01):
            if cancelled is not None and cancelled.is_set():
                self.cancelled.put(dict(options))
                raise Cancelled
        if self.fault is not None:
            raise self.fault

    def edit(self, picture, options, *, mask=None, cancelled=None, **_):
        self._run(options, cancelled)
        marked = np.ones((1, 2, 2)) if mask is None else np.asarray(mask.convert("L"))[None] / 255
        settings = {**options, "report": {"change_outside": float("nan")}}
        return Edited(picture, marked, None, None, None, None, settings, {"edit": 0.2}, ())

    def find_mask(self, picture, options, *, cancelled=None, **_):
        self._run(options, cancelled)
        return np.array([[[0, 1]]]), np.zeros((1, 1, 2))


@pytest.fixture
def fake():
    return FakeEditor()


@contextlib.contextmanager
def called(editor, **options):
    """A client of an application in this process."""
    with TestClient(create_app(editor, Settings(**options)), base_url="http://127.0.0.1:8000") as client:
        yield client


@contextlib.contextmanager
def live(editor, **options):
    """A server on a port of the loopback device; gives its address and the uvicorn server."""
    running = Server(create_app(editor, Settings(**options)), port=0, log_level="error")
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        until(lambda: running.started)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", running
    finally:
        running.should_exit = True
        thread.join(DEADLINE)
        assert not thread.is_alive()


def until(condition, deadline=DEADLINE):
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def post(client, path="/v1/images/edits", files=None, headers=None, **fields):
    files = {"image": ("p.png", PNG)} if files is None else files
    return client.post(path, files=files, data={**TEXTS, **fields}, headers=headers)


def form(client, **fields):
    """A request without a file."""
    return client.post("/v1/images/edits", files={name: (None, value) for name, value in {**TEXTS, **fields}.items()})


def refused(answer, status, words="", param=None):
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
    assert param is None or error["param"] == param, error
    return error


def picture_of(data):
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


# --- OpenAI's client, the demo model, a connection ------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_editor():
    return Editor.load(Namespace(model="demo"))


@pytest.fixture(scope="module")
def address(demo_editor):
    with live(demo_editor, token="a secret") as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="a secret", max_retries=0) as client:
        yield client


SAMPLE = demo.sample_picture().read_bytes()
QUICK = {"steps": 6, "seed": 3}


def test_an_edit_by_openai_s_client(client, demo_editor):
    result = client.images.edit(
        image=demo.sample_picture().open("rb"),
        prompt=TEXTS["prompt"],
        model="gpt-image-1",
        n=2,
        size="auto",
        response_format="b64_json",
        extra_body={**QUICK, "source_prompt": TEXTS["source_prompt"]},
    )
    sample = PIL.Image.open(demo.sample_picture())
    assert result.size == f"{sample.width}x{sample.height}" and result.output_format == "png" and len(result.data) == 2
    options = {"target": TEXTS["prompt"], "source": TEXTS["source_prompt"], **QUICK}
    for seed, one in zip((3, 4), result.data):
        expected = demo_editor.edit(sample, {**options, "seed": seed})
        np.testing.assert_array_equal(np.asarray(picture_of(one.b64_json)), np.asarray(expected.image))
        assert one.settings["seed"] == seed and one.settings["report"]["mask_coverage"] == expected.mask.mean()


def test_masks_of_both_kinds(client, demo_editor):
    sample = PIL.Image.open(demo.sample_picture())
    white = np.zeros(sample.size[::-1], np.uint8)
    white[32:80, 40:96] = 255
    clear = sample.convert("RGBA")
    clear.putalpha(PIL.Image.fromarray(255 - white))
    body = {**QUICK, "source_prompt": TEXTS["source_prompt"]}
    results = []
    for mask in (file_of(PIL.Image.fromarray(white)), file_of(clear)):
        one = client.images.edit(image=SAMPLE, mask=mask, prompt=TEXTS["prompt"], extra_body=body).data[0]
        results.append(np.asarray(picture_of(one.b64_json)))
    np.testing.assert_array_equal(*results)
    changed = (results[0] != np.asarray(sample.convert("RGB"))).any(axis=2)
    assert changed[32:80, 40:96].any() and not changed[:16].any()


def test_the_mask_alone(address, demo_editor):
    headers = {"Authorization": "Bearer a secret"}
    answer = post(HTTP, f"{address}/v1/masks", {"image": SAMPLE}, headers, **{k: str(v) for k, v in QUICK.items()})
    assert answer.status_code == 200, answer.text
    sample = PIL.Image.open(demo.sample_picture())
    options = {"target": TEXTS["prompt"], "source": TEXTS["source_prompt"], **QUICK}
    mask, _ = demo_editor.find_mask(sample, options)
    (one,) = answer.json()["data"]
    picture = picture_of(one["b64_json"])
    assert picture.size == sample.size and one["mask_share"] == mask.mean() and 0 < mask.mean() < 1
    assert set(np.unique(np.asarray(picture))) == {0, 255}


def test_errors_as_openai_s_client_knows_them(address, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=SAMPLE, prompt="a pear")
    assert caught.value.type == "invalid_request_error" and "`source_prompt` is missing" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=SAMPLE, prompt="a pear", size="30x4000", extra_body={"source_prompt": "an apple"})
    assert caught.value.param == "size" and "crop it first" in caught.value.message
    with openai.OpenAI(base_url=f"{address}/v1", api_key="another", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.images.edit(image=SAMPLE, prompt="a pear")
    assert [model.id for model in client.models.list()] == ["demo"]


@pytest.mark.tools
def test_the_command(tmp_path, blip_folder):
    """Nothing is compiled after the warm-up. SIGTERM while an edit runs: its answer comes, then the process ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "mindiffedit", "serve", "--port", str(port), "--warm-up", "128x128"]
    argv += ["--caption-model", str(blip_folder)]
    environment = {**os.environ, "MINDIFFEDIT_TOKEN": "a secret", "PYTHONPATH": os.pathsep.join(sys.path)}
    address, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer a secret"}
    with subprocess.Popen(argv, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:

            def ready():
                assert process.poll() is None, process.stderr.read()
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"{address}/readyz").status_code == 200

            until(ready, 4 * DEADLINE)

            def metrics():
                return HTTP.get(f"{address}/metrics", headers=headers).text

            def made():
                return re.search("^mindiffedit_graphs_made (.*)$", metrics(), re.MULTILINE)[1]

            before = made()
            for fields in ({}, {"preset": "fast"}, {"preset": "exact", "steps": "7"}, {"strength": "0.4", "n": "2"}):
                assert post(HTTP, f"{address}/v1/images/edits", {"image": SAMPLE}, headers, **fields).status_code == 200
            # The captioner says what the picture shows.
            answer = HTTP.post(
                f"{address}/v1/images/edits", files={"image": SAMPLE}, data={"prompt": "a pear"}, headers=headers
            )
            assert answer.status_code == 200 and answer.json()["data"][0]["settings"]["caption"]
            assert made() == before
            answers = queue.Queue()
            send = functools.partial(post, HTTP, f"{address}/v1/images/edits", {"image": SAMPLE}, headers, steps="100")
            thread = threading.Thread(target=lambda: answers.put(send()))
            thread.start()
            until(lambda: "mindiffedit_running 1.0" in metrics())
            process.send_signal(signal.SIGTERM)
            assert answers.get(timeout=DEADLINE).status_code == 200
            assert process.wait(DEADLINE) in (0, -signal.SIGTERM)
            thread.join()
        finally:
            process.kill()
            process.stderr.close()


# --- the queue -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sent(count, address, **fields):
    """Requests that are on their way; their answers come into the queue that it gives."""
    answers = queue.Queue()

    def send(number):
        answers.put(post(HTTP, f"{address}/v1/images/edits", seed=str(number), **fields))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join(DEADLINE)


def test_beyond_the_queue_is_429(fake):
    fake.gate.clear()
    with live(fake, max_waiting=1) as (address, running):
        with sent(2, address) as answers:
            until(lambda: running.worker.held == 2)
            answer = httpx.post(f"{address}/v1/images/edits")  # before anything of it is read
            error = refused(answer, 429, "the queue of 2 requests is full")
            assert int(answer.headers["Retry-After"]) >= 1 and error["code"] == "queue_full"
            fake.gate.set()
            assert [answers.get(timeout=DEADLINE).status_code for _ in range(2)] == [200, 200]
        assert running.worker.held == 0


def leave(address, **fields):
    """A client that sends a whole request, and gives the connection to be closed."""
    request = httpx.Request("POST", f"{address}/v1/images/edits", files={"image": PNG}, data={**TEXTS, **fields})
    host, port = request.url.host, request.url.port
    connection = socket.create_connection((host, port))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return connection


def test_a_client_that_goes_away_cancels(fake):
    fake.gate.clear()
    with live(fake) as (address, running):
        worker = running.worker
        first = leave(address, seed="1")
        assert fake.started.get(timeout=DEADLINE)["seed"] == "1"
        second = leave(address, seed="2")
        until(lambda: worker.held == 2)
        second.close()  # the one that waits
        until(lambda: worker.held == 1)
        first.close()  # the one that runs
        assert fake.cancelled.get(timeout=DEADLINE)["seed"] == "1"
        fake.gate.set()
        assert post(HTTP, f"{address}/v1/images/edits", seed="3").status_code == 200
        assert fake.started.get(timeout=DEADLINE)["seed"] == "3" and worker.held == 0


def test_closing_ends_what_runs_and_refuses_the_rest(fake):
    fake.gate.clear()
    with live(fake) as (address, running):
        with sent(1, address) as first:
            fake.started.get(timeout=DEADLINE)
            with sent(2, address) as others:
                until(lambda: running.worker.held == 3)
                running.should_exit = True
                for _ in range(2):
                    refused(others.get(timeout=DEADLINE), 503, "closing")
                fake.gate.set()
                assert first.get(timeout=DEADLINE).status_code == 200


def test_time_is_limited(fake):
    fake.gate.clear()
    with called(fake, max_seconds=0.05) as client:
        assert refused(post(client), 504, "more than 0.05 s")["code"] == "timeout"
        fake.cancelled.get(timeout=DEADLINE)
        fake.gate.set()
        assert client.get("/healthz").status_code == 200


def test_not_ready_before_the_warm_up(fake):
    fake.gate.clear()
    with called(fake, warm_up=[(64, 48)]) as client:
        answer = client.get("/readyz")
        assert refused(answer, 503, "warming up") and client.get("/healthz").json() == {"status": "ok"}
        fake.gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
    presets = [fake.started.get_nowait()["preset"] for _ in range(3)]
    assert presets == ["exact", "balanced", "fast"]


def test_a_warm_up_that_fails_is_never_ready(fake, caplog):
    fake.fault = RuntimeError("no kernel")
    with called(fake, warm_up=[(64, 48)]) as client:
        until(lambda: "the warm-up failed" in caplog.text)
        refused(client.get("/readyz"), 503)


# --- what a request says -------------------------------------------------------------------------------------------


def test_fields(fake):
    with called(fake) as client:
        answer = post(client, n="2", seed="7", soft_mask="true", user="me", quality="high")
        assert answer.status_code == 200
        first, second = (fake.started.get_nowait() for _ in range(2))
        assert first == {"target": TEXTS["prompt"], "source": TEXTS["source_prompt"], "seed": "7", "soft_mask": "true"}
        assert second["seed"] == 8
        data = answer.json()["data"]
        assert len(data) == 2 and data[0]["settings"]["report"] == {"change_outside": None}  # JSON has no NaN
        assert np.array_equal(np.asarray(picture_of(data[0]["b64_json"])), np.asarray(PICTURE))
        (one,) = post(client, response_format="url", output_format="webp").json()["data"]
        assert one["url"].startswith("data:image/webp;base64,")
        files = [("image[]", ("p.png", PNG))]  # as the client calls the pictures of a list
        assert post(client, files=files).status_code == 200
        answer = post(client, size="28x20")
        assert answer.json()["size"] == "28x20"
        assert picture_of(answer.json()["data"][0]["b64_json"]).size == (28, 20)
        fake.started = queue.Queue()
        post(client, size="512")
        assert fake.started.get_nowait()["size"] == "512"


def test_fields_that_do_not_fit(fake):
    with called(fake) as client:
        for fields, param, words in (
            ({"prompt": ""}, "prompt", "is empty"),
            ({"steps": "many"}, "steps", "invalid int value"),
            ({"source_prompt": TEXTS["prompt"]}, None, "`source_prompt` and `prompt` are the same text"),
            ({"n": "11"}, "n", "one of 1, 2"),
            ({"n": "0"}, "n", "one of 1, 2"),
            ({"size": "big"}, "size", "WIDTHxHEIGHT"),
            ({"size": "0x9"}, "size", "WIDTHxHEIGHT"),
            ({"size": "99999x99999"}, "size", "WIDTHxHEIGHT"),
            ({"size": "5000"}, "size", "at most 1024"),
            ({"size": "56x56"}, "size", "crop it first"),
            ({"response_format": "gif"}, "response_format", "one of b64_json, url"),
            ({"stream": "true"}, None, "there is no field 'stream'"),
            ({"target": "x"}, None, "there is no field 'target'"),
            ({"lora": "/etc/passwd"}, None, "there is no field 'lora'"),
            ({"mask_combine": "union"}, None, "`mask`"),
            ({"seed": "x" * 3000}, "seed", "..."),
        ):
            refused(post(client, **fields), 400, words, param)
        refused(client.post("/v1/images/edits", files={"image": PNG}), 400, "`prompt` is missing", "prompt")
        refused(client.post("/v1/images/edits", files={"steps": PNG}, data=TEXTS), 400, "`steps` has to be a text")
        refused(form(client), 400, "`image` is missing")
        refused(post(client, "/v1/masks", files={"image": PNG, "mask": PNG}), 400, "no field 'mask'")
        refused(client.post("/v1/images/edits", json={"prompt": "x"}), 415, "multipart/form-data")
        twice = [("image", PNG), ("image", PNG)]
        refused(post(client, files=twice), 400, "'image' is there twice")
        refused(client.get("/v1/images/edits"), 405)
        refused(client.get("/nothing"), 404)
        assert fake.started.empty()


def test_pictures_that_do_not_fit(fake):
    animation = io.BytesIO()
    PICTURE.save(animation, "GIF", save_all=True, append_images=[PICTURE.rotate(90)])
    wide = file_of(PIL.Image.new("1", (5000, 4000)))
    with called(fake) as client:
        for content, words in (
            (b"", "empty file"),
            (b"no picture", "not a picture"),
            (PNG[:200], "truncated or damaged"),
            (animation.getvalue(), "animated"),
            (wide, "at most 16777216 pixels"),
        ):
            refused(post(client, files={"image": content}), 400, words, "image")
            refused(post(client, files={"image": PNG, "mask": content}), 400, words, "mask")
        assert fake.started.empty()


def test_no_path_is_read_and_none_is_said(fake, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    with called(fake) as client:
        for value in (str(secret), f"file://{secret}", "http://127.0.0.1/p.png", "data:image/png;base64,AAAA"):
            refused(form(client, image=value), 400, "`image` has to be a file")
            answer = client.post("/v1/images/edits", files={"image": PNG}, data={**TEXTS, "mask": value})
            refused(answer, 400, "`mask` has to be a file")
        fake.fault = OSError(28, "No space left on device", str(secret))
        assert "secret" not in json.dumps(refused(post(client), 500))
        fake.fault = NumericalError("NaN in the edit, step 3.")
        refused(post(client), 400, "NaN in the edit")


# --- who may call, and how much ------------------------------------------------------------------------------------


def test_the_token(fake):
    with called(fake, token="a secret") as client:
        for headers in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic a secret"},
            {"Authorization": "é"},
        ):
            headers = {name: value.encode() for name, value in headers.items()}
            for answer in (post(client, headers=headers), client.get("/metrics", headers=headers)):
                assert refused(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert post(client, headers={"Authorization": "bearer a secret"}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/docs").status_code == 200


def test_pages_of_other_origins(fake):
    with called(fake, origins=["https://page.example"]) as client:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:8001"):
            refused(post(client, headers={"Origin": origin}), 403)
        assert post(client, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
        answer = post(client, headers={"Origin": "https://page.example"})
        assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
    with called(fake) as client:
        answer = post(client)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_names_of_the_server(fake):
    with called(fake, hosts=["127.0.0.1", "localhost", "::1"]) as client:
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert client.get("/healthz", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", ""):
            refused(client.get("/healthz", headers={"Host": host}), 421)


def test_headers_of_every_answer(fake):
    with called(fake) as client:
        for answer in (client.get("/healthz"), client.get("/nothing"), post(client), post(client, n="x")):
            assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert answer.headers["Cache-Control"] == "no-store"
        assert "script-src" in client.get("/docs").headers["Content-Security-Policy"]
        fake.fault = RuntimeError("a bug")
        assert post(client).headers["X-Content-Type-Options"] == "nosniff"


def test_bodies_are_limited(fake):
    with called(fake, limits=Limits(body=20_000)) as client:
        assert post(client).status_code == 200
        refused(post(client, negative="x" * 15_000), 413)

        def chunks():
            for _ in range(100):
                yield b"x" * 1000

        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        refused(client.post("/v1/images/edits", content=chunks(), headers=kind), 413)
        refused(client.get("/healthz", headers={"Content-Length": "9" * 15}), 413)
    with called(fake) as client:
        many = {f"field{number}": "x" for number in range(200)}
        refused(post(client, **many), 400, "Too many fields")
        refused(post(client, negative="x" * 2**17), 400, "exceeded maximum size")


def test_a_body_that_does_not_come(fake, monkeypatch):
    monkeypatch.setattr(server, "MAX_READING", 0.05)
    with live(fake) as (address, running):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
            head = "Host: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 100\r\n\r\n--"
            connection.sendall(f"POST /v1/images/edits HTTP/1.1\r\n{head}".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        until(lambda: running.worker.held == 0)


def test_numbers_for_prometheus(fake):
    with called(fake) as client:
        post(client)
        post(client, n="x")
        post(client, "/v1/masks")
        client.get("/nothing/of/mine")
        text = client.get("/metrics").text
    assert 'mindiffedit_requests_total{path="/v1/images/edits",status="200"} 1.0' in text
    assert 'mindiffedit_requests_total{path="/v1/images/edits",status="400"} 1.0' in text
    assert 'mindiffedit_requests_total{path="other",status="404"} 1.0' in text and "/nothing" not in text
    assert 'mindiffedit_stage_seconds_sum{stage="edit"} 0.2' in text
    assert 'mindiffedit_stage_seconds_count{stage="mask"} 1.0' in text
    assert "mindiffedit_graphs_made 7.0" in text and "mindiffedit_requests_held 0.0" in text
    assert float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) > 1e7


def test_the_documentation_names_every_option(fake):
    with called(fake) as client:
        paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    fields = {{"target": "prompt", "source": "source_prompt"}.get(name, name) for name in OPTIONS}
    assert fields <= set(schema["properties"]) and schema["required"] == ["image", "prompt"]
    assert {"/v1/masks", "/healthz", "/readyz", "/metrics"} <= set(paths)


def test_options_of_the_command(capsys, monkeypatch):
    for argv, words in (
        (["--port", "70000"], "--port is 70000"),
        (["--token", " "], "--token is empty"),
        (["--warm-up", "128"], "no list of sizes"),
        (["--max-body", "0"], "no whole number above 0"),
        (["--model", "/no/such"], "no such folder"),
    ):
        assert cli.main(["serve", *argv]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mindiffedit.service.server")
    monkeypatch.delattr("mindiffedit.service.server")
    assert cli.main(["serve"]) == 2
    assert "pip install 'mindiffedit[serve]'" in capsys.readouterr().err


# --- URLs ----------------------------------------------------------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    """Answers that the tests put here, by path: status, headers, and chunks that a function gives."""

    answers = {}

    def do_GET(self):
        status, headers, chunks = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            for chunk in chunks():
                self.wfile.write(chunk)
                self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A site on this machine, whose address is taken for a public one."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        public = fetching.is_public
        monkeypatch.setattr(fetching, "is_public", lambda text: text == "127.0.0.1" or public(text))
        monkeypatch.setattr(Site, "answers", {"/p.png": (200, {}, lambda: [PNG])})
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_urls_where_they_are_allowed(fake, site):
    with called(fake, limits=Limits(urls=True)) as client:

        def asked(url):
            return form(client, image=url)

        assert asked(f"{site}/p.png").status_code == 200
        Site.answers["/there"] = (302, {"Location": "/p.png"}, lambda: [])
        assert asked(f"{site}/there").status_code == 200
        Site.answers["/inside"] = (302, {"Location": "http://10.0.0.1/p.png"}, lambda: [])
        refused(asked(f"{site}/inside"), 400, "not on the public internet", "image")
        Site.answers["/file"] = (302, {"Location": "file:///etc/passwd"}, lambda: [])
        refused(asked(f"{site}/file"), 400, "no http(s) URL")
        Site.answers["/on"] = (302, {"Location": "/on"}, lambda: [])
        refused(asked(f"{site}/on"), 400, "leads on more than")
        Site.answers["/gone"] = (404, {}, lambda: [])
        refused(asked(f"{site}/gone"), 400, "answers 404")
        Site.answers["/text"] = (200, {}, lambda: [b"<html>"])
        refused(asked(f"{site}/text"), 400, "not a picture")
        for url in (
            "/etc/passwd",
            "file:///etc/passwd",
            "ftp://127.0.0.1/",
            "http://",
            "http://a:b@127.0.0.1/",
            "gopher:",
        ):
            refused(asked(url), 400, "no http(s) URL", "image")


def test_urls_that_send_too_much_or_too_slowly(site, monkeypatch):
    Site.answers["/much"] = (200, {}, lambda: iter(functools.partial(bytes, 2**16), None))
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        fetching.fetch(f"{site}/much", 10**6)
    monkeypatch.setattr(fetching, "MAX_SECONDS", 0.3)
    waits = threading.Event()

    def drips():
        while not waits.wait(0.02):
            yield b"x"

    def stops():
        yield b"x"
        waits.wait(DEADLINE)

    for path, headers, chunks in (("/slow", {}, drips), ("/dead", {"Content-Length": "100"}, stops)):
        Site.answers[path] = (200, headers, chunks)
        with pytest.raises(ValueError, match="has not sent|does not answer"):
            fetching.fetch(site + path, 10**6)
    waits.set()


def test_a_name_is_resolved_once(site, monkeypatch):
    """A second look-up could give another address than the one that was judged."""
    port, asked = site.rpartition(":")[2], []

    def resolved(host, *_, **__):
        asked.append(host)
        address = "127.0.0.1" if host == "127.0.0.1" or asked == ["name.example"] else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, int(port)))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    assert fetching.fetch(f"http://name.example:{port}/p.png", 10**6) == PNG
    assert asked.count("name.example") == 1


def test_addresses_that_are_not_public():
    for text in (
        "127.0.0.1 10.1.2.3 172.16.0.1 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
        "240.0.0.1 198.18.0.1 ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 "
        "2002:7f00:1::"
    ).split():
        assert not fetching.is_public(text), text
    for text in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"):
        assert fetching.is_public(text), text
    for host in ("localhost", "2130706433", "0x7f.1", "127.1"):
        with pytest.raises(ValueError, match="not on the public internet"):
            fetching.public_address(host)


# --- hostile requests ----------------------------------------------------------------------------------------------

HOSTILE = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
TEXT = st.one_of(
    st.text(max_size=200),
    st.sampled_from(["", "0", "-1", "nan", "inf", "1e400", "9" * 400, "5e-324", "true", "{parameter}", "--steps=3"]),
    st.sampled_from(["1x1", "auto", "../../etc/passwd", "http://127.0.0.1/", "\0", "%s%n", "x" * 70_000, "`prompt`"]),
)


@pytest.fixture(scope="module")
def hostile():
    """A client, and what its answers have to be."""
    with called(FakeEditor(), max_seconds=DEADLINE) as client:

        def post(path="/v1/images/edits", **request):
            answer = client.post(path, **request)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
            if answer.status_code != 200:
                refused(answer, answer.status_code)
                assert len(answer.content) < 5000
            return answer

        yield post


@HOSTILE
@given(st.dictionaries(st.one_of(st.sampled_from([*OPTIONS, "n", "size", "response_format"]), TEXT), TEXT, max_size=6))
def test_hostile_fields(hostile, fields):
    for path in ("/v1/images/edits", "/v1/masks"):
        hostile(path, files={"image": PNG}, data={**TEXTS, **fields})


@HOSTILE
@given(st.binary(max_size=300), st.sampled_from(["multipart/form-data; boundary=x", "multipart/form-data", "", "x/y"]))
def test_hostile_bodies(hostile, content, kind):
    hostile(content=content, headers={"Content-Type": kind})


@HOSTILE
@given(
    st.lists(
        st.tuples(
            st.one_of(st.binary(max_size=30), st.sampled_from([b"image", b"prompt", b"mask", b"image[]"])),
            st.one_of(st.none(), st.binary(max_size=30)),
            st.one_of(st.binary(max_size=60), st.just(PNG)),
            st.one_of(st.just(b""), st.binary(max_size=40)),
        ),
        max_size=5,
    ),
    st.sampled_from(
        ["utf-8", "utf-16", "utf-7", "punycode", "idna", "unicode_escape", "undefined", "zip", "rot13", "é"]
    ),
    st.integers(0, 40),
)
def test_hostile_parts(hostile, parts, charset, cut):
    body = b""
    for name, filename, content, header in parts:
        body += b'--x\r\nContent-Disposition: form-data; name="' + name + b'"'
        body += b"" if filename is None else b'; filename="' + filename + b'"'
        body += b"\r\n" + header + b"\r\n\r\n" + content + b"\r\n"
    body += b"--x--\r\n"
    kind = f"multipart/form-data; boundary=x; charset={charset}".encode()
    hostile(content=body[: len(body) - cut], headers={"Content-Type": kind})


FILES = [file_of(PICTURE.convert(mode), kind) for mode, kind in (
    ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "TIFF"),
    ("RGB", "WEBP"), ("1", "BMP"), ("P", "GIF"), ("RGB", "PPM"), ("RGBA", "ICO"), ("RGB", "TGA"), ("RGB", "PCX"),
)]  # fmt: skip


@HOSTILE
@given(st.sampled_from(FILES), st.data())
def test_hostile_pictures(hostile, content, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged), 400) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
    for field in ("image", "mask"):
        hostile(files={"image": PNG, field: damaged}, data=TEXTS)


def test_requests_that_the_openapi_leads_to():
    with live(FakeEditor()) as (address, _):
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 6
        for operation in operations:

            @settings(HOSTILE, max_examples=25)
            @given(operation.as_strategy())
            def send(case):
                answer = case.call()
                assert answer.status_code < 500, answer.content

            send()


EXTREMES = [
    *({"steps": "1"}, {"strength": "0.001"}, {"guidance": "1e30"}, {"guidance": "0"}, {"mask_threshold": "1e-30"}),
    *({"mask_smoothing": "1e9"}, {"mask_edges": "64"}, {"feather": "1e4"}, {"seed": "-1"}, {"outliers": "none"}),
    *({"seed": str(2**64 - 1), "n": "2"}, {"source_prompt": ""}, {"negative": "", "guidance": "1.5"}, {"size": "8x8"}),
    *({"prompt": "pear " * 2000}, {"size": "1"}, {"mask_level": "auto"}, {"mask_level": "0"}, {"outliers": "0.001"}),
    *({"inversion": "noise"}, {"scheduler": "dpm"}, {"maps": "1"}, {"iterations": "1"}, {"reference": "true"}),
    *({"mask_erosion": "999"}, {"smallest_region": "99999"}, {"invert_guidance": "1e6"}, {"soft_mask": "true"}),
]


@pytest.mark.tools
@pytest.mark.parametrize("fields", EXTREMES, ids=str)
def test_extreme_options_and_the_demo_model(address, fields):
    headers, fields = {"Authorization": "Bearer a secret"}, {"steps": "3", "seed": "3", **fields}
    answer = post(HTTP, f"{address}/v1/images/edits", {"image": SAMPLE}, headers, **fields)
    assert answer.status_code in (200, 400), answer.text
