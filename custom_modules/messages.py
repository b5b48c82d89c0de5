"""What a program says while it runs: its own lines and warnings, without the start-up notes of the libraries below."""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

LIBRARIES = ("ignite", "monai", "nibabel", "pydicom", "matplotlib", "torch", "fsspec")
FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
WARNING_FORMAT = logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%H:%M:%S")


class _AboveTheBar(logging.Handler):
    """Writes each line above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        formatter = WARNING_FORMAT if record.levelno >= logging.WARNING else FORMAT
        tqdm.write(formatter.format(record), file=sys.stdout)


def set_up(quiet: bool = False, verbose: bool = False) -> None:
    """Set the logging of a program: its own lines and everybody's warnings by default, with ``quiet`` only warnings and
    errors, with ``verbose`` the lines of MONAI and Ignite too."""
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
