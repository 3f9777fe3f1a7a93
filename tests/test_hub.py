"""Names of checkpoints: folders here, the hub's cache, and downloads from a stand-in for the hub."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import requests
from checkpoint_files import COMMIT, MODEL_FILES, change_json, make_cache
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

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


# --- downloads -------------------------------------------------------------------------------------


class Hub:
    """Stands in for `huggingface_hub.snapshot_download`: one repository, of which the files that are asked for are had.

    Attributes:
        folder: the repository's files.
        refusal: an error to raise instead.
        asked: the keywords of every call.
    """

    def __init__(self, folder, cache):
        self.folder, self.snapshot, self.refusal, self.asked = folder, cache / COMMIT, None, []

    def __call__(self, name, allow_patterns, **options):
        self.asked.append(options)
        if self.refusal is not None:
            raise self.refusal
        for file in filter_repo_objects(sorted(files_of(self.folder)), allow_patterns=allow_patterns):
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / file, self.snapshot / file)
        return str(self.snapshot)

    @property
    def fetched(self):
        return files_of(self.snapshot)


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(checked_folder, tmp_path, monkeypatch):
    """A hub whose repository has, beside what is needed, all that is not."""
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
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_download_takes_what_is_needed_and_no_more(hub, checked_folder):
    """All of it from one commit, even if the branch moves on meanwhile."""
    folder = resolve_folder("someone/tiny-model", HubOptions("elsewhere", token="hf_secret", revision="main"))
    assert files_of(folder) == hub.fetched == files_of(checked_folder)
    assert [options["revision"] for options in hub.asked] == ["main", COMMIT]
    assert {(options["token"], options["cache_dir"]) for options in hub.asked} == {("hf_secret", "elsewhere")}
    assert load_components(folder)["safety_checker"] is not None


def test_components_that_are_not_wanted_are_not_downloaded(hub, checked_folder):
    resolve_folder("someone/tiny-model", skip={"safety_checker": None})
    assert files_of(checked_folder) - hub.fetched == {MODEL_FILES["safety_checker"]}


def test_a_variant_and_the_plain_file_where_there_is_none(hub):
    resolve_folder("someone/tiny-model", variant="fp16")
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        MODEL_FILES["text_encoder"],
        MODEL_FILES["safety_checker"],
    }


def test_what_the_hub_refuses_becomes_one_sentence(hub):
    response = requests.Response()
    for refusal, message in (
        (errors.RepositoryNotFoundError("404\nlong", response=response), "no such repository, or a private one"),
        (errors.RevisionNotFoundError("404\nlong", response=response), "no revision 'v9'"),
        (errors.GatedRepoError("403\nlong", response=response), "restricted: accept the model's terms"),
        (errors.HfHubHTTPError("500\nlong", response=response), "fetching it from the hub failed: 500"),
        (errors.LocalEntryNotFoundError("none"), "the hub could not be reached. Check the network"),
        (OSError("No space left on device"), "No space left.*free disk space"),
        (ValueError("a bad proxy"), "a bad proxy"),
    ):
        hub.refusal = refusal
        with pytest.raises(CheckpointError, match=f"^someone/model.*{message}") as caught:
            resolve_folder("someone/model", HubOptions(revision="v9"))
        assert "\n" not in str(caught.value)


def test_a_repository_of_another_kind_costs_no_download(hub):
    change_json(hub.folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        resolve_folder("someone/tiny-model")
    (hub.folder / "model_index.json").unlink()
    (hub.snapshot / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="has no model_index.json"):
        resolve_folder("someone/tiny-model")
    assert not any(".safetensors" in name for name in hub.fetched)


def test_a_repository_with_pickles_only(hub):
    (hub.folder / MODEL_FILES["unet"]).unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights for unet in what the hub gave.*Pickle"):
        resolve_folder("someone/tiny-model")
    assert not any(name.endswith(".bin") for name in hub.fetched)


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
