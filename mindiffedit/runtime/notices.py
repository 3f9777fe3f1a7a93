"""Warnings that a process gives once."""

from __future__ import annotations

import logging

__all__ = ["say_once"]

logger = logging.getLogger(__name__)

_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning the first time in this process, silence afterwards; logged with the caller's file and line.

    One that names parameters is an ``errors.Message``, so that the command line can tell it in its own names.
    """
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message, stacklevel=2)
