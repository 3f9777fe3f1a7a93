"""The documentation's site: it builds without a warning, nothing in it leads nowhere, and the API page is complete."""

import html.parser
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_docs import HELPERS, METHODS, PIPELINE, public_methods

import mindiffedit
from mindiffedit import StableDiffusionDiffEditPipeline

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.tools


def build(folder, target):
    """Build the site of a project's folder; warnings are errors. Nothing outside this machine can be reached."""
    nowhere = "http://127.0.0.1:9"
    variables = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "mkdocs.yml", "-d", target]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables, timeout=300)


class Page(html.parser.HTMLParser):
    """Of a built page: its ids, what it links to, what it loads, and the text that follows each heading's id."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.texts, self.heading = set(), [], [], {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("id"):
            self.ids.add(attributes["id"])
            if re.fullmatch(r"h\d", tag):
                self.heading = attributes["id"]
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        for name in ("src", "srcset") if tag != "link" else ("href",):
            if attributes.get(name) and attributes.get("rel") != "canonical":
                self.loads.append(attributes[name])

    def handle_data(self, text):
        self.texts[self.heading] = self.texts.get(self.heading, "") + text


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the built site by their paths in it, and the folder."""
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}
    return pages, folder


def test_every_page_is_in_the_site(site):
    pages, folder = site
    expected = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} | {"notebook.html"}
    assert expected <= pages.keys() and len(expected) > 8
    assert (folder / "notebook.ipynb").is_file()
    for name in expected:
        # mkdocs-material's own frame has some 500 characters.
        assert sum(map(len, pages[name].texts.values())) > 600, f"{name} is empty"


def dead_ends(pages, folder):
    """Links and loads within the site that lead to no file, or to no place in it."""
    dead = []
    for name, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":  # that one's links are absolute
                continue
            target = ((folder / name).parent / unquote(parts.path) if parts.path else folder / name).resolve()
            target = target / "index.html" if target.is_dir() else target
            ids = getattr(pages.get(os.path.relpath(target, folder.resolve())), "ids", None)
            if not target.is_file() or (parts.fragment and ids is not None and unquote(parts.fragment) not in ids):
                dead.append(f"{name}: {link}")
    return dead


def test_nothing_in_the_site_leads_nowhere(site):
    assert not dead_ends(*site)


def test_dead_ends_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="x">X</h2><a href="b.html#y">1</a><a href="#x">2</a><img src="n.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#x">3</a><a href="gone.html">4</a><a href="https://a.b/c">5</a>')
    pages = {name: Page(tmp_path / name) for name in ("a.html", "b.html")}
    assert dead_ends(pages, tmp_path) == ["a.html: b.html#y", "a.html: n.png", "b.html: gone.html"]


def test_the_site_loads_nothing_from_elsewhere(site):
    pages, _ = site
    assert not [(name, load) for name, page in pages.items() for load in page.loads if urlsplit(load).netloc]


def test_the_site_says_nothing_of_this_machine(site):
    for path in site[1].rglob("*"):
        if path.suffix in (".html", ".json", ".xml", ".ipynb"):
            assert str(ROOT) not in path.read_text(encoding="utf-8"), path.name


def test_the_api_page_shows_signatures_and_parameters(site):
    texts = site[0]["api.html"].texts
    for name in METHODS:
        method, identifier = getattr(StableDiffusionDiffEditPipeline, name), f"{PIPELINE}.{name}"
        assert identifier in texts, name
        text = re.sub(r"\s+", " ", texts[identifier]).replace("'", '"')  # black's quotes, where it breaks lines
        for parameter in inspect.signature(method).parameters.values() if callable(method) else ():
            if parameter.name in ("self", "cls") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            shown = parameter.name
            if parameter.default is not parameter.empty:
                shown += "=" + repr(parameter.default).replace("'", '"')
            assert re.search(rf"[( ]{re.escape(shown)}[,) ]", text), f"{name}: {shown} is not in the signature"


def test_the_api_page_has_all_methods_of_other_classes(site):
    for kind in HELPERS:
        home = f"mindiffedit.{mindiffedit._HOMES[kind.__name__]}.{kind.__name__}"
        missing = {f"{home}.{name}" for name in public_methods(kind)} - site[0]["api.html"].texts.keys()
        assert not missing and public_methods(kind)


def test_powers_are_not_taken_for_bold_type(site):
    assert "-2**63 to 2**64 - 1" in site[0]["api.html"].texts["mindiffedit.noise.generator.Generator.manual_seed"]


def test_the_api_page_shows_the_commands(site):
    texts = site[0]["api.html"].texts
    for heading, option in (
        ("edit", "--latents FILE"),
        ("mask", "--mask-threshold F"),
        ("parity-check", "--isolate"),
    ):
        assert option in texts[heading], heading
    assert "usage: mindiffedit" in texts["the-command-line"]


def test_the_notebook_is_a_page(site):
    text = "".join(site[0]["notebook.html"].texts.values())
    assert "pipeline.generate_mask(" in text and "pipeline.edit(" in text


def test_planted_defects_end_the_build(site, tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (tmp_path / "mindiffedit").mkdir()
    (tmp_path / "planted.py").write_text('def f(a):\n    """Text.\n\n    Args:\n        b: not there.\n    """\n')
    (tmp_path / "docs" / "api.md").write_text("# API\n\n::: planted.f\n")
    (tmp_path / "docs" / "forgotten.md").write_text("# Not in the navigation\n")
    with (tmp_path / "docs" / "guide.md").open("a") as guide:
        guide.write("\n[a](missing.md) [b](#no-such-heading) [c](design.md#nowhere) [d](/guide.md) ![e](none.png)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert built.stderr.count("WARNING") == 7, built.stderr
    for planted in (
        "missing.md",
        "no-such-heading",
        "nowhere",
        "/guide.md",
        "none.png",
        "forgotten.md",
        "'b'",
    ):
        assert planted in built.stderr, built.stderr
