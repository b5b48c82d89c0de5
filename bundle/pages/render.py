"""Pages from templates: everything that is not marked safe is escaped, and a page is one file that loads nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bundle.pages.niivue import packed_script


@cache
def environment() -> Environment:
    folder = Path(__file__).with_name("templates")
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["niivue"] = packed_script
    return made


def render(template: str, **values: Any) -> str:
    """Return the page of a template in the folder ``templates``."""
    return environment().get_template(template).render(**values)


def anchor(name: str) -> str:
    """Return an id for the section of a patient; different names have different ones."""
    return "p-" + "".join(c if c.isalnum() or c == "-" else f"_{ord(c):x}_" for c in name)
