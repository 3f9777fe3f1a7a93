"""The cache of compiled graphs: right results whatever is in the folder, and found again by another process."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindiffedit.cli.command import main
from mindiffedit.errors import InputError
from mindiffedit.runtime import compile_cache, devices, graph_keys
from mindiffedit.runtime.compile_cache import CompileCache, open_cache
from mindiffedit.runtime.graph_keys import Indescribable, fingerprint, graph_key

ROOT = Path(__file__).resolve().parent.parent


class Layer(nn.Cell):
    """A weight, a constant tensor and a number."""

    def __init__(self, weight=2.0, constant=10.0, number=100.0, name="weight", size=3):
        super().__init__()
        value = ms.Tensor(np.full(size, weight, np.float32))
        self.weight = ms.Parameter(value, name=name, requires_grad=False)
        self.constant = ms.Tensor(np.full(size, constant, np.float32))
        self.number = number

    def construct(self, tensor):
        return tensor * self.weight + self.constant + self.number


def over(layer):
    def stage(tensor):
        return layer(tensor)

    return stage


def double(tensor):
    return tensor * 2


def triple(tensor):
    return tensor * 3


def wrong(tensor):
    return ops.reshape(tensor, (7, 7))


def floats(*shape):
    return ms.Tensor(np.ones(shape, np.float32))


def first(cache, function, *, shape=(3,), key=(), models=()):
    """The first number of a function's first call on ones."""
    _, result = cache.first_call(function, [floats(*shape)], key, models)
    assert result.shape == shape
    return float(result.asnumpy().ravel()[0])


def layers(cache, *layer, **options):
    return first(cache, over(layer[0]), models=layer, **options)


def counts(cache):
    return cache.found, cache.stored, cache.uncached


def entries(folder):
    return sorted(Path(folder).glob("[!.]*"))


def unfinished(folder):
    return list(Path(folder).glob(".new-*"))


@pytest.fixture
def cache(tmp_path):
    return CompileCache(tmp_path / "graphs")


@pytest.fixture
def filled(cache):
    """A cache that holds `double`, and the file of its graph."""
    assert first(cache, double) == 2
    (entry,) = entries(cache.folder)
    return cache, entry


# --- results --------------------------------------------------------------------------------------


def test_found_again_with_the_weights_of_now_and_no_other_constants(cache):
    for weight, expected in ((2.0, 112), (3.0, 113)):
        assert layers(cache, Layer(weight)) == expected
    assert counts(cache) == (1, 1, 0)
    for constant, number in ((20.0, 100.0), (10.0, 200.0)):
        assert layers(cache, Layer(1.0, constant, number)) == 1 + constant + number
    assert counts(cache) == (1, 3, 0)


def test_the_order_of_functions_and_shapes_does_not_matter(cache):
    layer = Layer()
    calls = [
        lambda: first(cache, double) == 2,
        lambda: layers(cache, layer) == 112,
        lambda: first(cache, double, shape=(2, 3)) == 2,
    ]
    for call in (*calls, *reversed(calls)):
        assert call()
    assert counts(cache) == (3, 3, 0)


def test_a_graph_runs_again_without_the_cache(filled):
    cache, entry = filled
    for _ in range(2):  # compiled afresh, then found
        graph, result = cache.first_call(double, [floats(3)])
        entry.unlink(missing_ok=True)
        with devices.CompileCounter() as compiled:
            assert np.array_equal(graph(floats(3) * 2).asnumpy(), result.asnumpy() * 2)
        assert compiled.count == 0


