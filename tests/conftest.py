"""Fixtures and options shared by the tests."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# One thread for each worker of `pytest -n 2`; read when MindSpore and torch are loaded.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

OPTIONS = {"slow": "take long", "tools": "are about scripts, the site, builds and packaging"}


def pytest_addoption(parser):
    for name, text in OPTIONS.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also run the tests marked {name}, which {text}")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist: it has its parent's surroundings
    # Compiled graphs are kept, as they are by default, but not in the cache folder of whoever runs the tests.
    config.compiled_graphs = tempfile.TemporaryDirectory(prefix="mindiffedit-tests-")
    os.environ["MINDIFFEDIT_CACHE"] = config.compiled_graphs.name


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.compiled_graphs.cleanup()


def pytest_collection_modifyitems(config, items):
    for name in OPTIONS:
        if not config.getoption(f"--{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: give --{name} to run it"))


# --- checkpoints, made once for all workers; read-only: copy one to change it ---------------------------------------


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: the folder that ``make(folder)`` writes, made by the first worker that asks for it."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent

    def folder(name, make):
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                # Made elsewhere and moved: one that could not be finished is not found by the next.
                unfinished = tempfile.mkdtemp(prefix=f"{name}-", dir=root)
                make(Path(unfinished))
                os.rename(unfinished, root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def sd1_folder(once):
    """Folder of a tiny random SD-1.x-like checkpoint saved by diffusers."""
    from checkpoints import make_sd1

    return once("sd1", make_sd1)


@pytest.fixture(scope="session")
def sd2_folder(once):
    """Folder of a tiny random SD-2.x-like checkpoint saved by diffusers."""
    from checkpoints import make_sd2

    return once("sd2", make_sd2)


@pytest.fixture(scope="session")
def checked_folder(once):
    """An SD-1.x-like checkpoint with a safety checker and its feature extractor."""
    from checkpoints import make_sd1

    return once("checked", lambda folder: make_sd1(folder, safety_checker=True))


@pytest.fixture(scope="session")
def t5_folder(once):
    """Folder of a tiny random Flan-T5-like checkpoint saved by transformers."""
    from language_checkpoints import make_t5

    return once("t5", make_t5)


@pytest.fixture(scope="session")
def blip_folder(once):
    """Folder of a tiny random BLIP checkpoint saved by transformers."""
    from language_checkpoints import make_blip

    return once("blip", make_blip)


@pytest.fixture
def copy(sd1_folder, tmp_path):
    """A copy of the SD-1.x-like checkpoint, to be damaged."""
    return Path(shutil.copytree(sd1_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def checked(checked_folder):
    """The components of `checked_folder`, not to be changed."""
    from mindiffedit.checkpoints.models import load_components

    return load_components(checked_folder)


@pytest.fixture(scope="session")
def sd2(sd2_folder):
    """The components of `sd2_folder`, not to be changed."""
    from mindiffedit.checkpoints.models import load_components

    return load_components(sd2_folder)
