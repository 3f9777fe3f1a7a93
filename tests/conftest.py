"""Fixtures and options shared by the tests."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False, help="also run the tests marked slow")


def pytest_configure(config):
    # Compiled graphs are kept, as they are by default, but not in the cache folder of whoever runs the tests.
    config.compiled_graphs = tempfile.TemporaryDirectory(prefix="mindiffedit-tests-")
    os.environ["MINDIFFEDIT_CACHE"] = config.compiled_graphs.name
    config.addinivalue_line("markers", "slow: takes long; runs only with --slow")


def pytest_unconfigure(config):
    config.compiled_graphs.cleanup()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    """Folder of a tiny random SD-1.x-like checkpoint saved by diffusers. Read-only: copy it to change it."""
    from checkpoints import make_sd1

    return make_sd1(tmp_path_factory.mktemp("sd1") / "checkpoint")


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory):
    """Folder of a tiny random SD-2.x-like checkpoint saved by diffusers. Read-only: copy it to change it."""
    from checkpoints import make_sd2

    return make_sd2(tmp_path_factory.mktemp("sd2") / "checkpoint")


@pytest.fixture(scope="session")
def checked_folder(tmp_path_factory):
    """An SD-1.x-like checkpoint with a safety checker and its feature extractor. Read-only, as the others."""
    from checkpoints import make_sd1

    return make_sd1(tmp_path_factory.mktemp("checked") / "checkpoint", safety_checker=True)


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


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """Folder of a tiny random Flan-T5-like checkpoint saved by transformers."""
    from language_checkpoints import make_t5

    return make_t5(tmp_path_factory.mktemp("t5") / "flan")


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    """Folder of a tiny random BLIP checkpoint saved by transformers."""
    from language_checkpoints import make_blip

    return make_blip(tmp_path_factory.mktemp("blip") / "captions")
