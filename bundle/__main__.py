"""``python -m bundle COMMAND``: one function a command, arguments by fire."""

from __future__ import annotations

import sys

import fire

from bundle.calibrate import calibrate, guard
from bundle.compare.command import compare
from bundle.demo import demo
from bundle.evaluate import evaluate
from bundle.phantom.command import phantom
from bundle.prepare.command import prepare
from bundle.release.export import export
from bundle.release.package import package
from bundle.release.ship import ship
from bundle.report import report
from bundle.synthesize import synthesize
from custom_modules.errors import InputError

COMMANDS = [
    synthesize, evaluate, compare, report, calibrate, guard, prepare, phantom, demo, ship, export, package,
]  # fmt: skip


def main() -> None:
    try:
        fire.Fire({command.__name__: command for command in COMMANDS}, name="python -m bundle")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
