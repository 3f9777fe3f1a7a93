"""The documentation is true: the pages' code runs, the guide's does what it says, command lines parse.

The site and the API page are tested in ``test_docs.py``.
"""

import ast
import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file
from scipy import ndimage

from mindiffedit import demo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*.ipynb"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text_of(page):
    """A page's Markdown; a notebook's cells as such."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```py\n{source}\n```" for source, kind in cells)


def blocks(page, *languages):
    """The code blocks of a page in the given languages, in order."""
    return [code for language, code in FENCE.findall(text_of(page)) if language in languages]


# --- pages, executed -------------------------------------------------------------------------------


@dataclass
class Program:
    """How the Python blocks of one page are run: as one program, from top to bottom."""

    changes: dict[str, tuple[int, Callable]] = field(default_factory=dict)
    """Text in the blocks -> how often it is there, and a function of ``Stands`` giving what is put in its place."""
    given: Callable = lambda stands: {}
    """Function of ``Stands`` giving the names that are there before the first block."""
    check: Callable = lambda ran: None
    """Asserts about what has been run, a ``Ran``."""


@dataclass
class Stands:
    """What stands in for models and pictures that would be downloaded."""

    fixture: Callable
    """A fixture's value by its name: ``fixture("sd1_folder")`` is a tiny random checkpoint."""
    folder: Path
    """The program's current folder, empty at first."""


class Ran:
    """A page that has been run. The names that it leaves are attributes."""

    def __init__(self, folder):
        self.folder = folder
        self.displayed = []  # what the last line of each block shows, None where it is no expression
        self.after = []  # the names after each block

    def __getattr__(self, name):
        return self.after[-1][name]


# The guide's texts that are not there in the tests, and the demo checkpoint's size and scenes.
MODEL = '"stabilityai/stable-diffusion-2-1"'
PICTURE = '"https://github.com/Xiang-cd/DiffEdit-stable-diffusion/raw/main/assets/origin.png"'
SIZE = "768"
SOURCE, TARGET = '"a bowl of fruits"', '"a basket of pears"'
DEMO_SIZE, FACTOR = 128, 4


def check_edit(before, after, mask):
    """The inside of a mask (1, h, w) has changed and is 0 or 1, the outside, from two latents away, much less.

    The decoder mixes neighbouring latents. Returns where the outside is.
    """
    side = DEMO_SIZE // FACTOR
    assert mask.shape == (1, side, side) and set(np.unique(mask)) == {0, 1} and 0.01 < mask.mean() < 0.6
    assert before.size == after.size == (DEMO_SIZE, DEMO_SIZE) and before.mode == after.mode == "RGB"
    inside = np.kron(mask[0], np.ones((FACTOR, FACTOR))) > 0.5
    outside = ndimage.distance_transform_edt(~inside) > 2 * FACTOR
    squares = ((np.asarray(before, float) - np.asarray(after, float)) ** 2).mean(-1)
    changed, kept = squares[inside].mean(), squares[outside].mean()
    assert 10 * np.log10(255**2 / changed) < 20, "the object is still there"
    assert kept < 255**2 / 10**2.4, "the background has changed"  # 24 dB
    assert outside.mean() > 0.2 and changed > 10 * kept
    return outside


def check_notebook(ran):
    check_edit(ran.picture, ran.result, ran.mask)
    assert ran.latents.shape == (1, 18, 4, *ran.mask.shape[1:])  # 20 steps at a strength of 0.9
    assert ran.displayed[1].size == (2 * DEMO_SIZE, DEMO_SIZE)
    # One call: what is said of it there.
    outside = check_edit(ran.picture, ran.edited.images[0], ran.edited.mask_image)
    assert np.array_equal(np.asarray(ran.picture)[outside], np.asarray(ran.edited.images[0])[outside])
    assert ran.displayed[4].size == (4 * DEMO_SIZE, DEMO_SIZE)
    assert ran.displayed[5] is ran.edited.report and "mask_coverage" in repr(ran.displayed[5])


T5, BLIP = '"google/flan-t5-large"', '"Salesforce/blip-image-captioning-base"'


