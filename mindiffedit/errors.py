"""Errors about what a user gave, worded for the interface that it was given by.

A sentence names parameters. Python names them one way (`num_inference_steps`), the command line another (--steps), and
which of the two is meant is known only where the sentence is shown.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_VALUE_LENGTH = 100  # characters of a value's repr in a message
MAX_TEXT_LENGTH = 250  # of a text in a message that is shown without quotes, such as a path

__all__ = ["InputError", "InputTypeError", "Message", "cut", "first_line", "named", "shown", "whole"]


def cut(text: str, longest: int) -> str:
    """A text for a message; of a long one the beginning, and its length."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()}... ({len(text)} characters)"


def shown(value: Any) -> str:
    """A value's repr for a message; a long one is cut, with its length."""
    return cut(repr(value), MAX_VALUE_LENGTH)


def first_line(error: BaseException | str) -> str:
    """What an error of another library says, cut to one line for a message of ours, without a full stop.

    Of the operating system's errors the reason only, as the message names the file; where there is no text, the class.
    """
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def in_backticks(parameter: str) -> str:
    """How Python's users are told of a parameter; what is none, such as --steps, stays as it is."""
    return f"`{parameter}`" if re.match(r"[^\W\d]\w*([\[=].*)?$", parameter) else parameter


class _Name(str):
    """A part of a message that is a parameter's name."""


class Message(str):
    """A sentence that names parameters; as a string it names Python's, in backticks.

    Args:
        template: as for ``str.format``. A field without a value in ``values`` is the name of a parameter, or a
            parameter with the value that it should have (``{guidance_scale=1}``). Of a value ``!r`` shows the repr and
            ``!t`` its type's name; what is long is cut. Values that are messages themselves are told with it.
        parameter: what the field ``{parameter}`` names; a name of Python, or what is to be shown as it is (--steps).
        **values: of the other fields. They are not kept: a message holds text only.
    """

    _parts: Sequence[str]

    def __new__(cls, template: str, /, parameter: str | None = None, **values: Any) -> Message:
        return _joined(_parts(template, parameter, values))

    def told(self, name: Callable[[str], str]) -> str:
        """The sentence with other names: ``name`` is called with Python's name of each parameter."""
        return "".join(name(str(part)) if isinstance(part, _Name) else part for part in self._parts)

    def renamed(self, **names: str) -> Message:
        """The sentence with other parameters, by the names that they replace."""
        return _joined(_Name(names.get(part, part)) if isinstance(part, _Name) else part for part in self._parts)

    def __reduce__(self):
        return _joined, (self._parts,)


def named(parameter: str) -> Message:
    """A value for a field of a message that names another parameter, or a part of one, such as `prompt[1]`."""
    return Message("{parameter}", parameter)


def whole(text: str) -> Message:
    """A value for a field of a message that is shown at any length, such as a list of all that is wrong."""
    return _joined([text])


def _joined(parts) -> Message:
    parts = tuple(parts)
    said = "".join(in_backticks(part) if isinstance(part, _Name) else part for part in parts)
    message = str.__new__(Message, said)
    message._parts = parts
    return message


def _parts(template: str, parameter: str | None, values: dict) -> Iterator[str]:
    for text, field, form, conversion in string.Formatter().parse(template):
        yield text
        if field is None:
            continue
        if field not in values:
            yield _Name(parameter if field == "parameter" else field)
        elif isinstance(values[field], Message):
            yield from values[field]._parts
        elif conversion == "t":
            yield type(values[field]).__name__
        elif conversion == "r":
            yield shown(values[field])
        else:
            yield cut(format(values[field], form or ""), MAX_TEXT_LENGTH)


class _AboutInput(Exception):
    """What the two kinds of error share; with a ``parameter`` or ``values`` the text is a ``Message``'s template."""

    parameter: str | None
    message: Message

    def __init__(self, text: str, /, parameter: str | None = None, **values: Any):
        if isinstance(text, Message):
            message = text
        elif parameter is None and not values:
            message = _joined([text])
        else:
            message = Message(text, parameter, **values)
        self.parameter, self.message = parameter, message
        super().__init__(message)

    def renamed(self, **names: str):
        """The same error about other parameters, for who has handed on what has another name with them."""
        return type(self)(self.message.renamed(**names), self.parameter and names.get(self.parameter, self.parameter))

    def __reduce__(self):
        return type(self), (self.message, self.parameter), self.__dict__


class InputError(_AboutInput, ValueError):
    """A value that does not fit, found before any model runs.

    Args:
        text: the sentence: what was given, what was expected, what to do.
        parameter: Python's name of what was wrong, None where no single one was.
        **values: of the fields of a sentence that is a template.

    Attributes:
        parameter: as given.
        message: the sentence, which can be told in another interface's names.
    """


class InputTypeError(_AboutInput, TypeError):
    """A value of a type that does not fit, found before any model runs.

    Args:
        text: as for ``InputError``.
        parameter: as for ``InputError``.
        **values: as for ``InputError``.
    """
