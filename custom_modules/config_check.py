"""The check of the running config, as the first of its expressions, and its settings for records."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from custom_modules import BUNDLE_ROOT
from custom_modules.errors import InputError, end_in_one_line_on_signals, stop
from custom_modules.settings import SETTINGS, suggestion

if TYPE_CHECKING:
    from monai.bundle import ConfigParser


def current_parser() -> ConfigParser:
    """Return the parser of the config whose expression is being evaluated.

    MONAI passes only the values that an expression refers to; the parser, which has every setting, is further up the
    call stack.

    Raises:
        RuntimeError: outside of a config.
    """
    from monai.bundle import ConfigParser

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("settings are read by an expression of a config")


def result_settings() -> dict[str, Any]:
    """Return the value of every setting of the running config that changes the synthetic CT."""
    parser = current_parser()
    return {
        name: parser.get_parsed_content(name) for name in SETTINGS if SETTINGS[name].changes_result and name in parser
    }


def plain_settings() -> dict[str, Any]:
    """Return every top-level value of the running config that is a number, a text, null or a list of these; expressions
    only if they have been evaluated already."""
    parser = current_parser()
    resolved = parser.ref_resolver.resolved_content
    values = {name: resolved.get(name, value) for name, value in parser.get().items()}
    return {
        name: value
        for name, value in values.items()
        if name not in STRUCTURE and _is_plain(value) and not _is_expression(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def check() -> None:
    """Check the settings of the running config, as the first of all its expressions: types and ranges by
    :data:`SETTINGS`, unknown names, and settings on the command line that this config does not use. Values are
    converted to their type, so that ``--strict false`` is false. Ends the program with one line for what is not
    allowed."""
    parser = current_parser()
    if is_monai_bundle(sys.argv):
        end_in_one_line_on_signals()
    try:
        converted = check_settings(parser, given_on_command_line(sys.argv))
    except InputError as error:
        stop(str(error))
    if is_monai_bundle(sys.argv):
        set_up_messages(parser)
    if converted:  # what was made from the values before would be made again
        parser.parse(True)


def set_up_messages(parser: ConfigParser) -> None:
    """Set up logging by the settings ``quiet`` and ``verbose``."""
    from custom_modules import messages

    messages.set_up(parser.get("quiet", False), parser.get("verbose", False))


def check_settings(parser: ConfigParser, given: Sequence[str] = ()) -> bool:
    """Check the settings of ``parser`` as :func:`check` does; ``given`` are those that the user set.

    Returns:
        Whether a value was converted, so that the config has to be parsed again.

    Raises:
        InputError: for a setting or a value that is not allowed.
    """
    content, converted = parser.get(), False
    used = used_ids(content)
    for name in given:
        if name not in content or (name not in used and name not in STRUCTURE):
            raise InputError(f"no setting '{name}' in this config{suggestion(name, used & set(SETTINGS))}")
    for name, value in content.items():
        if name in SETTINGS and not _is_literal(value):
            continue  # an expression, which is evaluated later
        if name in SETTINGS:
            parsed = SETTINGS[name].parse(name, value)
            if parsed != value:
                content[name], converted = parsed, True
        elif name not in used and name not in STRUCTURE and name not in config_ids():
            raise InputError(f"no setting '{name}'{suggestion(name, SETTINGS)}")
    return converted


STRUCTURE = frozenset(
    ["imports", "initialize", "run", "finalize", "_meta_", "train", "validate", "evaluator", "handlers", "key_metric"]
)


def _is_literal(value: Any) -> bool:
    """Whether a value, and each item of a list, is given as it is."""
    if isinstance(value, (list, tuple)):
        return all(_is_literal(item) for item in value)
    return _is_plain(value) and not _is_expression(value)


def used_ids(content: Mapping[str, Any]) -> set[str]:
    """Return the top-level ids of a config that have an effect: those that it refers to, and the two that
    :func:`check` reads."""
    return {*references(content), "quiet", "verbose"}


def references(node: Any) -> Iterator[str]:
    """Yield the top-level ids that a config refers to."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from references(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from references(value)
    elif _is_expression(node):
        yield from re.findall(r"@(\w+)", node)


def config_ids() -> set[str]:
    """Return the top-level ids of all configs of the bundle."""
    from monai.bundle import ConfigParser

    found: set[str] = set()
    for path in Path(BUNDLE_ROOT, "configs").rglob("*.yaml"):
        found |= {key.lstrip("+").split("#")[0].split("::")[0] for key in ConfigParser.load_config_file(str(path))}
    return found


def is_monai_bundle(arguments: Sequence[str]) -> bool:
    """Whether the program is ``python -m monai.bundle``."""
    return Path(arguments[0]).as_posix().endswith("monai/bundle/__main__.py")


def given_on_command_line(arguments: Sequence[str]) -> list[str]:
    """Return the names of the settings in a command line of ``python -m monai.bundle run``; none for other programs."""
    if not is_monai_bundle(arguments):
        return []
    names = [argument[2:].split("=")[0] for argument in arguments[1:] if argument.startswith("--")]
    return [re.split("#|::", name)[0] for name in names if name not in MONAI_ARGUMENTS]


MONAI_ARGUMENTS = frozenset(
    [
        "run_id",
        "init_id",
        "final_id",
        "meta_file",
        "config_file",
        "logging_file",
        "tracking",
        "args_file",
        "workflow_name",
        "workflow_type",
        "properties_path",
    ]
)