def test_an_error_of_the_function_itself_is_raised(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MindSpore writes a file about the failure, with or without a cache
    with pytest.raises(ValueError):
        first(cache, wrong)
    for _ in range(2):
        assert first(cache, double) == 2
    assert counts(cache) == (1, 1, 1)


def test_what_has_no_key_is_compiled_without(cache):
    assert first(cache, double, key=(object(),)) == 2
    assert layers(cache, Layer(1.0), Layer(2.0)) == 111, "two weights of one name"
    parameter = ms.Parameter(floats(3), name="argument")
    assert cache.first_call(double, [parameter])[1].asnumpy().tolist() == [2, 2, 2]
    assert counts(cache) == (0, 0, 3)
    assert entries(cache.folder) == []


# --- the key --------------------------------------------------------------------------------------


def test_the_key_is_of_all_that_decides_what_is_compiled(monkeypatch):
    def key(function=double, shape=(3,), dtype=ms.float32, key=("step",), models=(), extra=()):
        return graph_key(function, [floats(*shape).astype(dtype)], key, models, extra)

    assert key() == key()
    assert key(models=(Layer(),)) == key(models=(Layer(5.0),)), "a weight's value is not compiled in"
    changes = [dict(function=triple), dict(shape=(4,)), dict(dtype=ms.float16), dict(models=(Layer(),))]
    changes += [dict(key=("step", value)) for value in (None, 1.0, 1, "1", True)]
    keys = [key(), *(key(**change) for change in changes), key(extra=("kernels.so", 1, 2))]
    for owner, name, value in (
        (graph_keys, "_own_source", lambda: "other"),
        (graph_keys, "version_of", lambda package: "other"),
        (graph_keys.platform, "machine", lambda: "other"),
        (ms, "__version__", "other"),
        (sys, "version", "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr("mindiffedit.runtime.kernels.missing_kernels", lambda: ["mint.none"])
        keys.append(key())
    monkeypatch.setenv("MS_DEV_SOMETHING", "1")
    keys.append(key())
    monkeypatch.delenv("MS_DEV_SOMETHING")
    monkeypatch.setenv("MS_SUBMODULE_LOG_v", "{PIPELINE:3}")
    assert key() == keys[0], "what is logged decides nothing"
    assert len(set(keys)) == len(keys)


def test_a_fingerprint_is_of_all_that_a_model_or_function_holds(monkeypatch):
    def scaled(by):
        def stage(tensor):
            return tensor * by

        return stage

    def halved():
        layer = Layer()
        layer.weight.set_dtype(ms.float16)
        return layer

    changes = [dict(constant=1.0), dict(number=1.0), dict(number=100), dict(name="other"), dict(size=4)]
    kinds = [Layer(**change) for change in ({}, *changes)]
    kinds += [Layer().set_train(True), halved(), scaled(2.0), scaled(3.0), double, triple]
    fingerprints = [fingerprint(kind) for kind in kinds]
    assert fingerprint(scaled(2.0)) in fingerprints and fingerprint(Layer(5.0)) == fingerprints[0]
    monkeypatch.setattr(Layer, "construct", lambda self, tensor: tensor)
    fingerprints.append(fingerprint(Layer()))
    assert len(set(fingerprints)) == len(fingerprints)
    with pytest.raises(Indescribable):
        fingerprint(iter([]))


# --- damage ---------------------------------------------------------------------------------------


def _flip(entry):
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 0xFF
    entry.write_bytes(content)


def _of_another(entry):
    cache = CompileCache(entry.parent)
    first(cache, triple)
    (other,) = set(entries(entry.parent)) - {entry}
    shutil.copy(other, entry)
    other.unlink()


def _unreadable_to_mindspore(entry):
    CompileCache(entry.parent)._write(entry.name, b"no graph")


def _a_folder(entry):
    entry.unlink()
    entry.mkdir()


DAMAGES = [
    _flip,
    lambda entry: os.truncate(entry, entry.stat().st_size // 2),
    lambda entry: os.truncate(entry, 0),
    _of_another,
    _unreadable_to_mindspore,
    _a_folder,
    lambda entry: entry.chmod(0o666),
]


def test_what_is_damaged_is_compiled_afresh(filled, caplog):
    cache, entry = filled
    for number, damage in enumerate(DAMAGES):
        damage(entry)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert first(cache, double) == 2, number
        assert sum("afresh" in record.message for record in caplog.records) == 1, number
        assert counts(cache) == (number, number + 2, 0)
        assert first(cache, double) == 2 and cache.found == number + 1
    assert len(entries(cache.folder)) == 1 and unfinished(cache.folder) == []


# --- folders --------------------------------------------------------------------------------------


def test_entries_are_private(filled):
    cache, entry = filled
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o777 == 0o600


def test_folders_that_are_refused(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    assert open_cache(tmp_path / "file") is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
        assert open_cache(tmp_path) is None
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert open_cache(tmp_path / "open") is None and open_cache(tmp_path / "open") is None
    assert sum("cannot be used" in record.message for record in caplog.records) == 1


def test_a_full_disk_is_said_once(filled, monkeypatch, caplog):
    def full(source, target):
        raise OSError(28, "No space left on device")

    cache, _ = filled
    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        for number in (1.0, 2.0):
            assert layers(cache, Layer(number=number)) == 12 + number
    assert sum("No space left" in record.message for record in caplog.records) == 1
    assert counts(cache) == (0, 1, 2) and unfinished(cache.folder) == []


def test_what_was_used_longest_ago_goes_first_and_what_dead_processes_left(cache):
    assert cache.ready()
    for n, name in enumerate("abc"):
        cache._write(name, b"x" * 1000)
        os.utime(cache.folder / name, (n, n))
    assert cache._read("a") == b"x" * 1000  # now the last one used
    dead = [cache.folder / name for name in (".new-1", ".desk-1", "folder of an earlier version")]
    dead[0].write_bytes(b"x")
    for folder in dead[1:]:
        (folder / "inner").mkdir(parents=True)
    living = cache.folder / ".desk-2"
    living.mkdir()
    for path in dead:
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    cache.limit = 3500
    cache._write("d", b"x" * 1000)
    assert [path.name for path in entries(cache.folder)] == ["a", "c", "d"]
    assert living.is_dir() and not any(path.exists() for path in dead)


def test_a_desk_that_was_removed_comes_back(filled):
    cache, _ = filled
    for expected in ((1, 1, 0), (1, 2, 0)):
        for desk in {desk.folder for desk in compile_cache._desks}:
            shutil.rmtree(desk)
        assert first(cache, double if expected[1] == 1 else triple) == (2 if expected[1] == 1 else 3)
        assert counts(cache) == expected


# --- what is left as it was -----------------------------------------------------------------------


def _settings():
    from mindspore import context

    own, names = context._context(), context.ms_ctx_param
    return (
        own.enable_compile_cache,
        own.get_param(names.enable_compile_cache),
        own.get_param(names.compile_cache_path),
        os.environ.get("MS_DEV_FORCE_USE_COMPILE_CACHE"),
        ms.get_context("mode"),
    )


def test_settings_and_current_folder_are_left_alone(cache, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = _settings()
    for _ in range(2):
        first(cache, double)
        assert _settings() == before
    assert list(here.iterdir()) == []
    with pytest.raises(ValueError):
        first(cache, wrong)
    assert _settings() == before


def test_a_program_with_mindspores_own_cache_is_left_alone(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
        assert compile_cache._taken_by_the_user()
    monkeypatch.setattr(compile_cache, "_taken_by_the_user", lambda: True)
    assert first(cache, double) == 2
    assert counts(cache) == (0, 0, 1)


# --- which folder ---------------------------------------------------------------------------------


def test_the_environment_variable(tmp_path, monkeypatch):
    for off in ("", "0", "off", "OFF"):
        monkeypatch.setenv("MINDIFFEDIT_CACHE", off)
        assert open_cache() is None
    monkeypatch.setenv("MINDIFFEDIT_CACHE", str(tmp_path / "named"))
    assert open_cache().folder == tmp_path / "named"
    assert open_cache(False) is None
    assert open_cache(tmp_path / "given").folder == tmp_path / "given"
    monkeypatch.delenv("MINDIFFEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if ms.get_context("device_target") == "CPU":
        assert open_cache().folder == tmp_path / "mindiffedit" / "compiled"
    with pytest.raises(TypeError, match="compile_cache"):
        open_cache(3)


# --- processes ------------------------------------------------------------------------------------

_PROGRAM = """
    import sys
    import mindspore as ms, numpy as np
    from mindiffedit.runtime.compile_cache import CompileCache
    class Layer(ms.nn.Dense):
        def knows(self, name):
            return name in {"a", "b", "c"}
    layer = Layer(3, 3)
    layer.names = {"d", "e", "f"}  # sets, whose order is another one in each process
    for number, parameter in enumerate(layer.get_parameters()):
        parameter.set_data(ms.Tensor(np.arange(parameter.size, dtype=np.float32).reshape(parameter.shape) / 7))
        parameter.requires_grad = False
    def stage(tensor):
        return ms.ops.tanh(layer(tensor))
    cache = CompileCache(sys.argv[1])
    _, result = cache.first_call(stage, [ms.Tensor(np.full((2, 3), 0.3, np.float32))], ("stage",), (layer,))
    print(result.asnumpy().tobytes().hex(), cache.found, cache.stored)
"""


def _start(program, folder, cwd, seed):
    settings = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "MS_SUBMODULE_LOG_v": "{PIPELINE:3}"}
    return subprocess.Popen(
        [sys.executable, str(program), str(folder)],
        cwd=cwd,
        env={**os.environ, **settings},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_at_once_and_one_after_them(tmp_path):
    program, folder, here = tmp_path / "program.py", tmp_path / "graphs", tmp_path / "here"
    program.write_text(textwrap.dedent(_PROGRAM))
    here.mkdir()
    both = [_start(program, folder, here, seed) for seed in (1, 2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(entries(folder)) == 1
    outputs.append(_start(program, folder, here, 3).communicate(timeout=300))
    results = [out.split() for out, _ in outputs]
    assert len({result[0] for result in results}) == 1
    assert results[2][1:] == ["1", "0"]
    assert list(folder.glob(".*")) == list(here.iterdir()) == []
    assert all("cache" not in err.lower() for _, err in outputs), outputs


def test_the_command_keeps_graphs_unless_it_is_told_not_to(tmp_path, monkeypatch):
    settings = []

    def opened(setting):
        settings.append(setting)
        raise InputError("This is enough.")

    monkeypatch.setattr(compile_cache, "open_cache", opened)
    for options in ([], ["--no-cache"]):
        assert main(["demo", "-o", str(tmp_path / "edit"), *options]) != 0
    assert settings == [None, False]


@pytest.mark.slow
def test_a_whole_edit_is_bit_equal_in_a_second_process(tmp_path):
    written = []
    for name, options in (("first", []), ("second", []), ("without", ["--no-cache"])):
        command = [sys.executable, "-m", "mindiffedit", "demo", "-o", str(tmp_path / name), "--quiet", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINDIFFEDIT_CACHE": str(tmp_path / "graphs")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0 and "cache" not in done.stderr, done.stderr
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        # Text encoder, VAE in two halves; UNet and update, each with guidance and without.
        assert len(entries(tmp_path / "graphs")) == 7, "the second process finds all that the first stored"
    assert written[0] == written[1] == written[2]
