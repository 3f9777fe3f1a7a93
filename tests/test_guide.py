"""The documentation is true: the guide's code runs, signatures are the real ones, command lines parse."""

import ast
import contextlib
import functools
import http.server
import inspect
import re
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from mindiffedit import demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """The code blocks of a page in the given languages, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


# --- the guide, executed ---------------------------------------------------------------------------

GUIDE = blocks(ROOT / "docs" / "guide.md", "py", "python")

# Everything that is changed before the guide's code is run, and how often it occurs in it.
MODEL = '"stabilityai/stable-diffusion-2-1"'  # the demo checkpoint's folder
# a local server
PICTURE = '"https://github.com/Xiang-cd/DiffEdit-stable-diffusion/raw/main/assets/origin.png"'
SIZE = "768"  # the demo checkpoint's size
SOURCE, TARGET = '"a bowl of fruits"', '"a basket of pears"'  # scenes that the demo checkpoint has seen
OCCURRENCES = {MODEL: 1, PICTURE: 1, SIZE: 6, SOURCE: 1, TARGET: 1}
DEMO_SIZE = 128


@contextlib.contextmanager
def served(file):
    """The URL of a file on this machine's own loopback address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(file.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{file.name}"
        finally:
            server.shutdown()
            thread.join()


def run_block(code, names):
    """Execute a block as a notebook does; returns the value of the last line where it is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "docs/guide.md", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "docs/guide.md", "eval"), names)


@pytest.fixture(scope="module")
def guide():
    """The guide has been run: the names it made, what each block displayed, and the mask as an array."""
    unseeded = np.random.default_rng
    with served(demo.sample_picture()) as url, pytest.MonkeyPatch.context() as patch:
        # The guide gives no generator: fresh entropy would make this test another one each time.
        patch.setattr(np.random, "default_rng", lambda seed=0: unseeded(seed))
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        changes = {
            MODEL: repr(str(demo.checkpoint_folder())),
            PICTURE: repr(url),
            SIZE: str(DEMO_SIZE),
            SOURCE: repr(demo.SAMPLE_PROMPTS["source"]),
            TARGET: repr(demo.SAMPLE_PROMPTS["target"]),
        }
        names, shown, mask = {"__name__": "guide"}, [], None
        for code in GUIDE:
            for old, new in changes.items():
                code = code.replace(old, new)
            shown.append(run_block(code, names))
            if mask is None and "mask_image" in names:
                mask = names["mask_image"].copy()
    return SimpleNamespace(**names, shown=shown, mask=mask)


def test_the_substitutions_are_those_listed():
    code = "".join(GUIDE)
    assert {text: code.count(text) for text in OCCURRENCES} == OCCURRENCES


def test_the_guide_has_the_reference_guides_code():
    """Block for block what the published guide has, with our imports; and nothing is installed unasked."""
    assert len(GUIDE) == 7
    assert all(line.startswith("#") for line in GUIDE[0].splitlines() if line.strip())
    assert not any(re.search(r"^\s*[!%]", code, re.MULTILINE) for code in GUIDE)
    assert "mindone.diffusers" not in "".join(GUIDE) and "diffusers.utils" not in "".join(GUIDE)
    for call in (
        "from mindiffedit import DDIMScheduler, DDIMInverseScheduler, StableDiffusionDiffEditPipeline",
        "mindspore_dtype=mindspore.float16,",
        "use_safetensors=True,",
        "safety_checker=None,",
        "pipeline.inverse_scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)",
        "pipeline.enable_model_cpu_offload()",
        "pipeline.enable_vae_slicing()",
        "mask_image = pipeline.generate_mask(",
        "inv_latents = pipeline.invert(prompt=source_prompt, image=raw_image).latents",
        ").images[0]",
        "make_image_grid([raw_image, mask_image, output_image], rows=1, cols=3)",
    ):
        assert call in "".join(GUIDE), call


def test_the_guides_mask_is_a_mask(guide):
    side = DEMO_SIZE // guide.pipeline.vae_scale_factor
    assert guide.mask.shape == (1, side, side)
    assert set(np.unique(guide.mask)) == {0, 1}, "neither empty nor full"
    assert 0.01 < guide.mask.mean() < 0.6
    displayed = guide.shown[4]
    assert displayed.mode == "L" and displayed.size == (DEMO_SIZE, DEMO_SIZE)


def test_the_guides_latents_go_from_noise_to_the_picture(guide):
    side = DEMO_SIZE // guide.pipeline.vae_scale_factor
    latents = guide.inv_latents.asnumpy()
    assert latents.shape == (1, 40, 4, side, side)  # 50 steps at the default strength of 0.8
    assert np.isfinite(latents).all()

    # The guide's picture is smooth, noise is not: neighbours are alike at the end and less so at the start.
    def likeness(sample):
        left, right = sample[..., :-1].ravel(), sample[..., 1:].ravel()
        return np.corrcoef(left, right)[0, 1]

    assert likeness(latents[0, -1]) > likeness(latents[0, 0]) + 0.05


def test_the_guides_edit_changes_the_inside_of_the_mask(guide):
    size = (DEMO_SIZE, DEMO_SIZE)
    assert isinstance(guide.output_image, PIL.Image.Image)
    assert guide.output_image.mode == "RGB" and guide.output_image.size == guide.raw_image.size == size
    assert guide.shown[-1].size == (3 * DEMO_SIZE, DEMO_SIZE)
    before, after = (np.asarray(p, np.float64) for p in (guide.raw_image, guide.output_image))
    factor = guide.pipeline.vae_scale_factor
    inside = np.kron(guide.mask[0], np.ones((factor, factor))) > 0.5
    # The decoder mixes neighbouring latents, so the outside is judged from two latents away.
    reach = 2 * factor
    near = np.zeros_like(inside)
    for y, x in zip(*np.nonzero(inside[::factor, ::factor])):
        near[max(0, y * factor - reach):y * factor + factor + reach,
             max(0, x * factor - reach):x * factor + factor + reach] = True
    squares = ((before - after) ** 2).mean(-1)
    changed, kept = squares[inside].mean(), squares[~near].mean()
    assert 10 * np.log10(255**2 / changed) < 20, "the object is still there"
    assert 10 * np.log10(255**2 / kept) > 24, "the background has changed"
    assert changed > 10 * kept


# --- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for code in blocks(page, "py", "python"):
        compile(code, page.name, "exec")


def command_lines(page):
    """The `mindiffedit ...` lines of a page's shell blocks, continued lines joined."""
    for code in blocks(page, "sh", "bash", "shell", "console", "text"):
        for line in code.replace("\\\n", " ").splitlines():
            if "mindiffedit" not in line:
                continue  # prose may have apostrophes
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and Path(words[0]).name == "mindiffedit":
                yield words[1:]


