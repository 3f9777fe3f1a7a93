"""`mindiffedit doctor`: ready where all is well, and a problem is told with what to do."""

import json

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mindiffedit import demo
from mindiffedit.cli import command, doctor


def run(capsys, *words):
    code = command.main(["doctor", "--quiet", *words])
    return code, capsys.readouterr().out


def only(monkeypatch, *names):
    """Leaves these checks alone; the others find nothing."""
    for name in ("versions", "machine", "device", "kernels", "operators", "cache", "replay", "step"):
        if name not in names:
            monkeypatch.setattr(doctor, f"_{name}", lambda args, figures: figures.setdefault("device", "CPU") and [])


def test_this_machine_is_ready(capsys):
    code, text = run(capsys)
    lines = text.splitlines()
    assert code == 0 and lines[-1] == "ready." and "problem" not in text
    assert lines[0] == "```text" and lines[-3] == "```", "what is to be pasted stands between fences"
    code, text = run(capsys, "--json")
    result = json.loads(text)
    assert code == 0 and result["ready"] and result["device"] == "CPU"
    assert result["replay"]["ok"] and result["step_seconds"] > 0 and result["replaced_kernels"]
    assert {finding["state"] for finding in result["findings"]} <= {"ok", "note"}


def test_a_release_that_is_too_slow_is_a_problem(capsys, monkeypatch):
    usual = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.10.0" if name == "mindspore" else usual(name))
    only(monkeypatch, "versions")
    code, text = run(capsys)
    assert code == 1 and text.splitlines()[-1] == "not ready: mindspore: pip install mindspore==2.8.0."
    # One that nobody has seen is told, and no more.
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.7.9" if name == "mindspore" else usual(name))
    code, text = run(capsys)
    assert code == 0 and "note" in text and "seen to work: 2.7.2, 2.8.0" in text
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "mindone" else usual(name))
    code, text = run(capsys)
    assert code == 1 and "pip install mindone==0.5.0" in text


def test_a_wrong_result_is_a_problem(capsys, monkeypatch, tmp_path):
    """A tensor of the recording is moved by a thousandth: as if this machine computed something else."""
    path = tmp_path / "golden.safetensors"
    with safe_open(demo.golden_file(), "np") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = next(name for name in tensors if name.endswith("inverted_latents") or "latents" in name)
    tensors[name] = (tensors[name] * np.float32(1.001)).astype(tensors[name].dtype)
    save_file(tensors, path, about)
    monkeypatch.setattr(demo, "golden_file", lambda: path)
    only(monkeypatch, "device", "replay")
    code, text = run(capsys)
    assert code == 1 and text.splitlines()[-1].startswith("not ready: replay:")


def test_a_device_that_is_not_here_ends_the_report(capsys):
    code, text = run(capsys, "--device", "Ascend")
    assert code == 1 and "Ascend was asked for" in text and "replay" not in text
    assert text.splitlines()[-1].startswith("not ready: device: ")


def test_the_users_folder_is_not_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MINDIFFEDIT_CACHE", raising=False)
    only(monkeypatch, "cache")
    code, text = run(capsys)
    assert code == 0 and "~/.cache/mindiffedit/compiled: 0 files" in text and str(tmp_path) not in text
    monkeypatch.setenv("MINDIFFEDIT_CACHE", "0")
    code, text = run(capsys)
    assert code == 0 and "off: every process compiles" in text
