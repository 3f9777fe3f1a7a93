"""The page of `mindiffedit ui`: its parts, where they stand, and which button does what.

What the buttons do is in `edits`, what the controls are in `controls`.
"""

from __future__ import annotations

import tempfile
from abc import ABCMeta
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from mindiffedit import demo, masks
from mindiffedit.images import reading
from mindiffedit.images.settings import save_with_settings, settings_in
from mindiffedit.service import controls, edits, painter
from mindiffedit.service.editor import Editor
from mindiffedit.service.edits import Edits, Result, line

FORMATS = {"PNG": "png", "JPEG": "jpg", "WebP": "webp"}
"""Of the file to download: names, and extensions."""

WELCOME = line("Choose a picture, say what it shows and what it should show, and press Edit.", "note")

_STYLE = """
.gradio-container { max-width: 1400px !important; }
#state { position: sticky; top: 0; z-index: 20; align-items: center; padding: 4px 0;
         background: var(--body-background-fill); }
#line { min-height: 64px; }
#line p { margin: 2px 0; padding: 8px 12px; border-radius: 6px; border-left: 4px solid var(--color-accent);
          background: var(--block-background-fill); overflow-wrap: anywhere; }
#line p.note { border-color: var(--neutral-400); }
#line p.problem { border-color: var(--error-border-color); background: var(--error-background-fill);
                  color: var(--error-text-color); }
#line .pending { visibility: hidden; }
#cancel { max-width: 160px; }
#examples table { table-layout: fixed; width: 100%; }
#examples th:first-child { width: 92px; }
#examples :is(th, td) { white-space: normal; overflow-wrap: anywhere; padding: 6px; }
#parts img { width: 100%; height: 100%; object-fit: contain; }
"""

LAUNCH: dict[str, Any] = {
    # A system's own fonts are there at once; others would be asked of a server.
    "theme": gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ),
    "css": _STYLE + painter.STYLE,
    "head": painter.HEAD,
    "footer_links": ["settings"],
    "max_file_size": "64mb",
    "state_session_capacity": 100,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "show_error": True,
}
"""What `launch` is given for the page that `build_page` builds, beside address and port."""

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_AT_ONCE: dict[str, Any] = {**_PRIVATE, "queue": False, "show_progress": "hidden"}
_IN_TURN: dict[str, Any] = {**_PRIVATE, "concurrency_id": "model", "concurrency_limit": 1}

_PROGRESS = gr.Progress()


def build_page(
    editor: Callable[[], Editor], *, of_demo: bool = True, fixed: Mapping[str, Any] | None = None
) -> gr.Blocks:
    """The page, to be launched with `LAUNCH`.

    Args:
        editor: gives the editor; called in the thread of an edit, it may wait until the model is loaded.
        of_demo: whether the model is the demo's, which has defaults of its own.
        fixed: options of `mindiffedit edit` that every edit gets, such as `size`.
    """
    return Page(Edits(editor, fixed), of_demo).blocks


# Hands on the file as it came: what is wrong with it is said in our words, by `reading`. For the browser it is a
# gr.Image. A `class` statement would make Gradio write a file of types beside this one.
_Picture = ABCMeta.__new__(
    type(gr.Image),
    "_Picture",
    (gr.Image,),
    {"is_template": True, "preprocess": lambda self, file: None if file is None else file.path},
)


