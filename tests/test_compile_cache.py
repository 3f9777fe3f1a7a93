"""The cache of compiled graphs: right results whatever is in the folder, and found again by another process."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindiffedit.cli import arguments, jobs
from mindiffedit.runtime import compile_cache
from mindiffedit.runtime.compile_cache import CompileCache, Indescribable, fingerprint, open_cache

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


def floats(*shape):
    return ms.Tensor(np.ones(shape, np.float32))


def value_of(compiled, *shape):
    return float(compiled(floats(*shape or (3,))).asnumpy().ravel()[0])


def counts(cache):
    return cache.found, cache.stored, cache.uncached


def entries(folder):
    return sorted(Path(folder).glob("[!.]*"))


def unfinished(folder):
    return [path.name for path in Path(folder).iterdir() if path.name.startswith((".new", ".old"))]


@pytest.fixture
def cache(tmp_path):
    return CompileCache(tmp_path / "graphs")


@pytest.fixture
def filled(cache):
    """A cache that holds `double`, and the folder of its graph."""
    assert value_of(cache.compiled(double)) == 2
    (entry,) = entries(cache.folder)
    return cache, entry


# --- results --------------------------------------------------------------------------------------


def test_found_again_with_the_weights_of_now(cache):
    for weight, expected in ((2.0, 112), (3.0, 113)):
        layer = Layer(weight)
        assert value_of(cache.compiled(over(layer), models=(layer,))) == expected
    assert counts(cache) == (1, 1, 0)


def test_constants_are_part_of_the_key(cache):
    for constant, number in ((10.0, 100.0), (20.0, 100.0), (10.0, 200.0)):
        layer = Layer(1.0, constant, number)
        assert value_of(cache.compiled(over(layer), models=(layer,))) == 1 + constant + number
    assert counts(cache) == (0, 3, 0)


def test_the_order_of_functions_does_not_matter(cache):
    layer = Layer()
    assert value_of(cache.compiled(double)) == 2
    assert value_of(cache.compiled(over(layer), models=(layer,))) == 112
    assert value_of(cache.compiled(over(layer), models=(layer,))) == 112
    assert value_of(cache.compiled(double)) == 2
    assert counts(cache) == (2, 2, 0)


def test_every_shape_has_its_graph(cache):
    compiled = cache.compiled(double)
    for shape in ((3,), (2, 3), (3,), (2, 3)):
        assert compiled(floats(*shape)).shape == shape
    assert counts(cache) == (0, 2, 0)
    again = cache.compiled(double)
    assert again(floats(2, 3)).shape == (2, 3)
    assert counts(cache) == (1, 2, 0)


def test_an_error_of_the_function_itself_is_raised(cache):
    def wrong(tensor):
        return ops.reshape(tensor, (7, 7))

    with pytest.raises(Exception):
        cache.compiled(wrong)(floats(3))
    assert value_of(cache.compiled(double)) == 2
    assert entries(cache.folder) != []


def test_what_has_no_description_is_compiled_without(cache):
    compiled = cache.compiled(double, key=(object(),))
    assert value_of(compiled) == 2
    assert counts(cache) == (0, 0, 1)
    assert entries(cache.folder) == []


def test_two_weights_of_one_name_are_not_cached(cache):
    first, second = Layer(1.0), Layer(2.0)
    assert value_of(cache.compiled(over(first), models=(first, second))) == 111
    assert counts(cache) == (0, 0, 1)


# --- the key --------------------------------------------------------------------------------------


def digest(function=double, signature=(((3,), "Float32"),), key=("step",), models=(), extra=()):
    return CompileCache("/nowhere").digest(function, signature, key, models, extra)


def test_the_key_is_the_same_for_the_same():
    assert digest() == digest()
    assert digest(models=(Layer(),)) == digest(models=(Layer(5.0),))  # a weight's value is not compiled in


@pytest.mark.parametrize(
    "change",
    [
        dict(function=compile_cache._probe),
        dict(signature=(((4,), "Float32"),)),
        dict(signature=(((3,), "Float16"),)),
        dict(key=("step", None)),
        dict(key=("step", 1.0)),
        dict(key=("step", 1)),
        dict(models=("layer",)),
        dict(extra=("kernels.so", 1, 2)),
    ],
)
def test_the_key_changes_with_the_arguments(change):
    if change.get("models") == ("layer",):
        change = dict(models=(Layer(),))
    assert digest(**change) != digest()


@pytest.mark.parametrize(
    "change", [dict(constant=1.0), dict(number=1.0), dict(name="other"), dict(size=4)], ids=lambda c: str(c)
)
def test_the_key_changes_with_the_model(change):
    assert fingerprint(Layer(**change)) != fingerprint(Layer())


def test_the_key_changes_with_dtype_and_training():
    layer = Layer()
    layer.weight.set_dtype(ms.float16)
    assert fingerprint(layer) != fingerprint(Layer())
    assert fingerprint(Layer().set_train(True)) != fingerprint(Layer().set_train(False))


def test_the_key_changes_with_the_surroundings(monkeypatch):
    before = digest()
    for owner, name, value in (
        (compile_cache, "_own_source", lambda: "other"),
        (compile_cache, "_version_of", lambda package: "other"),
        (compile_cache.platform, "machine", lambda: "other"),
        (ms, "__version__", "other"),
        (sys, "version", "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert digest() != before, name
    monkeypatch.setattr("mindiffedit.runtime.kernels.missing_kernels", lambda: ["mint.none"])
    assert digest() != before
    monkeypatch.undo()
    monkeypatch.setenv("MS_DEV_SOMETHING", "1")
    assert digest() != before


def test_the_key_sees_a_replaced_construct(monkeypatch):
    before = fingerprint(Layer())
    monkeypatch.setattr(Layer, "construct", lambda self, tensor: tensor)
    assert fingerprint(Layer()) != before


def test_closures_count():
    def scaled(by):
        def stage(tensor):
            return tensor * by

        return stage

    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0)) != fingerprint(scaled(3.0))


def test_an_iterator_has_no_description():
    with pytest.raises(Indescribable):
        fingerprint(iter([]))


# --- damage ---------------------------------------------------------------------------------------


def _flip(entry):
    content = bytearray((entry / "graph.mindir").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (entry / "graph.mindir").write_bytes(content)


def _truncate(entry):
    content = (entry / "graph.mindir").read_bytes()
    (entry / "graph.mindir").write_bytes(content[: len(content) // 2])


def _rename_graph(entry):
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "graph": "0" * 64}))


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _truncate,
        _rename_graph,
        lambda entry: (entry / "graph.mindir").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "more").write_text(""),
        lambda entry: entry.chmod(0o777),
    ],
    ids=[
        "flipped",
        "truncated",
        "of another",
        "no graph",
        "no manifest",
        "odd manifest",
        "one more",
        "open to all",
    ],
)
def test_a_damaged_entry_is_compiled_afresh(filled, damage, caplog):
    cache, entry = filled
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert value_of(cache.compiled(double)) == 2
    assert sum("afresh" in record.message for record in caplog.records) == 1
    assert counts(cache) == (0, 2, 0)
    assert value_of(cache.compiled(double)) == 2
    assert counts(cache) == (1, 2, 0)
    assert unfinished(cache.folder) == []


def test_a_graph_that_mindspore_cannot_read_is_compiled_afresh(filled):
    cache, entry = filled
    digest = json.loads((entry / "manifest.json").read_text())["graph"]
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    assert cache._write(digest, b"no graph")
    assert value_of(cache.compiled(double)) == 2
    assert value_of(cache.compiled(double)) == 2
    assert cache.found == 1


# --- folders --------------------------------------------------------------------------------------


def test_entries_are_private(filled):
    cache, entry = filled
    assert cache.folder.stat().st_mode & 0o777 == entry.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in sorted(entry.iterdir())] == [0o600, 0o600]


def test_a_folder_that_others_can_write_to_is_refused(tmp_path, caplog):
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert open_cache(tmp_path) is None and open_cache(tmp_path) is None
    assert sum("cannot be used" in record.message for record in caplog.records) == 1


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    assert open_cache(tmp_path) is None


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert open_cache(tmp_path / "file") is None


def test_a_full_disk_is_said_once(cache, monkeypatch, caplog):
    def full(path, content):
        raise OSError(28, "No space left on device")

    assert value_of(cache.compiled(double)) == 2  # the desk is there now
    monkeypatch.setattr(compile_cache.CompileCache, "_make_room", full)
    with caplog.at_level(logging.WARNING):
        for number in (1.0, 2.0):
            layer = Layer(number=number)
            assert value_of(cache.compiled(over(layer), models=(layer,))) == 12 + number
    assert sum("No space left" in record.message for record in caplog.records) == 1
    assert unfinished(cache.folder) == []


def test_the_entries_used_longest_ago_go_first(cache):
    assert cache.ready()
    for n, digest in enumerate(("a" * 64, "b" * 64, "c" * 64)):
        cache._write(digest, b"x" * 1000)
        os.utime(cache.entry(digest) / "manifest.json", (n, n))
    assert cache._read("a" * 64) is not None  # now the last one used
    cache.limit = 3500
    cache._write("d" * 64, b"x" * 1000)
    assert [path.name[0] for path in entries(cache.folder)] == ["a", "c", "d"]


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

    def wrong(tensor):
        return ops.reshape(tensor, (7, 7))

    value_of(cache.compiled(double))
    value_of(cache.compiled(double))
    assert _settings() == before
    assert list(here.iterdir()) == []
    monkeypatch.chdir(tmp_path)  # where MindSpore writes a file about the failure, with or without a cache
    with pytest.raises(Exception):
        cache.compiled(wrong)(floats(3))
    assert _settings() == before


def test_a_program_with_mindspores_own_cache_is_left_alone(cache, monkeypatch):
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    assert compile_cache._taken_by_the_user()
    monkeypatch.delenv("MS_COMPILER_CACHE_ENABLE")
    monkeypatch.setattr(compile_cache, "_taken_by_the_user", lambda: True)
    assert value_of(cache.compiled(double)) == 2
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


def test_the_option(monkeypatch):
    parser = arguments.build_parser()
    assert parser.parse_args(["demo", "-o", "x", "--no-cache"]).no_cache is True
    assert parser.parse_args(["demo", "-o", "x"]).no_cache is False
    assert parser.parse_args(["parity", "check", "x", "--no-cache"]).no_cache is True
    assert "no_cache" in Path(jobs.__file__).read_text()


# --- processes ------------------------------------------------------------------------------------

_PROGRAM = """
    import sys, logging
    import mindspore as ms, numpy as np
    from mindiffedit.compile_cache import CompileCache
    layer = ms.nn.Dense(3, 3)
    for number, parameter in enumerate(layer.get_parameters()):
        parameter.set_data(ms.Tensor(np.arange(parameter.size, dtype=np.float32).reshape(parameter.shape) / 7))
        parameter.requires_grad = False
    def stage(tensor):
        return ms.ops.tanh(layer(tensor))
    cache = CompileCache(sys.argv[1])
    result = cache.compiled(stage, ("stage",), (layer,))(ms.Tensor(np.full((2, 3), 0.3, np.float32)))
    print(result.asnumpy().tobytes().hex(), cache.found, cache.stored)
