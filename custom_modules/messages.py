"""Logging of a program: its own lines and all warnings, without the start-up notes of libraries."""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

LIBRARIES = ("ignite", "monai", "nibabel", "pydicom", "matplotlib", "torch", "fsspec")
FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
WARNING_FORMAT = logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%H:%M:%S")


class _AboveTheBar(logging.Handler):
    """Writes each line above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        formatter = WARNING_FORMAT if record.levelno >= logging.WARNING else FORMAT
        tqdm.write(formatter.format(record), file=sys.stdout)


def set_up(quiet: bool = False, verbose: bool = False) -> None:
    """Set up the logging of a program: by default its own lines and all warnings, with ``quiet`` only warnings and
    errors, with ``verbose`` also the lines of MONAI and Ignite."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_AboveTheBar())
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.setLevel(logging.NOTSET if verbose else logging.WARNING)
        for handler in list(library.handlers):
            library.removeHandler(handler)
    if not verbose:
        warnings.simplefilter("ignore")