class Page:
    """The parts of the page as attributes, its events as methods; `blocks` is what Gradio launches.

    Events get a dict with the values of their inputs, by component, and return one with new values.
    """

    def __init__(self, work: Edits, of_demo: bool):
        self.work = work
        with gr.Blocks(title="mindiffedit", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            self.result = gr.State(None, time_to_live=86400)
            gr.Markdown("# mindiffedit\nSay what a picture shows and what it should show; the rest is kept.")
            with gr.Row(elem_id="state"):
                self.state = gr.HTML(WELCOME, elem_id="line", scale=5, min_width=240)
                self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel", min_width=100)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._build_input(of_demo)
                with gr.Column(scale=3, min_width=320):
                    self._build_result()
                    self._build_mask()
                    self._build_sheet()
            self.named = {**self.texts, **self.settings}
            self._connect()

    # --- its parts -----------------------------------------------------------------------------------

    def _build_input(self, of_demo: bool) -> None:
        self.picture = _Picture(label="Picture", sources=["upload", "clipboard"], height=260, elem_id="picture")
        self.texts = controls.sentences()
        self.edit = gr.Button("Edit", variant="primary", elem_id="edit")
        with gr.Accordion("Settings", open=False):
            self.settings = controls.settings(of_demo)
        gr.Examples(
            [[str(demo.sample_picture(name)), *texts] for name, (_, *texts) in demo.EXAMPLES.items()],
            [self.picture, *self.texts.values()],
            elem_id="examples",
            api_visibility="private",
        )

    def _build_result(self) -> None:
        seen: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["fullscreen"]}
        self.compare = gr.ImageSlider(label="Original and edited", max_height=420, **seen)
        with gr.Row(elem_id="parts"):
            self.original, self.map, self.mask, self.edited = (
                gr.Image(label=label, min_width=130, height=200, elem_id=label.lower(), **seen)
                for label in ("Original", "Map", "Mask", "Edited")
            )
        with gr.Row():
            self.kind = gr.Radio([*FORMATS], value="PNG", label="Format", scale=2, min_width=200)
            self.download = gr.DownloadButton(
                "Download, with settings", interactive=False, elem_id="download", min_width=180
            )

    def _build_mask(self) -> None:
        gr.Markdown("### Paint on the mask\nThe brush adds to what may change, the eraser takes away.")
        self.paint = gr.HTML(painter.EMPTY, elem_id="paint")
        self.painted = gr.Textbox(visible="hidden", label="Painted")
        self.inside = gr.Button("Edit again inside this mask", variant="primary", elem_id="inside")

    def _build_sheet(self) -> None:
        gr.Markdown(
            "### Look and choose\nEdits over strength, downwards, and guidance, across, all inside one mask; without "
            "values some around the present ones."
        )
        with gr.Row():
            self.strengths, self.guidances = (
                gr.Textbox(label=controls.LABELS[name], placeholder=such, max_length=200)
                for name, such in (("sweep_strengths", "0.5, 0.7, 0.9"), ("sweep_guidances", "3, 5, 8"))
            )
        self.draw = gr.Button("Make the sheet", variant="primary", elem_id="draw")
        self.sheet = gr.Image(
            label="Contact sheet", format="png", interactive=False, buttons=["download", "fullscreen"], elem_id="sheet"
        )

    # --- what happens --------------------------------------------------------------------------------

    def _connect(self) -> None:
        pictures = [self.compare, self.original, self.map, self.mask, self.edited, self.paint, self.download]
        given = {self.picture, self.kind, self.result, *self.named.values()}
        for button, work, inputs, outputs in (
            (self.edit, self.on_edit, given, [self.state, self.result, *pictures]),
            (self.inside, self.on_inside, given | {self.painted}, [self.state, self.result, *pictures]),
            (self.draw, self.on_draw, given | {self.strengths, self.guidances}, [self.state, self.sheet]),
        ):
            # The browser hands on what is painted as it is when the button is pressed.
            taking = {"inputs": self.painted, "outputs": [self.painted, *self.switches], "js": painter.READ}
            started = button.click(self.on_start, **taking, **_AT_ONCE)
            ended = started.then(work, inputs, outputs, show_progress_on=self.state, **_IN_TURN)
            ended.then(self.on_end, None, self.switches, **_AT_ONCE)
        self.cancel.click(self.on_cancel, None, None, **_AT_ONCE)
        self.blocks.unload(self.on_close)
        changed = [self.state, self.result, self.paint, *self.named.values()]
        self.picture.change(self.on_picture, self.picture, changed, **_AT_ONCE)
        self.kind.change(self.on_kind, [self.result, self.kind], self.download, **_AT_ONCE)
        auto, level = self.settings["auto_level"], self.settings["mask_level"]
        auto.change(lambda is_auto: gr.update(interactive=not is_auto), auto, level, **_AT_ONCE)

    @property
    def switches(self) -> list[gr.Button]:
        """The buttons that start work, and the one that cancels it."""
        return [self.edit, self.inside, self.draw, self.cancel]

    def on_start(self, painted: str, request: gr.Request):
        self.work.begin(_tab(request))
        return [painted, *[gr.update(interactive=False)] * 3, gr.update(visible=True)]

    def on_end(self):
        return [*[gr.update(interactive=True)] * 3, gr.update(visible=False)]

    def on_cancel(self, request: gr.Request):
        self.work.cancel(_tab(request))

    def on_close(self, request: gr.Request):
        self.work.close(_tab(request))

    def on_edit(self, data: dict, request: gr.Request, progress: gr.Progress = _PROGRESS):
        with edits.problems() as said:
            done = self.work.edit(_tab(request), data[self.picture], self._options(data), _shown_by(progress))
            return self._shown(done, data[self.kind])
        return {self.state: said.line}

    def on_inside(self, data: dict, request: gr.Request, progress: gr.Progress = _PROGRESS):
        with edits.problems() as said:
            asked = self._options(data), data[self.painted] or "", _shown_by(progress), data[self.result]
            return self._shown(self.work.edit_inside(_tab(request), data[self.picture], *asked), data[self.kind])
        return {self.state: said.line}

    def on_draw(self, data: dict, request: gr.Request, progress: gr.Progress = _PROGRESS):
        with edits.problems() as said:
            asked = data[self.picture], self._options(data), data[self.strengths], data[self.guidances]
            sheet = self.work.sheet(_tab(request), *asked, _shown_by(progress))
            return {self.sheet: sheet, self.state: line("The sheet is made.")}
        return {self.state: said.line}

    def on_picture(self, path: str | None):
        """Nothing is edited of a new picture, and the controls take the settings in its file."""
        nothing: dict = {self.result: None, self.paint: painter.EMPTY, self.state: WELCOME}
        if path is None:
            return nothing
        with edits.problems() as said:
            picture = reading.load_as_is(path)
            settings = settings_in(picture)
            return {**nothing, self.paint: painter.painter(edits.shown(picture)), **self._taken(settings or {})}
        return {**nothing, self.state: said.line}

    def on_kind(self, result: Result | None, kind: str):
        return gr.skip() if result is None else self._written(result, kind)

    # --- parts of it ---------------------------------------------------------------------------------

    def _options(self, data: dict) -> dict[str, Any]:
        return controls.options_of({name: data[control] for name, control in self.named.items()})

    def _taken(self, settings: Mapping[str, Any]) -> dict:
        if not settings:
            return {}
        values, refused = controls.taken(settings, self.named)
        words = f", but not those for {', '.join(refused)}, which the page cannot have" if refused else ""
        updates: dict = {self.named[name]: value for name, value in values.items()}
        return {**updates, self.state: line(f"The settings in the picture's file are taken{words}.")}

    def _shown(self, result: Result, kind: str) -> dict:
        picture, edited = reading.load_as_is(result.picture), result.edited
        before, after = edits.shown(picture), edits.shown(edited.image)
        mask = masks.as_picture(edited.mask, before.size)
        return {
            self.result: result,
            self.state: edits.summary(edited),
            self.compare: (before, after),
            self.original: before,
            self.map: edits.map_picture(edited, before.size),
            self.mask: mask,
            self.edited: after,
            self.paint: painter.painter(before, mask),
            self.download: gr.update(value=self._written(result, kind), interactive=True),
        }

    def _written(self, result: Result, kind: str) -> str:
        """The file to download, with the settings in it, where Gradio serves files from."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / edits.suggested_name(result.picture, FORMATS[kind])
            save_with_settings(result.edited.image, path, result.edited.settings)
            return self.download.move_resource_to_block_cache(path) or ""


def _tab(request: gr.Request) -> str:
    return request.session_hash or ""


def _shown_by(progress: gr.Progress) -> edits.Progress:
    return lambda stage, done, total: progress((done, total), desc=stage)