"""


def _start(program, folder, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("GLOG_v", None)
    return subprocess.Popen(
        [sys.executable, str(program), str(folder)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_at_once_and_one_after_them(tmp_path):
    program, folder, here = tmp_path / "program.py", tmp_path / "graphs", tmp_path / "here"
    program.write_text(textwrap.dedent(_PROGRAM))
    here.mkdir()
    both = [_start(program, folder, here) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(entries(folder)) == 1
    last = _start(program, folder, here)
    outputs.append(last.communicate(timeout=300))
    results = [out.split() for out, _ in outputs]
    assert len({result[0] for result in results}) == 1
    assert results[2][1:] == ["1", "0"]
    assert list(folder.glob(".*")) == []
    assert list(here.iterdir()) == []
    assert all("cache" not in err.lower() for _, err in outputs), outputs


@pytest.mark.slow
def test_a_whole_edit_is_bit_equal_in_a_second_process(tmp_path):
    written = []
    for name, options in (("first", []), ("second", []), ("without", ["--no-cache"])):
        output = tmp_path / name
        command = [sys.executable, "-m", "mindiffedit", "demo", "-o", str(output), "--quiet", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINDIFFEDIT_CACHE": str(tmp_path / "graphs")}
        subprocess.run(command, env=environment, check=True, timeout=900)
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
        # Text encoder, VAE in two halves; UNet and update, each with guidance and without.
        assert len(entries(tmp_path / "graphs")) == 7, "the second process finds all that the first stored"
    assert written[0] == written[1] == written[2]
