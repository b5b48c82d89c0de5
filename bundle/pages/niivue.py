"""NiiVue, the viewer of volumes (https://niivue.com, BSD-2-Clause), from the Python package that has it.

``ipyniivue`` is a notebook widget whose script has NiiVue in it. Only that file is read: nothing of it is in this
repository, and no page loads anything from a network.
"""

from __future__ import annotations

import base64
import gzip
import logging
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, files

logger = logging.getLogger(__name__)

MISSING = "no interactive viewer: install it with pip install --no-deps -r requirements-viewer.txt"
NIIVUE = re.compile(r"Creating new Niivue instance\"\).{0,80}?new ([\w$]+)\(")  # where the widget makes its viewer
EXPORT = re.compile(r"export\s*\{[^}]*\};?\s*$")


@cache
def script() -> str | None:
    """Return NiiVue as a plain script that sets ``globalThis.Niivue``; None, with a warning, where there is none."""
    try:
        found = [path for path in files("ipyniivue") or [] if path.name == "widget.js"]
        text = found[0].read_text(encoding="utf-8")
    except (PackageNotFoundError, IndexError, OSError):
        logger.warning(MISSING)
        return None
    name = NIIVUE.search(text)
    if name is None or not EXPORT.search(text):
        logger.warning("%s (the installed ipyniivue is another version)", MISSING)
        return None
    return f"(() => {{{EXPORT.sub('', text)};globalThis.Niivue = {name[1]};}})();"


@cache
def packed_script() -> str | None:
    """Return :func:`script`, gzipped, as base64: less than half as long, and of no effect until it is unpacked."""
    text = script()
    return None if text is None else base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
