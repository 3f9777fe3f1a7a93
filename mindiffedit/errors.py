"""Errors about what a user gave, worded for the interface that it was given by.

A sentence names parameters. Python names them one way (`num_inference_steps`), the command line another (--steps), and
which of the two is meant is known only where the sentence is shown.
"""

from __future__ import annotations

import string
from typing import Any, Callable, Optional

LONGEST_VALUE = 100  # characters of a value's repr in a message

__all__ = ["InputError", "InputTypeError", "Message", "shown"]


def shown(value: Any) -> str:
    """A value's repr for a message; a long one is cut, with its length."""
    text = repr(value)
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[:LONGEST_VALUE].rstrip()}... ({len(text)} characters)"


def in_backticks(parameter: str) -> str:
    """How Python's users are told of a parameter."""
    return f"`{parameter}`" if parameter.isidentifier() else parameter


class Message(str):
    """A sentence that names parameters; as a string it names Python's, in backticks.

    Args:
        template: as for ``str.format``. A field without a value in ``values`` is the name of a parameter. Values that
            are shown by ``!r`` are cut where they are long.
        parameter: what the field ``{parameter}`` names.
        **values: of the other fields.
    """

    def __new__(cls, template: str, parameter: Optional[str] = None, **values: Any) -> "Message":
        message = super().__new__(cls, _Filled(parameter, values, in_backticks).format(template))
        message._said = (template, parameter, values)
        return message

    def told(self, name: Callable[[str], str]) -> str:
        """The sentence with other names: ``name`` is called with Python's name of each parameter."""
        template, parameter, values = self._said
        return _Filled(parameter, values, name).format(template)

    def __getnewargs_ex__(self):  # pickled with what it is made of, so that a copy can be told again
        template, parameter, values = self._said
        return (template, parameter), values


class _Filled(string.Formatter):
    def __init__(self, parameter: Optional[str], values: dict, name: Callable[[str], str]):
        self._parameter, self._values, self._name = parameter, values, name

    def get_value(self, key, args, kwargs):
        if key in self._values:
            return self._values[key]
        return self._name(self._parameter if key == "parameter" else key)

    def convert_field(self, value, conversion):
        return shown(value) if conversion == "r" else super().convert_field(value, conversion)


class _AboutInput:
    """What the two kinds of error share.

    Args:
        text: the sentence: what was given, what was expected, what to do. With a ``parameter`` or ``values`` it is the
            template of a ``Message``, so a literal; without both it is taken as it is.
        parameter: Python's name of what was wrong, None where no single one was.
        **values: of the template's fields.

    Attributes:
        parameter: as given.
        message: the sentence, which can be told in another interface's names.
    """

    def __init__(self, text: str, parameter: Optional[str] = None, **values: Any):
        plain = parameter is None and not values and not isinstance(text, Message)
        if plain:
            text = Message("{text}", text=text)
        elif not isinstance(text, Message):
            text = Message(text, parameter, **values)
        self.parameter, self.message = parameter, text
        super().__init__(text)

    def __reduce__(self):
        return type(self), (self.message, self.parameter), self.__dict__


class InputError(_AboutInput, ValueError):
    """A value that does not fit, found before any model runs."""


class InputTypeError(_AboutInput, TypeError):
    """A value of a type that does not fit, found before any model runs."""
