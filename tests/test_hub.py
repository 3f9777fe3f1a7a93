"""Names of checkpoints: folders here, the hub's cache, and a hub of our own on this machine."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_files import COMMIT, MODEL_FILES, change_json, make_cache

import mindiffedit
from mindiffedit.checkpoints.hub import HubOptions, resolve_folder
from mindiffedit.checkpoints.layout import CheckpointError
from mindiffedit.checkpoints.models import load_components


def test_options_are_taken_from_a_method_s_further_arguments(tmp_path):
    arguments = {"cache_dir": tmp_path, "local_files_only": None, "revision": "v1", "weight_name": "a"}
    options = HubOptions.taken_from(arguments)
    assert options == HubOptions(tmp_path, revision="v1") and arguments == {"weight_name": "a"}
    assert options.keywords() == {
        "cache_dir": tmp_path,
        "force_download": False,
        "local_files_only": False,
        "token": None,
        "revision": "v1",
    }
    assert HubOptions(proxies={"https": "here"}).keywords()["proxies"] == {"https": "here"}
    with pytest.raises(TypeError, match="mirror"):
        mindiffedit.load_component("demo", "vae", mirror="elsewhere")
    with pytest.raises(ValueError, match="use_safetensors.*can run code"):
        HubOptions.taken_from({"use_safetensors": False})


# --- folders here ----------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """Connections are refused and counted."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("the test forbids connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_a_folder_is_itself(sd1_folder, no_network, monkeypatch):
    assert resolve_folder(sd1_folder) == sd1_folder
    options = HubOptions(revision="main", token="x", force_download=True)
    assert resolve_folder(str(sd1_folder), options) == sd1_folder
    # A relative folder wins over a hub id of the same spelling.
    monkeypatch.chdir(sd1_folder.parent.parent)
    assert resolve_folder("/".join(sd1_folder.parts[-2:])).is_dir()
    assert no_network == []


