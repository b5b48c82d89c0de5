"""``python -m bundle COMMAND``: one function a command, arguments by fire."""

from __future__ import annotations

import sys

import fire

from bundle.demo import demo
from bundle.evaluate import evaluate
from bundle.ship import ship
from bundle.synthesize import synthesize
from custom_modules.volumes import InputError


def main() -> None:
    try:
        fire.Fire({"synthesize": synthesize, "evaluate": evaluate, "demo": demo, "ship": ship}, name="python -m bundle")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
