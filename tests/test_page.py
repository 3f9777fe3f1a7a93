"""The page of `mindiffedit ui`: its buttons, with an editor that answers at once; and all of it in a browser."""

import base64
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest

gr = pytest.importorskip("gradio")

import mindiffedit  # noqa: E402
from mindiffedit import InputError, demo, masks  # noqa: E402
from mindiffedit.cli import ui  # noqa: E402
from mindiffedit.cli.arguments import build_parser, defaults_of, helps_of_edit  # noqa: E402
from mindiffedit.cli.command import main  # noqa: E402
from mindiffedit.images import reading  # noqa: E402
from mindiffedit.images.colours import Original  # noqa: E402
from mindiffedit.images.settings import MAX_SETTINGS, save_with_settings, settings_in  # noqa: E402
from mindiffedit.images.writing import encoded, save_image_atomically  # noqa: E402
from mindiffedit.outputs import EditReport  # noqa: E402
from mindiffedit.service import controls, edits, painter  # noqa: E402
from mindiffedit.service.editor import Cancelled, Edited  # noqa: E402
from mindiffedit.service.page import FORMATS, LAUNCH, Page, build_page  # noqa: E402

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import page_in_browser  # noqa: E402

TAB = SimpleNamespace(session_hash="a tab")
SETTINGS = {
    "command": "edit", "source": "a cat", "target": "a dog — 犬", "strength": 0.7, "guidance": 6.5, "steps": 30,
    "seed": 5, "preset": "fast", "mask_level": 0.4, "mask_edges": 3, "report": {"warnings": []},
}  # fmt: skip
GRID = np.zeros((1, 16, 16), np.int64)
GRID[:, 4:9, 3:11] = 1


class FakeEditor:
    """Notes what it is asked; its masks are `GRID` unless one is given, its edits the picture with inverted colours."""

    def __init__(self):
        self.calls, self.stages, self.waits, self.warnings = [], [("edit", 0, 2), ("edit", 2, 2)], False, []
        self.started = threading.Event()

    def edit(self, picture, options, *, mask=None, reuse=None, progress=None, cancelled=None):
        self.calls.append(SimpleNamespace(picture=picture, options=dict(options), mask=mask, reuse=reuse))
        for stage in self.stages:
            progress(*stage)
        self.started.set()
        if self.waits:
            assert cancelled.wait(60), "nobody cancelled"
        if cancelled.is_set():
            raise Cancelled
        image = PIL.Image.fromarray(255 - np.asarray(picture.convert("RGB")))
        grid = GRID if mask is None or isinstance(mask, PIL.Image.Image) else mask
        report = EditReport([0.5], warnings=self.warnings)
        settings = {**SETTINGS, **{name: value for name, value in options.items() if value is not None}}
        map_ = None if mask is not None else GRID.astype(np.float32) * 2
        return Edited(image, grid, None, report, map_, None, settings, {"mask": 0.25, "edit": 1.5}, ())


@pytest.fixture
def editor():
    return FakeEditor()


@pytest.fixture
def page(editor):
    return Page(edits.Edits(lambda: editor, {"size": 256}), of_demo=True)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "apple.png"
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    return str(path)


def values_of(page, picture, **changes):
    """What a browser sends for the page as it is, with some values changed."""
    values = {control: control.value for control in page.named.values()}
    values.update({page.picture: picture, page.kind: "PNG", page.result: None, page.painted: ""})
    values.update({page.strengths: "", page.guidances: ""})
    values.update({page.named["source"]: "a cat", page.named["target"]: "a dog"})
    return {**values, **{getattr(page, name, None) or page.named[name]: value for name, value in changes.items()}}


def nobody(*steps, desc):
    """Is told of progress."""


def text_of(line):
    return re.sub(r"<[^>]+>", " ", line).strip()


# --- settings in files -----------------------------------------------------------------------------


