"""Settings that a client of the label server may change: shown with their defaults, and checked in requests."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from custom_modules.errors import InputError
from custom_modules.settings import SETTINGS, Setting

# keys of MONAI Label's own requests
CLIENT_KEYS = frozenset(
    ("model", "image", "device", "label_tag", "result_extension", "result_dtype", "result_compress", "session_id")
)


class Options:
    """Settings of a config as MONAI Label's clients see them.

    Args:
        config: gives the defaults.
        names: of the settings, which :data:`~custom_modules.settings.SETTINGS` describes.
        others: settings that no config has, with their defaults.
    """

    def __init__(
        self, config: Mapping[str, Any], names: list[str], others: Mapping[str, tuple[Setting, Any]] | None = None
    ) -> None:
        self.settings = {name: SETTINGS[name] for name in names}
        self.defaults = {name: config[name] for name in names}
        for name, (setting, default) in (others or {}).items():
            self.settings[name], self.defaults[name] = setting, default

    def shown(self) -> dict[str, Any]:
        """Return the defaults. Clients read a list as choices, the default first, so a list of numbers becomes text."""
        values = {}
        for name, default in self.defaults.items():
            choices = self.settings[name].choices
            others = [choice for choice in choices if choice != default]
            values[name] = (
                [default, *others] if choices else json.dumps(default) if isinstance(default, list) else default
            )
        return values

    def chosen(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked values of a request, with defaults for missing ones. Other keys, such as ``result_dtype``
        of the Slicer plugin, are ignored unless they look like a misspelt setting.

        Raises:
            InputError: for a value that is not allowed, or a name that is close to that of a setting.
        """
        for name in request.keys() - self.settings.keys() - CLIENT_KEYS:
            close = difflib.get_close_matches(name, self.settings, n=1, cutoff=0.75)
            if close:
                raise InputError(f"no setting '{name}'; did you mean '{close[0]}'?")
        try:
            return {
                name: setting.parse(name, request.get(name, self.defaults[name]))
                for name, setting in self.settings.items()
            }
        except InputError as error:  # a client has no command line
            raise InputError(str(error).removeprefix("--")) from error