def parser():
    from mindiffedit.arguments import build_parser

    return build_parser()


COMMANDS = [words for page in PAGES for words in command_lines(page)]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_command_lines_parse(words, capsys):
    try:
        parser().parse_args(words)
    except SystemExit as stop:  # --help and --version end so
        assert stop.code in (0, None), capsys.readouterr().err


def test_there_are_command_lines_to_check():
    assert {"demo", "edit", "mask", "invert"} <= {words[0] for words in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


# --- the API page ----------------------------------------------------------------------------------

API = ROOT / "docs" / "api.md"
DOCUMENTED = (
    "generate_mask", "invert", "__call__", "encode_prompt", "from_pretrained", "save_pretrained", "__init__",
)


def documented_signatures():
    """{name: [(parameter, default)]} from the page's ``def`` lines."""
    found = {}
    for code in blocks(API, "py", "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                positional = arguments.posonlyargs + arguments.args
                defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
                pairs = [*zip(positional, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
                found[node.name] = [
                    (a.arg, inspect.Parameter.empty if d is None else ast.literal_eval(d)) for a, d in pairs
                ]
    return found


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_signatures_are_the_real_ones(name):
    from mindiffedit import StableDiffusionDiffEditPipeline

    real = [
        (parameter.name, parameter.default)
        for parameter in inspect.signature(getattr(StableDiffusionDiffEditPipeline, name)).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name != "self"
    ]
    assert [pair for pair in documented_signatures()[name] if pair[0] not in ("self", "cls")] == real


@pytest.mark.parametrize("name", ["generate_mask", "invert", "__call__"])
def test_every_parameter_is_explained(name):
    text = API.read_text(encoding="utf-8")
    for parameter, _ in documented_signatures()[name]:
        if parameter != "self":
            assert f"`{parameter}`" in text, f"{name}: {parameter}"


def test_every_public_name_is_on_the_api_page():
    import mindiffedit

    text = API.read_text(encoding="utf-8")
    missing = [name for name in mindiffedit.__all__ if name not in text and not name.startswith("__")]
    assert not missing