def test_a_path_that_is_not_there_is_not_looked_up(no_network):
    for name in ("./none", "../none/x", "/none/such", "~/none-such", "a/b/c", "a\\b", "-a/b.", "a b"):
        with pytest.raises(CheckpointError, match="no such folder.*no hub id"):
            resolve_folder(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(Path("some") / "folder")
    assert no_network == []


def test_names_of_the_wrong_kind(tmp_path):
    for name in (None, 3, ["a/b"]):
        with pytest.raises(TypeError, match="has to be a folder or a hub id"):
            resolve_folder(name)
    with pytest.raises(CheckpointError, match="the name is empty"):
        resolve_folder(" ")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file.*from_single_file"):
        resolve_folder(tmp_path / "model.ckpt")


# --- the hub's cache, offline ----------------------------------------------------------------------


def test_offline_mode(tmp_path, sd1_folder):
    """In a fresh interpreter with HF_HUB_OFFLINE=1: nothing is asked for, and nothing heavy is imported."""
    snapshot = make_cache(tmp_path / "home" / "hub", sd1_folder)
    code = (
        "import socket, sys\n"
        "def refuse(*_): print('CONNECTED')\n"
        "socket.socket.connect = refuse\n"
        "from mindiffedit.checkpoints.hub import resolve_folder\n"
        "print(resolve_folder('someone/tiny-model'))\n"
        "try: resolve_folder('someone/else')\n"
        "except ValueError as error: print(error)\n"
        "print('mindspore' in sys.modules, 'torch' in sys.modules)\n"
    )
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    environment.pop("HF_HUB_CACHE", None)
    environment["PYTHONPATH"] = str(Path(mindiffedit.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, refusal, imported = done.stdout.splitlines()
    assert found == str(snapshot) and imported == "False False"
    assert "someone/else is not a folder here" in refusal
    assert "offline mode is on. Go online once to download it, or give a checkpoint folder." in refusal


def test_local_files_only(tmp_path, sd1_folder, sd2_folder, no_network):
    snapshot = make_cache(tmp_path, sd1_folder)
    options = HubOptions(tmp_path, local_files_only=True)
    folder = resolve_folder("someone/tiny-model", options)
    assert folder == snapshot
    assert resolve_folder("someone/tiny-model", replace(options, revision=COMMIT)) == snapshot
    with pytest.raises(CheckpointError, match="at revision 'other', and offline mode is on"):
        resolve_folder("someone/tiny-model", replace(options, revision="other"))
    with pytest.raises(CheckpointError, match="nobody/none is not a folder here"):
        resolve_folder("nobody/none", options)

    make_cache(tmp_path, sd2_folder, repo="someone/half-a-model", skip=("unet",))
    with pytest.raises(CheckpointError, match="no safetensors weights for unet in the local cache"):
        resolve_folder("someone/half-a-model", options)
    assert resolve_folder("someone/half-a-model", options, skip=["unet"]).is_dir()
    assert no_network == []


def test_a_cached_model_when_the_hub_does_not_answer(tmp_path, sd1_folder, no_network):
    snapshot = make_cache(tmp_path, sd1_folder)
    assert resolve_folder("someone/tiny-model", HubOptions(tmp_path)) == snapshot
    with pytest.raises(CheckpointError, match="nobody/none is not a folder here.*hub could not be reached"):
        resolve_folder("nobody/none", HubOptions(tmp_path))
    assert no_network  # it was tried


# --- a hub of our own, on this machine -------------------------------------------------------------


class Hub:
    """A small stand-in for the hub on 127.0.0.1: one repository, its listing and its files.

    `requests` holds (method, path, Authorization) of every request.
    """

    def __init__(self, folder):
        self.folder = folder
        self.status = {}
        self.requests = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, code, body=b"", **headers):
                self.send_response(code)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[0] == "api":
                    repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                else:
                    repo, revision = "/".join(parts[:2]), parts[3]
                code, name = hub.status.get(repo, (200, ""))
                if code == 500 or (code == 403 and parts[0] != "api"):  # a gated model's listing is public
                    return self.answer(code, b"{}", X_Error_Code=name, X_Error_Message="no")
                if repo != "someone/tiny-model" and repo not in hub.status:
                    return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="no")
                if revision not in ("main", COMMIT):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no")
                if parts[0] == "api":
                    files = [p.relative_to(hub.folder).as_posix() for p in hub.folder.rglob("*") if p.is_file()]
                    body = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in sorted(files)]}
                    return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
                path = hub.folder.joinpath(*parts[4:])
                if not path.is_file():
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="no")
                body = path.read_bytes()
                tag = hashlib.sha256(body).hexdigest()
                return self.answer(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

            do_HEAD = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextlib.contextmanager
    def serving(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()


@pytest.fixture
def hub(checked_folder, tmp_path, monkeypatch):
    """A hub whose repository has, beside what is needed, all that is not."""
    from huggingface_hub import constants, file_download

    folder = Path(shutil.copytree(checked_folder, tmp_path / "served"))
    for extra in (
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / extra).write_bytes(b"not to be fetched unless asked for")
    server = Hub(folder)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server.serving():
        yield server


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_download_takes_what_is_needed_and_no_more(hub, checked_folder, tmp_path):
    cache = tmp_path / "cache"
    folder = resolve_folder("someone/tiny-model", HubOptions(cache, token="hf_secret"))
    assert files_of(folder) == files_of(checked_folder)
    assert {authorization for _, _, authorization in hub.requests} == {"Bearer hf_secret"}
    assert load_components(folder)["safety_checker"] is not None

    # Again: from the cache; only the state of the branch is asked for.
    hub.requests.clear()
    assert resolve_folder("someone/tiny-model", HubOptions(cache)) == folder
    assert all("/resolve/" not in path for _, path, _ in hub.requests)
    hub.requests.clear()
    assert resolve_folder("someone/tiny-model", HubOptions(cache, local_files_only=True)) == folder
    assert hub.requests == []
    hub.requests.clear()
    resolve_folder("someone/tiny-model", HubOptions(cache, force_download=True))
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for _, path, _ in hub.requests)


def test_components_that_are_not_wanted_are_not_downloaded(hub, checked_folder, tmp_path):
    folder = resolve_folder("someone/tiny-model", HubOptions(tmp_path / "cache"), skip={"safety_checker": None})
    assert files_of(checked_folder) - files_of(folder) == {MODEL_FILES["safety_checker"]}


def test_a_variant_and_the_plain_file_where_there_is_none(hub, tmp_path):
    folder = resolve_folder("someone/tiny-model", HubOptions(tmp_path / "cache"), variant="fp16")
    weights = {name for name in files_of(folder) if name.endswith(".safetensors")}
    assert weights == {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        MODEL_FILES["text_encoder"],
        MODEL_FILES["safety_checker"],
    }


def test_what_the_hub_refuses_becomes_one_sentence(hub, tmp_path):
    cache = tmp_path / "cache"
    hub.status |= {"someone/gated": (403, "GatedRepo"), "someone/broken": (500, "")}
    for name, options, message in (
        ("someone/none", {}, "someone/none is not a folder here.*no such repository, or a private one"),
        ("someone/tiny-model", {"revision": "v9"}, "no revision 'v9'"),
        ("someone/gated", {}, "restricted: accept the model's terms"),
        ("someone/broken", {}, "someone/broken is not a folder here"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve_folder(name, HubOptions(cache, **options))
        assert "\n" not in str(caught.value)


def test_a_repository_of_another_kind_costs_no_download(hub, tmp_path):
    change_json(hub.folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        resolve_folder("someone/tiny-model", HubOptions(tmp_path / "one"))
    assert not any(".safetensors" in path for _, path, _ in hub.requests)
    (hub.folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="has no model_index.json"):
        resolve_folder("someone/tiny-model", HubOptions(tmp_path / "two"))
    assert not any(".safetensors" in path for _, path, _ in hub.requests)


def test_a_repository_with_pickles_only(hub, tmp_path):
    (hub.folder / MODEL_FILES["unet"]).unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights for unet in what the hub gave.*Pickle"):
        resolve_folder("someone/tiny-model", HubOptions(tmp_path / "cache"))
    assert not any(path.endswith(".bin") for _, path, _ in hub.requests)


def test_the_demo_model_by_its_name(tmp_path, monkeypatch, no_network):
    """As --model demo: the one that comes with the package, also beside a folder of that name."""
    from mindiffedit import StableDiffusionDiffEditPipeline, demo, load_component

    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve_folder("demo") == demo.checkpoint_folder()
    for folder in ("./demo", Path("demo"), str(tmp_path / "demo")):
        assert resolve_folder(folder).resolve() == tmp_path / "demo"
    pipe = StableDiffusionDiffEditPipeline.from_pretrained("demo", mode="pynative", requires_safety_checker=False)
    scheduler = load_component("demo", "scheduler")
    assert dict(scheduler.config) == dict(pipe.scheduler.config)
