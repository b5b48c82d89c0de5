"""Errors for people: one line that names the file, what is wrong and what to do."""

from __future__ import annotations

from typing import NoReturn


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says what to do."""


def one_line(error: BaseException, name: str) -> str:
    """The innermost cause of ``error`` as one line that names the file."""
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if name in text else f"{name}: {text}"


def stop(message: str) -> NoReturn:
    """End the program with ``message`` on stderr and a non-zero exit, without a traceback."""
    raise SystemExit(f"error: {message}")