@pytest.mark.parametrize("extension", FORMATS.values())
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
def test_settings_go_into_a_file_and_come_back(tmp_path, extension, mode):
    path = tmp_path / f"edited.{extension}"
    save_with_settings(PIL.Image.new(mode, (20, 30)), path, SETTINGS)
    assert settings_in(reading.load_as_is(str(path))) == SETTINGS


def test_what_else_is_in_the_exif_data_stays(tmp_path):
    picture, exif = PIL.Image.new("RGB", (20, 30)), PIL.Image.Exif()
    exif[0x010E] = "an apple"
    exif.get_ifd(0x8769)[0x9003] = "2020:02:02 02:02:02"
    picture.info["exif"] = exif.tobytes()
    save_with_settings(picture, tmp_path / "edited.jpg", SETTINGS)
    with PIL.Image.open(tmp_path / "edited.jpg") as written:
        assert written.getexif()[0x010E] == "an apple"
        assert written.getexif().get_ifd(0x8769)[0x9003] == "2020:02:02 02:02:02"
    assert picture.info["exif"] == exif.tobytes()


def test_a_file_without_room_for_them_is_written_without(tmp_path):
    picture, long = PIL.Image.new("RGB", (20, 30), "red"), {**SETTINGS, "source": "x" * MAX_SETTINGS}
    for extension in FORMATS.values():
        save_with_settings(picture, tmp_path / f"edited.{extension}", long)
        read = reading.load_as_is(str(tmp_path / f"edited.{extension}"))
        assert settings_in(read) is None and read.size == (20, 30)


@pytest.mark.parametrize(
    "text", ["", "nothing", "[1]", '"edit"', "{}", '{"command": "mask"}', "[" * 50_000, "{" + "x" * MAX_SETTINGS]
)
def test_other_texts_in_files_are_no_settings(text):
    picture = PIL.Image.new("RGB", (2, 2))
    picture.info["mindiffedit"] = text
    assert settings_in(picture) is None


@pytest.mark.parametrize("data", [b"", b"Exif\0\0damaged", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 300])
def test_damaged_exif_data_has_no_settings(data):
    picture = PIL.Image.new("RGB", (2, 2))
    picture.info["exif"] = data
    assert settings_in(picture) is None


def test_files_of_the_command_have_no_settings(tmp_path):
    save_with_settings(PIL.Image.new("RGB", (2, 2)), tmp_path / "first.png", SETTINGS)
    read = reading.load_as_is(str(tmp_path / "first.png"))
    save_image_atomically(Original(read).rewritten(PIL.Image.new("RGB", (2, 2), "red")), tmp_path / "second.png")
    assert b"mindiffedit" not in (tmp_path / "second.png").read_bytes()


# --- controls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_demo", [True, False])
def test_controls_begin_at_the_command_s_defaults(of_demo):
    settings, default = controls.settings(of_demo), defaults_of("edit", False, of_demo)
    for name in ("preset", "strength", "guidance", "steps"):
        assert settings[name].value == default[name], name
    options = controls.options_of({name: control.value for name, control in settings.items()})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    parsed = build_parser().parse_args(["edit", "x.png", "--target", "y", *words])
    assert parsed.mask_level == 0.6 and parsed.mask_edges == 4 and parsed.seed == 0


def test_controls_say_what_the_command_s_help_says():
    for name, control in controls.settings(True).items():
        if name != "auto_level":
            said = helps_of_edit()[name]
            assert control.info == said[0].upper() + said[1:] and len(said) > 10
            assert control.label == controls.LABELS[name]


def test_controls_give_options():
    values = {"source": " ", "target": "a dog", "mask_level": 0.5, "auto_level": True}
    assert controls.options_of(values) == {"source": None, "target": "a dog", "mask_level": "auto"}
    assert controls.options_of({**values, "auto_level": False})["mask_level"] == 0.5


