"""Settings: their names, types and ranges."""

from __future__ import annotations


def is_on(value: bool | str) -> bool:
    """A switch as configs and command lines give it: ``--resume false`` arrives as a text."""
    return str(value).lower() in ("true", "1", "yes")
