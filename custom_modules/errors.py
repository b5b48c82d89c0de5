"""Errors for users: one line that names the file or setting, what is wrong and what to do."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import NoReturn


class InputError(ValueError):
    """Input that cannot be used; the message is one line that names it and says what to do."""


def cause(error: BaseException) -> BaseException:
    """Return the innermost cause of ``error``, which MONAI's transforms wrap, or the first that is for users."""
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def one_line(error: BaseException, name: str) -> str:
    """Return the innermost cause of ``error`` as one line that names the file."""
    error = cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if name in text else f"{name}: {text}"


def stop(message: str) -> NoReturn:
    """End the program with ``message`` on stderr and a non-zero exit, without a traceback."""
    raise SystemExit(f"error: {message}")


def end_in_one_line_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the program with one line and the exit status 130 or 143, after files that are being
    written are finished or removed. Only the main thread can set this up; elsewhere this does nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the clean-up
    print(f"\nerror: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)