def folder_of(fixture):
    """The folder of a tiny checkpoint, as Python source."""
    return lambda stands: repr(str(stands.fixture(fixture)))


def from_the_guide(stands):
    """What pages that go on from the guide take from it: a pipeline (of a tiny checkpoint) and a picture."""
    from mindiffedit import DDIMScheduler, StableDiffusionDiffEditPipeline, load_image

    pipeline = StableDiffusionDiffEditPipeline.from_pretrained(
        stands.fixture("sd1_folder"), safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return {"pipeline": pipeline, "raw_image": load_image(demo.sample_picture()).resize((80, 64))}


def check_guide(ran):
    assert ran.again.images[0].size == ran.raw_image.size
    assert ran.again.image_latents is ran.inversion.latents  # not inverted again
    assert (ran.folder / "edit.gif").stat().st_size > 1000
    assert ran.source_embeds.shape == ran.target_embeds.shape and len(ran.source_prompts) > 1
    assert ran.caption.startswith("a photograph of")


def shortened(text, count=1):
    """A change that gives the calls with these arguments fewer steps than the default 50, to spare time."""
    return {text: (count, lambda stands: f"{text} num_inference_steps=15,")}


def check_prompts(ran):
    assert len(ran.source_prompts) == 16 + 4 and all(isinstance(one, str) for one in ran.source_prompts)
    assert ran.source_embeds.shape == ran.target_embeds.shape == (1, 77, 32)
    assert ran.output_image.size == ran.raw_image.size and ran.caption.startswith("a photograph of")


def adapters_page(stands):
    """A tiny checkpoint, two LoRAs for its UNet and text encoder, and a word of two vectors."""
    names, rng = from_the_guide(stands), np.random.default_rng(1)
    patterns = dict(unet=r"(.*attn\d\.to_[qv])\.weight", text_encoder=r"(.*self_attn\.[qv]_proj)\.weight")
    for file in ("lora.safetensors", "other_lora.safetensors"):
        matrices = {}
        for part, pattern in patterns.items():
            for name, weight in getattr(names["pipeline"], part).parameters_and_names():
                if match := re.fullmatch(pattern, name):
                    for side, shape in (("A", (2, weight.shape[1])), ("B", (weight.shape[0], 2))):
                        values = rng.normal(0, 0.2, shape).astype("f4")
                        matrices[f"{part}.{match[1]}.lora_{side}.weight"] = values
        assert {name.partition(".")[0] for name in matrices} == {*patterns}
        save_file(matrices, stands.folder / file)
    save_file({"<cat-toy>": rng.normal(0, 1, (2, 32)).astype("f4")}, stands.folder / "cat-toy.safetensors")
    return names


def single_file(stands):
    """A tiny checkpoint as one file, as Python source."""
    from checkpoint_files import write_tensors
    from test_single_file import original

    file = stands.folder / "finetune.safetensors"
    write_tensors(file, original(stands.fixture("sd1_folder"), open_clip=False))
    return repr(str(file))


def weights(cell):
    return np.concatenate([p.asnumpy().ravel() for p in cell.get_parameters()])


def check_adapters(ran):
    plain, mixed, toy = (np.asarray(one, int) for one in (ran.image, ran.mixed, ran.toy))
    assert plain.shape == (64, 80, 3)
    assert not np.array_equal(plain, mixed) and not np.array_equal(mixed, toy)
    assert (ran.folder / "fused-checkpoint" / "model_index.json").is_file()
    assert ran.pipeline.get_list_adapters() == {} and "<cat-toy>" not in ran.pipeline.tokenizer.get_vocab()


def check_models(ran):
    assert ran.pipeline.vae is ran.vae and ran.pipeline.unet is ran.unet
    assert ran.edited.size == ran.freed.size == ran.inpainted.size == ran.picture.size
    assert not np.array_equal(np.asarray(ran.edited), np.asarray(ran.freed))
    for part in ("unet", "vae", "text_encoder"):
        assert np.array_equal(weights(getattr(ran.single, part)), weights(getattr(ran.pipeline, part))), part


def check_readme(ran):
    before, after = np.asarray(ran.picture, float), np.asarray(PIL.Image.open(ran.folder / "pear.png"), float)
    changed = (before != after).any(-1).mean()
    assert before.shape == after.shape and 0.01 < changed < 0.6  # the rest is the picture itself


@pytest.fixture(scope="module")
def demo_server():
    """The address of a server with the demo model."""
    from test_server import live

    from mindiffedit.service.editor import Editor

    with live(Editor.load(SimpleNamespace(model="demo"))) as (address, _):
        yield address


def check_serving(ran):
    assert PIL.Image.open(ran.folder / "pear.png").size == PIL.Image.open(demo.sample_picture()).size


GUIDES_MODELS = {T5: (1, folder_of("t5_folder")), BLIP: (1, folder_of("blip_folder"))}
EMBEDS = {
    **shortened("negative_prompt_embeds=source_embeds,"),
    **shortened("invert(prompt_embeds=source_embeds,"),
    **shortened("invert(prompt=caption,"),
}
PROGRAMS = {
    "README.md": Program(
        {
            '"demo-output/original.png"': (1, lambda stands: repr(str(demo.sample_picture()))),
            "generator=0)": (1, lambda stands: "generator=0, num_inference_steps=20)"),
        },
        check=check_readme,
    ),
    "guide.md": Program(
        {
            MODEL: (1, lambda stands: repr(str(demo.checkpoint_folder()))),
            PICTURE: (1, lambda stands: repr(demo.sample_picture().as_uri())),
            SIZE: (6, lambda stands: str(DEMO_SIZE)),
            SOURCE: (1, lambda stands: repr(demo.SAMPLE_PROMPTS["source"])),
            TARGET: (1, lambda stands: repr(demo.SAMPLE_PROMPTS["target"])),
            # The published guide's part keeps its steps.
            **shortened("raw_image, source_prompt, target_prompt,", 3),
            **shortened("guidance_scale=1.0,"),
            **GUIDES_MODELS,
            **EMBEDS,
        },
        check=check_guide,
    ),
    "masks.md": Program(),  # its blocks assert
    "prompts.md": Program({**GUIDES_MODELS, **EMBEDS}, from_the_guide, check_prompts),
    "adapters.md": Program({}, adapters_page, check_adapters),
    "models.md": Program(
        {
            '"stable-diffusion-v1-5/stable-diffusion-v1-5"': (3, folder_of("sd1_folder")),
            '"stabilityai/sd-vae-ft-mse"': (1, folder_of("sd1_folder")),
            '"some/finetune-of-1-5"': (1, folder_of("sd1_folder")),
            '"finetune.safetensors"': (1, single_file),
            '"fruits.png"': (1, lambda stands: repr(str(demo.sample_picture()))),
            "(512, 512)": (1, lambda stands: "(80, 64)"),
            "num_inference_steps=20": (2, lambda stands: "num_inference_steps=5"),
        },
        check=check_models,
    ),
    "notebook.ipynb": Program(check=check_notebook),
    "api.md": Program(given=lambda stands: {"pipeline": SimpleNamespace()}),  # its blocks assert
    "devices.md": Program(),
    "serving.md": Program(
        {
            '"http://127.0.0.1:8000/v1"': (1, lambda stands: repr(f"{stands.fixture('demo_server')}/v1")),
            '"demo-output/original.png"': (2, lambda stands: repr(str(demo.sample_picture()))),
        },
        check=check_serving,
    ),
}


def run_block(code, names, name):
    """Execute a block as a notebook does; returns the value of the last line where it is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)


def run_program(program, codes, stands, page):
    counts = {text: "".join(codes).count(text) for text in program.changes}
    assert counts == {text: count for text, (count, _) in program.changes.items()}
    unseeded = np.random.default_rng
    ran = Ran(stands.folder)
    with pytest.MonkeyPatch.context() as patch:
        # Pages give few generators: fresh entropy would make this test another one each time.
        patch.setattr(np.random, "default_rng", lambda seed=0: unseeded(seed))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(stands.folder)
        names = {"__name__": page, **program.given(stands)}
        for code in codes:
            for old, (_, new) in program.changes.items():
                code = code.replace(old, new(stands))
            ran.displayed.append(run_block(code, names, page))
            ran.after.append(dict(names))
    return ran


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """A function that runs a page by its name, once."""

    @functools.cache
    def run(name):
        codes = blocks(next(page for page in PAGES if page.name == name), "py", "python")
        stands = Stands(request.getfixturevalue, tmp_path_factory.mktemp("page"))
        return run_program(PROGRAMS[name], codes, stands, name)

    return run


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_pages_run_from_top_to_bottom(name, run):
    PROGRAMS[name].check(run(name))


def test_every_page_with_code_is_run():
    assert {page.name for page in PAGES if blocks(page, "py", "python")} == {*PROGRAMS}


def test_a_page_that_does_not_run_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```py\nx = 1\n```\n\ntext\n\n```python\nfrom mindiffedit import nothing\n```\n")
    codes, stands = blocks(page, "py", "python"), Stands(None, tmp_path)
    with pytest.raises(ImportError):
        run_program(Program(), codes, stands, "page.md")
    assert run_program(Program(), codes[:1] + ["x + 1"], stands, "page.md").displayed == [None, 2]
    with pytest.raises(AssertionError):  # a text that is to be replaced is not there
        run_program(Program({"y = 1": (1, str)}), codes[:1], stands, "page.md")


def test_the_notebook_is_one_without_traces_of_a_machine():
    text = (DOCS / "notebook.ipynb").read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) > 5
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert not re.search(r"/(home|root|tmp|work|Users)\b", text)


# --- the guide -------------------------------------------------------------------------------------

REFERENCES = 7  # the first so many blocks are those of the published guide


def test_nothing_is_installed_unasked():
    guide = blocks(DOCS / "guide.md", "py", "python")
    assert all(line.startswith("#") for line in guide[0].splitlines() if line.strip())


def test_the_guides_edit(run):
    """The published guide's part of the page: its mask, latents and picture are what they should be."""
    ran = run("guide.md")
    names, displayed = SimpleNamespace(**ran.after[REFERENCES - 1]), ran.displayed
    assert names.pipeline.vae_scale_factor == FACTOR
    mask = ran.after[4]["mask_image"]  # as it was made
    check_edit(names.raw_image, names.output_image, mask)
    assert displayed[4].mode == "L" and displayed[4].size == (DEMO_SIZE, DEMO_SIZE)
    assert displayed[REFERENCES - 1].size == (3 * DEMO_SIZE, DEMO_SIZE)
    latents = names.inv_latents.asnumpy()
    assert latents.shape == (1, 40, 4, *mask.shape[1:])  # 50 steps at the default strength of 0.8

    # The guide's picture is smooth, noise is not: neighbours are alike at the end and less so at the start.
    def likeness(sample):
        left, right = sample[..., :-1].ravel(), sample[..., 1:].ravel()
        return np.corrcoef(left, right)[0, 1]

    assert likeness(latents[0, -1]) > likeness(latents[0, 0]) + 0.05


# --- pages -----------------------------------------------------------------------------------------


def command_lines(page):
    """The `mindiffedit ...` lines of a page's shell blocks, continued lines joined."""
    for code in blocks(page, "sh", "bash", "shell", "console", "text"):
        for line in code.replace("\\\n", " ").splitlines():
            if "mindiffedit" not in line:
                continue  # prose may have apostrophes
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and Path(words[0]).name == "mindiffedit":
                yield words[1:]


def test_command_lines_parse(capsys):
    from mindiffedit.cli.arguments import build_parser

    lines = [words for page in PAGES for words in command_lines(page)]
    assert {"demo", "edit", "mask", "invert"} <= {words[0] for words in lines}
    for words in lines:
        try:
            build_parser().parse_args(words)
        except SystemExit as stop:  # --help and --version end so
            assert stop.code in (0, None), (words, capsys.readouterr().err)


def test_links_to_files_lead_somewhere():
    """Of the site's pages too: tests/test_site.py, which needs what builds it."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if not target.startswith(("http://", "https://", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"
