"""What the API page is made of: docstrings explain every parameter, and the page has every public name."""

import dataclasses
import inspect
import re
from pathlib import Path

import mindiffedit
from mindiffedit import StableDiffusionDiffEditPipeline

ROOT = Path(__file__).resolve().parents[1]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PIPELINE = "mindiffedit.pipeline.StableDiffusionDiffEditPipeline"

METHODS = sorted(
    name
    for name in dir(StableDiffusionDiffEditPipeline)
    if name == "__call__" or not name.startswith("_") and name != "MODES"
)
HELPERS = (
    mindiffedit.Generator,
    mindiffedit.PromptGenerator,
    mindiffedit.Captioner,
    mindiffedit.AnimatedStrip,
)


def public_methods(kind):
    return [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]


FUNCTIONS = {
    **{f"StableDiffusionDiffEditPipeline.{name}": getattr(StableDiffusionDiffEditPipeline, name) for name in METHODS},
    **{f"{kind.__name__}.{name}": getattr(kind, name) for kind in HELPERS for name in public_methods(kind)},
    **{name: getattr(mindiffedit, name) for name in mindiffedit.__all__ if name != "__version__"},
}
FUNCTIONS = {
    name: value
    for name, value in FUNCTIONS.items()
    if callable(value) and not name.endswith("Scheduler")  # these have mindone's parameters
}


def explained(docstring, sections=("Args:",)):
    """Names that a Google-style docstring has in these sections."""
    names, inside = set(), None
    for line in inspect.cleandoc(docstring).splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            inside = line in sections
        entry = re.match(r"    \*{0,2}(\w+)(?: \([^)]*\))?: \S", line)
        if inside and entry:
            names.add(entry[1])
    return names


def test_every_parameter_is_in_the_docstring():
    for name, function in FUNCTIONS.items():
        parameters = {p for p in inspect.signature(function).parameters if p not in ("self", "cls")}
        docstring = inspect.getdoc(function)
        assert docstring and len(docstring) > 10, name
        sections = ("Args:", "Attributes:") if dataclasses.is_dataclass(function) else ("Args:",)
        named = explained(docstring, sections)
        missing = {p for p in parameters - named if f"``{p}``" not in docstring}
        assert not missing, f"{name}: not explained: {sorted(missing)}"
        assert named <= parameters, f"{name}: explained, but not there: {sorted(named - parameters)}"


def test_explanations_are_found():
    text = """What it does: this.

        Args:
            one: first,
                over: two lines.
            two (int): second.
            *three: third.
            **four: fourth.

        Returns:
            five: no parameter.
    """
    assert explained(text) == {"one", "two", "three", "four"}


def test_every_public_name_and_method_is_on_the_api_page():
    entries = re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE)
    members = re.findall(r"^ +- (\w+)$", API, re.MULTILINE)
    missing = [
        name
        for name in mindiffedit.__all__
        if not name.startswith("__")
        and f"mindiffedit.{mindiffedit._HOMES[name]}.{name}" not in entries
        and name not in members
    ]
    missing += [name for name in METHODS if f"{PIPELINE}.{name}" not in entries and name not in members]
    assert not missing
    assert all(re.search(rf"\b{name}\b", API) for name in mindiffedit.__all__)