def test_controls_take_the_settings_of_a_file():
    named = {**controls.sentences(), **controls.settings(True)}
    values, refused = controls.taken(SETTINGS, named)
    assert values == {**{name: SETTINGS[name] for name in named if name != "auto_level"}, "auto_level": False}
    assert not refused
    values, _ = controls.taken({**SETTINGS, "mask_level": "auto"}, named)
    assert values["auto_level"] is True and "mask_level" not in values


@pytest.mark.parametrize(
    "name, value",
    [("source", 5), ("target", "x" * 2000), ("strength", 1.5), ("strength", "0.5"), ("strength", True), ("steps", 2.5)]
    + [("steps", 10**400), ("guidance", float("nan")), ("guidance", [7]), ("seed", -1), ("preset", "exactly")]
    + [("preset", ["exact"]), ("preset", {}), ("mask_level", float("inf")), ("mask_edges", {"a": 1})],
)
def test_controls_refuse_what_nobody_could_set(name, value):
    named = {**controls.sentences(), **controls.settings(True)}
    values, refused = controls.taken({**SETTINGS, name: value}, named)
    assert refused == [controls.LABELS[name]] and name not in values
    assert values.keys() == named.keys() - {name}


# --- masks to paint on -----------------------------------------------------------------------------


def address_of(picture):
    """What the browser gives of a canvas."""
    return "data:image/png;base64," + base64.b64encode(encoded(picture, "PNG")).decode()


def test_a_mask_is_painted_and_read_as_it_was():
    picture = PIL.Image.new("RGB", (128, 128), "red")
    code = painter.painter(picture, masks.as_picture(GRID, picture.size))
    below, canvas = re.findall(r'"(data:image/png;base64,[^"#]*)', code)
    assert reading.load_image(below).getpixel((5, 5)) == (255, 0, 0)
    assert (masks.user_mask(painter.painted_mask(canvas), (16, 16), soft=False) == GRID).all()
    _, empty = re.findall(r'"(data:image/png;base64,[^"#]*)', painter.painter(picture))
    with pytest.raises(InputError, match="the mask is empty; paint over what may change"):
        painter.painted_mask(empty)


def test_what_is_painted_by_half_is_in_the_mask():
    layer = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    layer.paste((255, 90, 0, 255), (0, 0, 8, 8))
    layer.paste((255, 90, 0, 128), (8, 0, 16, 8))
    layer.paste((255, 90, 0, 127), (16, 0, 24, 8))
    mask = np.asarray(painter.painted_mask(address_of(layer)))
    assert (mask[:8, :16] == 255).all() and mask.sum() == 255 * 8 * 16


@pytest.mark.parametrize("text", ["", "/etc/passwd", "http://127.0.0.1/", "data:image/png;base64,AAAA", "data:,x"])
def test_what_is_no_canvas_is_no_mask(text):
    with pytest.raises(InputError):
        painter.painted_mask(text)


def test_a_large_picture_is_shown_at_a_smaller_size():
    shown = edits.shown(PIL.Image.new("L", (3000, 1000)))
    assert shown.size == (edits.MAX_SHOWN, 533) and shown.mode == "RGB"


PAINTED = address_of(PIL.Image.new("RGBA", (128, 96), (255, 90, 0, 255)))


# --- the buttons -----------------------------------------------------------------------------------


def test_an_edit(page, editor, picture):
    told = []
    shown = page.on_edit(values_of(page, picture, steps=7), TAB, lambda done, desc: told.append((desc, *done)))
    (call,) = editor.calls
    assert call.picture.size == (128, 96) and call.mask is None and call.reuse is None
    assert call.options["steps"] == 7 and call.options["size"] == 256 and call.options["source"] == "a cat"
    assert call.options["mask_level"] == 0.6 and call.options["mask_edges"] == 4
    assert told[-1] == ("edit", 2, 2)
    assert "16% of the picture is in the mask. Mask 0.2 s, edit 1.5 s." in text_of(shown[page.state])
    before, after = shown[page.compare]
    assert (np.asarray(before) == 255 - np.asarray(after)).all()
    for part in (page.original, page.map, page.mask, page.edited):
        assert shown[part].size == (128, 96)
    assert np.asarray(shown[page.map]).max() == 255
    assert "<canvas" in shown[page.paint]


