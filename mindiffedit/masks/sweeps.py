"""The values that an option is tried with, one after the other, as a user writes them."""

from __future__ import annotations

from collections.abc import Callable

from mindiffedit.errors import InputError, InputTypeError

MAX_SWEEP_VALUES = 12

__all__ = ["MAX_SWEEP_VALUES", "sweep_values"]


def sweep_values(text: str, name: str, check: Callable) -> list:
    """The values of an option to try one after the other, such as "0.3,0.5,0.7".

    Args:
        text: 1 to 12 different numbers with commas between them; numbers without a point or exponent are ints.
        name: of the option, for messages.
        check: called as check(value, name) for each; raises for what the option can't be, returns what it is.

    Raises:
        ValueError: An entry is missing, no number, there twice, or refused by `check`; there are too many.
    """
    advice = "give numbers with commas between, as 0.3,0.5,0.7."
    if not isinstance(text, str) or not text.strip():
        raise InputError("{parameter} to sweep over is {text!r}; {advice}", name, text=text, advice=advice)
    entries = [entry.strip() for entry in text.split(",")]
    if len(entries) > MAX_SWEEP_VALUES:
        raise InputError(
            "{parameter} has {count} values to sweep over; give at most {most}, every one is a run.",
            name,
            count=len(entries),
            most=MAX_SWEEP_VALUES,
        )
    values = []
    for entry in entries:
        number = _number(entry)
        if number is None:
            raise InputError(
                "{parameter} to sweep over has {what} in {text!r}; {advice}",
                name,
                what=repr(entry) if entry else "an empty place",
                text=text,
                advice=advice,
            )
        try:
            value = check(number, name)
        except InputTypeError as error:  # a fraction where a whole number is meant: the text's value, not a type
            raise InputError(error.message, error.parameter) from error
        if value in values:
            raise InputError(
                "{parameter} has {entry!r} twice in {text!r}; give each value once.", name, entry=entry, text=text
            )
        values.append(value)
    return values


def _number(entry: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(entry)
        except ValueError:
            pass
    return None
