"""What a client may set: shown with its defaults, and checked when it comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from custom_modules.errors import InputError
from custom_modules.settings import is_on


@dataclass(frozen=True)
class Option:
    """A setting of a config as a client sees it.

    Args:
        default: of the config; its type is the option's.
        low, high: what a number may be.
        choices: what a text may be, the default first.
    """

    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def shown(self) -> Any:
        """As MONAI Label's clients take it: a list is a choice, so that a list of numbers goes as text."""
        if self.choices:
            return list(self.choices)
        return json.dumps(self.default) if isinstance(self.default, list) else self.default

    def checked(self, name: str, value: Any) -> Any:
        """``value``, a text where the client has only texts, as the config wants it.

        Raises:
            InputError: for what it cannot be.
        """
        if isinstance(self.default, bool):
            return is_on(value)
        if self.choices:
            if value not in self.choices:
                raise InputError(f"{name} must be one of {', '.join(self.choices)}, got '{value}'")
            return value
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
            if isinstance(self.default, list):
                return [float(item) for item in parsed]
            number = type(self.default)(parsed)
            if isinstance(parsed, bool) or number != parsed:
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            wanted = "a list of numbers" if isinstance(self.default, list) else "a whole number"
            wanted = "a number" if isinstance(self.default, float) else wanted
            raise InputError(f"{name} must be {wanted}, got '{value}'") from error
        if not self.low <= number <= self.high:
            raise InputError(f"{name} must be in {self.low:g} to {self.high:g}, got {number}")
        return number


def chosen(options: Mapping[str, Option], request: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``options`` in a request, checked, defaults where it has none. Whatever else a client sends, such
    as the Slicer plugin's ``result_dtype``, is left alone.

    Raises:
        InputError: for a value that an option cannot have.
    """
    return {name: option.checked(name, request.get(name, option.default)) for name, option in options.items()}