def test_the_download_has_the_settings(page, editor, picture):
    for kind, extension in FORMATS.items():
        shown = page.on_edit(values_of(page, picture, kind=kind, seed=3), TAB, nobody)
        path = shown[page.download]["value"]
        assert path == page.on_kind(shown[page.result], kind)
        assert Path(path).name == f"apple-edited.{extension}"
        assert settings_in(reading.load_as_is(path))["seed"] == 3
    assert page.on_kind(None, "PNG") == gr.skip()


def test_an_edit_inside_a_painted_mask_takes_the_inversion_again(page, editor, picture):
    first = page.on_edit(values_of(page, picture), TAB, nobody)
    given = values_of(page, picture, painted=PAINTED, result=first[page.result])
    shown = page.on_inside(given, TAB, nobody)
    call = editor.calls[-1]
    assert np.asarray(call.mask).all() and call.reuse is first[page.result].edited
    assert not {"mask_level", "mask_edges"} & call.options.keys()
    assert shown[page.map] is None and "in the mask" in shown[page.state]


def test_a_mask_can_be_painted_before_the_first_edit(page, editor, picture):
    page.on_inside(values_of(page, picture, painted=PAINTED), TAB, nobody)
    assert editor.calls[-1].reuse is None
    for painted in (None, "", "data:,"):
        shown = page.on_inside(values_of(page, picture, painted=painted), TAB, nobody)
        assert shown.keys() == {page.state} and "There is no mask yet" in shown[page.state]


def test_a_contact_sheet(page, editor, picture):
    told = []
    given = values_of(page, picture, strengths="0.5, 0.9", guidances="2,5,8")
    shown = page.on_draw(given, TAB, lambda done, desc: told.append(desc))
    asked = [(call.options["strength"], call.options["guidance"]) for call in editor.calls]
    assert asked == [(strength, guidance) for strength in (0.5, 0.9) for guidance in (2, 5, 8)]
    first, *others = editor.calls
    assert first.mask is None and all((call.mask == GRID).all() for call in others)
    assert all("mask_level" not in call.options for call in others)
    assert [call.reuse is not None for call in editor.calls] == [False, True, True] * 2
    assert shown[page.sheet].width > 3 * 128 and shown[page.sheet].height > 2 * 96
    assert told[-1] == "picture 6 of 6: edit"


def test_a_contact_sheet_tries_values_around_the_present_ones(page, editor, picture):
    page.on_draw(values_of(page, picture, strength=0.8, guidance=6, steps=20), TAB, nobody)
    assert {call.options["strength"] for call in editor.calls} == {0.6, 0.8, 1.0}
    assert {call.options["guidance"] for call in editor.calls} == {4, 6, 8}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(strengths="0.5, x"), "“Strengths” to sweep over has 'x'"),
        (dict(guidances="a lot"), "“Guidances”"),
        (dict(strengths="0.01"), "“Strengths”"),
    ],
)
def test_what_does_not_fit_a_sheet_is_said_in_words(page, editor, picture, changes, words):
    shown = page.on_draw(values_of(page, picture, **changes), TAB, nobody)
    assert words in text_of(shown[page.state]) and 'role="alert"' in shown[page.state]
    assert not editor.calls


def test_without_a_picture_every_button_says_so(page, editor):
    for press in (page.on_edit, page.on_inside, page.on_draw):
        shown = press(values_of(page, None, painted=PAINTED), TAB, nobody)
        assert "There is no picture yet" in shown[page.state]
    assert not editor.calls


