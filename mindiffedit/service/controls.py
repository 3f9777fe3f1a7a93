"""The page's controls of an edit: what they are called, how far they go, and what they take from a file's settings.

Their help is the command line's. Their names are those of the options of `mindiffedit edit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from mindiffedit.cli.arguments import defaults_of, helps_of_edit
from mindiffedit.inputs import EDIT_MASK, PRESETS

MAX_SENTENCE = 1000
"""Characters of a sentence on the page; models read about 300 of them."""
MAX_SEED = 2**53 - 1
"""The largest number that a browser hands on exactly."""

LABELS = {
    "source": "What the picture shows",
    "target": "What it should show",
    "preset": "Preset",
    "strength": "Strength",
    "guidance": "Guidance",
    "steps": "Steps",
    "seed": "Seed",
    "mask_level": "Mask threshold",
    "auto_level": "Mask threshold as suits each map",
    "mask_edges": "Mask edges",
    "sweep_strengths": "Strengths",
    "sweep_guidances": "Guidances",
}
"""What the page calls an option; `auto_level` is the value "auto" of `mask_level`."""

OF_COMPUTED_MASKS = ("mask_level", "mask_edges")
"""Options that mean nothing where a mask is given."""


def sentences() -> dict[str, gr.components.Component]:
    """The two texts, by the names of their options."""
    return {
        name: gr.Textbox(label=LABELS[name], placeholder=example, max_length=MAX_SENTENCE, lines=1, max_lines=4)
        for name, example in (
            ("source", "a bowl of fruits"),
            ("target", "a bowl of pears"),
        )
    }


def settings(of_demo: bool) -> dict[str, gr.components.Component]:
    """The numbers and choices, by the names of their options, at what `mindiffedit edit` takes by default.

    Args:
        of_demo: whether the model is the demo's, which has defaults of its own.
    """
    default = defaults_of("edit", reference=False, of_demo=of_demo)
    helps = {name: text[:1].upper() + text[1:] for name, text in helps_of_edit().items()}

    def slider(name: str, low: float, high: float, step: float, value=None) -> gr.Slider:
        value = default[name] if value is None else value
        return gr.Slider(low, high, value, step=step, label=LABELS[name], info=helps[name])

    return {
        "preset": gr.Radio([*PRESETS], value=default["preset"], label=LABELS["preset"], info=helps["preset"]),
        "strength": slider("strength", 0.05, 1, 0.05),
        "guidance": slider("guidance", 1, 20, 0.5),
        "steps": slider("steps", 2, 100, 1),
        "seed": gr.Number(
            0, label=LABELS["seed"], info=helps["seed"], precision=0, minimum=0, maximum=MAX_SEED, step=1
        ),
        "mask_level": slider("mask_level", 0.05, 0.95, 0.05, EDIT_MASK.threshold),
        "auto_level": gr.Checkbox(False, label=LABELS["auto_level"]),
        "mask_edges": slider("mask_edges", 0, 16, 1, EDIT_MASK.edges),
    }


def options_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The controls' values as options of `mindiffedit edit`; an empty text is none."""
    options = {name: None if isinstance(value, str) and not value.strip() else value for name, value in values.items()}
    if options.pop("auto_level"):
        options["mask_level"] = "auto"
    return options


def taken(
    settings: Mapping[str, Any], controls: Mapping[str, gr.components.Component]
) -> tuple[dict[str, Any], list[str]]:
    """What controls take of the settings in a file, and the labels of those that cannot have the file's value."""
    settings = dict(settings, auto_level=settings.get("mask_level") == "auto")
    if settings["auto_level"]:
        del settings["mask_level"]
    said = {name: settings[name] for name in controls if settings.get(name) is not None}
    values = {name: value for name, value in said.items() if _has_room_for(controls[name], value)}
    return values, [LABELS[name] for name in said if name not in values]


def _has_room_for(control: gr.components.Component, value: Any) -> bool:
    """Whether a value, be it of any type, is one that a user could set."""
    if isinstance(control, gr.Textbox):
        return isinstance(value, str) and len(value) <= MAX_SENTENCE
    if isinstance(control, gr.Radio):
        return value in [choice for _, choice in control.choices]
    if isinstance(control, gr.Checkbox):
        return isinstance(value, bool)
    assert isinstance(control, (gr.Slider, gr.Number))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    whole = control.step == 1
    return bool(control.minimum <= value <= control.maximum) and (not whole or value == int(value))
