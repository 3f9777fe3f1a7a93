"""The project's files: one version, the same Pythons everywhere, types, the wheel."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mindiffedit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

pytestmark = pytest.mark.tools


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version():
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.search(r'^version: "(.*)"$', text("CITATION.cff"), re.MULTILINE)[1] == mindiffedit.__version__
    assert f"\n## {mindiffedit.__version__}" in text("CHANGELOG.md")


def test_the_same_pythons_everywhere():
    classified = {name.rpartition(" ")[2] for name in PROJECT["project"]["classifiers"] if "Python :: 3." in name}
    first, last = (int(part) for part in re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    supported = {f"3.{minor}" for minor in range(first, last)}
    assert classified == supported
    assert set(re.findall(r"python(3\.\d+)\b", text("scripts/environment.sh"))) == supported
    assert set(re.findall(r"3\.\d+", re.search(r"python: (\[.*\])", text(".github/workflows/ci.yml"))[1])) == supported
    for page in ("README.md", "CONTRIBUTING.md"):
        sentence = re.search(r"Python\s(3\.\d+(?:,\s3\.\d+)*(?:\sor\s3\.\d+))", text(page))[1]
        assert set(re.findall(r"3\.\d+", sentence)) == supported, page
    oldest = f"3.{first}"
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_types(tmp_path):
    """mypy passes, and no module is excepted from it."""
    assert not any(override.get("ignore_errors") for override in PROJECT["tool"]["mypy"]["overrides"])
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel(tmp_path):
    """Built from the sources alone, with no compiler: what is in it and what it says."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "docs", "tests", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    done = subprocess.run(command, cwd=source, env={**os.environ, "CXX": "/bin/false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(source.glob("mindiffedit-*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("/METADATA"))))
    assert metadata["Version"] == mindiffedit.__version__
    package = ROOT / "mindiffedit"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    # Without the kernels the modules lie in a folder for pure Python.
    assert {re.sub(r"^[^/]+\.data/purelib/", "", name) for name in names if ".dist-info/" not in name} == expected


def test_containers():
    """What the files of the image name is there, and their commands are commands."""
    import yaml

    from mindiffedit.cli.arguments import build_parser

    image, compose = text("Dockerfile"), yaml.safe_load(text("compose.yaml"))
    copied = [path for line in re.findall(r"^COPY (?!--from)(.*)$", image, re.MULTILINE) for path in line.split()[:-1]]
    kept = re.findall(r"^!(.*)$", text(".dockerignore"), re.MULTILINE)
    assert sorted(copied) == sorted(kept) and all((ROOT / path).exists() for path in copied)
    needed = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "setup.py"}
    assert needed <= set(copied)
    version = re.findall(r"^FROM python:(3\.\d+)", image, re.MULTILINE)
    assert (
        len(set(version)) == 1
        and f"Programming Language :: Python :: {version[0]}" in (PROJECT["project"]["classifiers"])
    )
    words = json.loads(re.search(r"^CMD (.*)$", image, re.MULTILINE)[1])
    for argv in (words, compose["services"]["mindiffedit"]["command"]):
        assert build_parser().parse_args(argv).command == "serve"