# --- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words",
    [
        (InputError("`mask_level` is 7; give less."), "“Mask threshold” is 7; give less."),
        (InputError("`source` and `target` are the same."), "“What the picture shows” and “What it should show” are"),
        (InputError("--no-such is not here, `x_y` neither."), "--no-such is not here, x_y neither."),
        (InputError("/tmp/some/folder/cat.png is no picture."), "cat.png is no picture."),
        (InputError("{parameter} is {value!r}.", "num_inference_steps", value="<b>"), "“Steps” is '&lt;b&gt;'."),
        (OSError(28, "No space left on device"), "This failed: OSError: [Errno 28] No space left on device"),
        (MemoryError(), "This failed: MemoryError"),
        (Cancelled(), "Cancelled."),
    ],
)
def test_problems_are_said_in_the_page_s_words(error, words):
    with edits.problems() as problem:
        raise error
    assert words.replace("x_y", "`x_y`") in problem.line


def test_a_bug_is_said_and_logged(page, editor, picture, caplog):
    editor.edit = lambda *args, **kwargs: 1 / 0
    with caplog.at_level(logging.ERROR):
        shown = page.on_edit(values_of(page, picture), TAB, nobody)
    assert "by a bug of mindiffedit: ZeroDivisionError: division by zero" in text_of(shown[page.state])
    assert "Traceback" in caplog.text


def test_no_problem_says_nothing():
    with edits.problems() as problem:
        pass
    assert problem.line == ""


def test_the_edit_s_warnings_are_notes(page, editor, picture):
    editor.warnings = ["the mask is nearly everything: raise --mask-level."]
    shown = page.on_edit(values_of(page, picture), TAB, nobody)
    assert "The mask is nearly everything: raise “Mask threshold”." in text_of(shown[page.state])


# --- a new picture ---------------------------------------------------------------------------------


def test_a_new_picture_is_there_to_be_painted_on(page, picture):
    taken = page.on_picture(picture)
    assert taken[page.result] is None and "<canvas" in taken[page.paint]
    assert taken.keys() == {page.result, page.paint, page.state}
    assert "<canvas" not in page.on_picture(None)[page.paint]


def test_a_picture_s_settings_are_taken(page, tmp_path):
    save_with_settings(PIL.Image.new("RGB", (64, 64)), tmp_path / "a.jpg", {**SETTINGS, "steps": 1000})
    taken = page.on_picture(str(tmp_path / "a.jpg"))
    assert taken[page.named["source"]] == "a cat" and taken[page.named["strength"]] == 0.7
    assert page.named["steps"] not in taken
    assert "are taken, but not those for Steps" in text_of(taken[page.state])


def test_what_is_no_picture_is_said_in_words(page, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    taken = page.on_picture(str(tmp_path / "a.png"))
    assert "a.png" in taken[page.state] and str(tmp_path) not in taken[page.state]
    assert 'class="problem"' in taken[page.state] and "<canvas" not in taken[page.paint]
    shown = page.on_edit(values_of(page, str(tmp_path / "a.png")), TAB, nobody)
    assert 'class="problem"' in shown[page.state]


# --- cancelling ------------------------------------------------------------------------------------


def test_cancel_stops_what_a_tab_does_and_nothing_else(page, editor, picture):
    page.on_start("", TAB)
    editor.waits = True
    shown = {}
    thread = threading.Thread(target=lambda: shown.update(page.on_edit(values_of(page, picture), TAB, nobody)))
    thread.start()
    assert editor.started.wait(60)
    page.on_cancel(SimpleNamespace(session_hash="another tab"))
    assert thread.is_alive()
    page.on_cancel(TAB)
    thread.join(60)
    assert not thread.is_alive() and text_of(shown[page.state]) == "Cancelled." and shown.keys() == {page.state}


def test_what_waits_for_its_turn_can_be_cancelled_too(page, editor, picture):
    page.on_start("", TAB)
    page.on_cancel(TAB)
    assert "Cancelled." in page.on_edit(values_of(page, picture), TAB, nobody)[page.state]
    page.on_start("", TAB)  # and the next work is not
    assert "in the mask" in page.on_edit(values_of(page, picture), TAB, nobody)[page.state]


def test_a_tab_that_is_closed_cancels(page, editor, picture):
    page.on_start("", TAB)
    stop = page.work._stops[TAB.session_hash]
    page.on_close(TAB)
    page.on_close(TAB)
    assert stop.is_set() and not page.work._stops


# --- what Gradio is told ---------------------------------------------------------------------------


def test_nothing_is_public_and_nothing_is_asked_of_others(page):
    for event in page.blocks.fns.values():
        assert event.api_visibility == "private" or any(kind == "unload" for _, kind in event.targets), event.name
    assert not page.blocks.analytics_enabled
    assert not LAUNCH["theme"]._stylesheets and not LAUNCH["theme"]._font_css
    assert "url(" not in LAUNCH["css"]


def test_a_page_is_built_for_every_model():
    blocks = build_page(lambda: None, of_demo=False)
    assert isinstance(blocks, gr.Blocks)


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_ports_are_checked(port, capsys):
    assert main(["ui", f"--port={port}"]) == 2
    assert f"--port {port} is none; give one from 1 to 65535." in capsys.readouterr().err


def test_sizes_are_checked(capsys):
    assert main(["ui", "--size=0"]) == 2
    assert "--size" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mindiffedit.service.page", None)
    monkeypatch.setattr(ui.signal, "signal", lambda *_: None)
    assert main(["ui"]) == 2
    assert "pip install 'mindiffedit[serve]'" in capsys.readouterr().err


def test_help_is_quick():
    code = "import sys; from mindiffedit.cli.command import main; main(['ui', '-h']); print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--share" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_the_space_names_this_version():
    space = Path(__file__).resolve().parents[1] / "docs" / "space"
    assert f"mindiffedit-{mindiffedit.__version__}-" in (space / "requirements.txt").read_text(encoding="utf-8")
    header = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert re.search(r"^sdk_version: (.*)$", header, re.MULTILINE)[1] == gr.__version__
    assert re.search(r"^app_file: (.*)$", header, re.MULTILINE)[1] == "app.py"
    compile((space / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


# --- in a browser ----------------------------------------------------------------------------------

WHY_NOT = "needs Chromium (apt install chromium) and Playwright (pip install playwright)"


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("playwright", reason=WHY_NOT)
    if page_in_browser.chromium() is None:
        pytest.skip(WHY_NOT)
    with page_in_browser.browser() as program:
        yield program


@pytest.fixture(scope="module")
def address():
    with page_in_browser.served() as address:
        yield address


@pytest.fixture
def tab(program, address):
    """A tab with the page, which asks nothing of other machines and has no error in its console."""
    tab, asked, wrong = page_in_browser.opened(program, address), set(), []
    tab.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.reload()
    tab.locator("#edit").wait_for()
    yield tab
    tab.context.close()
    assert asked - {None} == {"127.0.0.1"} and not wrong


def line_of(tab, words):
    """What the page's line of state says, when it has these words."""
    tab.locator("#line", has_text=words).wait_for()
    return tab.locator("#line").inner_text()


PAINTED_SHARE = """() => {
    const canvas = document.querySelector("#paint canvas");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.filter((value, index) => index % 4 == 3 && value > 127).length / (pixels.length / 4);
}"""


def stroke(tab, start, end):
    """Draw a line over the mask, between points in shares of its width and height."""
    canvas = tab.locator("#paint canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    tab.mouse.down()
    tab.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=20)
    tab.mouse.up()


def edit_inside(tab):
    tab.locator("#inside").click()
    tab.locator("#cancel").wait_for()
    tab.locator("#cancel").wait_for(state="hidden")


@pytest.mark.tools
def test_upload_edit_paint_and_edit_again(tab, tmp_path):
    tab.locator("#picture input[type=file]").set_input_files(demo.sample_picture())
    tab.locator("#picture img").wait_for()
    tab.get_by_label(controls.LABELS["source"]).fill(demo.SAMPLE_PROMPTS["source"])
    tab.get_by_label(controls.LABELS["target"]).fill(demo.SAMPLE_PROMPTS["target"])
    page_in_browser.edit(tab)
    first = line_of(tab, "in the mask")
    assert "inversion" in first.lower()
    for part in ("original", "map", "mask", "edited"):
        tab.locator(f"#{part} img").wait_for()

    tab.wait_for_function(f"({PAINTED_SHARE})() > 0.1 && ({PAINTED_SHARE})() < 0.4")  # the mask that was computed
    stroke(tab, (0.1, 0.1), (0.9, 0.15))
    edit_inside(tab)
    again = line_of(tab, "in the mask")
    assert "inversion" not in again.lower() and "edit" in again.lower()
    added = int(again.split("%")[0])
    assert added > int(first.split("%")[0])

    tab.get_by_label("Eraser").check()
    stroke(tab, (0.1, 0.12), (0.9, 0.5))
    edit_inside(tab)
    assert int(line_of(tab, "in the mask").split("%")[0]) < added

    tab.get_by_label("JPEG").check()
    with tab.expect_download() as download:
        tab.locator("#download").click()
    download.value.save_as(tmp_path / "edited.jpg")
    settings = settings_in(reading.load_as_is(str(tmp_path / "edited.jpg")))
    assert settings["target"] == demo.SAMPLE_PROMPTS["target"] and settings["model"] == "demo"

    tab.get_by_label(controls.LABELS["target"]).fill("something else")
    tab.locator("#picture").get_by_label("Clear").or_(tab.locator("#picture").get_by_label("Remove")).first.click()
    tab.locator("#picture input[type=file]").set_input_files(tmp_path / "edited.jpg")
    line_of(tab, "The settings in the picture's file are taken.")
    assert tab.get_by_label(controls.LABELS["target"]).input_value() == demo.SAMPLE_PROMPTS["target"]


@pytest.mark.tools
def test_a_contact_sheet_in_the_browser(tab):
    page_in_browser.choose_example(tab)
    tab.get_by_label("Strengths").fill("0.5, 0.9")
    tab.get_by_label("Guidances").fill("2, 5")
    tab.locator("#draw").click()
    line_of(tab, "The sheet is made.")
    tab.locator("#sheet img").wait_for()


@pytest.mark.tools
def test_an_edit_is_cancelled(tab):
    page_in_browser.choose_example(tab)
    tab.get_by_role("button", name="Settings").first.click()
    tab.get_by_label("exact").check()
    tab.get_by_label(f"number input for {controls.LABELS['steps']}").fill("100")
    tab.locator("#edit").click()
    tab.locator("#state", has_text=re.compile(r"\d+/\d+")).wait_for()
    tab.locator("#cancel").click()
    line_of(tab, "Cancelled.")
    tab.locator("#cancel").wait_for(state="hidden")
    assert tab.locator("#edit").is_enabled()


@pytest.mark.tools
def test_what_is_wrong_is_said_in_words(tab):
    tab.locator("#edit").click()
    line_of(tab, "There is no picture yet")
    page_in_browser.choose_example(tab)
    tab.get_by_label(controls.LABELS["target"]).fill(demo.SAMPLE_PROMPTS["source"])
    tab.locator("#edit").click()
    line_of(tab, "are the same text: there is nothing to change.")
    assert "“What the picture shows”" in tab.locator("#line").inner_text()


@pytest.mark.tools
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_fits_a_telephone(program, address, colours):
    tab = page_in_browser.opened(program, address, page_in_browser.NARROW, colours)
    page_in_browser.choose_example(tab)
    page_in_browser.edit(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= page_in_browser.NARROW[0]
    assert tab.evaluate(
        "(table => table.scrollWidth <= table.clientWidth)(document.querySelector('#examples div:has(> table)'))"
    )
    lightness = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    shades = [int(part) for part in re.findall(r"\d+", lightness)[:3]]
    assert (max(shades) < 100) == (colours == "dark")
    tab.context.close()
