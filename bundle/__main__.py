"""``wldm COMMAND``, the same as ``python -m bundle COMMAND``: one function per command, arguments parsed by fire.

Commands are imported when they run, and help is read from their source, so that it need not import PyTorch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from custom_modules import BUNDLE_ROOT, bundle_version
from custom_modules.errors import InputError, end_in_one_line_on_signals
from custom_modules.settings import FALSE, SETTINGS, number, parse_bool

# command: its module, and the config whose settings it accepts too
COMMANDS = {
    "synthesize": ("bundle.synthesis", "inference"),
    "evaluate": ("bundle.evaluate", "inference"),
    "report": ("bundle.report.command", None),
    "demo": ("bundle.demo", "inference"),
    "prepare": ("bundle.prepare.command", None),
    "phantom": ("bundle.phantom.command", None),
    "simulate": ("bundle.simulate", None),
    "pack": ("bundle.pack", None),
    "train": ("bundle.train", "train"),
    "compare": ("bundle.compare.command", "train"),
    "calibrate": ("bundle.calibrate", "inference"),
    "guard": ("bundle.calibrate", "inference"),
    "ship": ("bundle.release.ship", "inference"),
    "export-dicom": ("bundle.clinical.export_dicom", None),
    "attenuation": ("bundle.clinical.maps", None),
    "density": ("bundle.clinical.maps", None),
    "organs": ("bundle.clinical.organs", None),
    "pet": ("bundle.clinical.pet", None),
    "dose": ("bundle.clinical.dose", None),
    "export": ("bundle.release.export", "inference"),
    "package": ("bundle.release.package", None),
}
HELP = ("--help", "-h", "help")
KINDS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (parse_bool, "true or false"),
    int: (functools.partial(number, whole=True), "a whole number"),
    float: (functools.partial(number, whole=False), "a number"),
}


def main() -> None:
    """Run the command in ``sys.argv``. An error ends it with one line and exit status 1, a wrong command line with
    2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(overview())
    elif arguments[0] == "--version":
        print(f"wldm {bundle_version()}")
    elif arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        advice = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(COMMANDS)}"
        _exit(f"no command '{arguments[0]}'; {advice}", 2)
    elif any(argument in HELP[:2] for argument in arguments[1:]):
        print(command_help(arguments[0]))
    else:
        run(arguments[0], arguments[1:])


def _exit(message: str, status: int) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def run(name: str, arguments: list[str]) -> None:
    """Import the command ``name`` and run it."""
    import fire

    from custom_modules import messages

    end_in_one_line_on_signals()
    check_flags(name, arguments)
    quiet, verbose = (_given(arguments, flag) for flag in ("--quiet", "--verbose"))
    messages.set_up(quiet, verbose)
    function = getattr(importlib.import_module(COMMANDS[name][0]), name.replace("-", "_"))
    try:
        fire.Fire(typed(function), command=arguments, name=f"wldm {name}")
    except InputError as error:
        _exit(str(error), 1)


def _given(arguments: list[str], flag: str) -> bool:
    """Whether a command line sets ``flag``: ``--quiet``, ``--quiet true``, ``--quiet=yes``."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, value = argument.partition("=")
        if name == flag:
            return (value or following).lower() not in FALSE
    return False


def check_flags(name: str, arguments: list[str]) -> None:
    """Exit with one line for an option that the command ``name`` does not have."""
    function = source(name)
    options = [argument.arg for argument in function.args.args]
    allowed = options + (list(SETTINGS) if COMMANDS[name][1] else [])
    for argument in arguments:
        flag = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if not argument.startswith("--") or not flag or flag.removeprefix("no") in options:
            continue
        if flag not in options and not (function.args.kwarg and (flag in allowed or "#" in flag or "::" in flag)):
            if function.args.kwarg and not COMMANDS[name][1]:
                continue  # the command checks its settings itself
            close = difflib.get_close_matches(flag, allowed, n=1)
            advice = f"did you mean --{close[0]}?" if close else f"wldm {name} --help lists them"
            _exit(f"{name} has no option --{flag}; {advice}", 2)


def typed(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``function`` so that values from a command line are converted to the types of its parameters.

    Raises:
        InputError: for a value of another type.
    """
    hints = typing.get_type_hints(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(function).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            for kind in typing.get_args(hints.get(name)) or (hints.get(name),):
                if kind in KINDS and value is not None:
                    convert, wanted = KINDS[kind]
                    try:
                        bound.arguments[name] = convert(value)
                    except (TypeError, ValueError, OverflowError):
                        raise InputError(f"--{name} {value}: must be {wanted}") from None
        function(*bound.args, **bound.kwargs)

    return wrapper


# help


def source(name: str) -> ast.FunctionDef:
    """Return the syntax tree of the function of the command ``name``."""
    path = Path(BUNDLE_ROOT, *COMMANDS[name][0].split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"))


def overview() -> str:
    """Return the help on all commands, one line per command."""
    lines = [
        f"wldm {bundle_version()}: synthetic CT from MR, and training on your own pairs",
        "",
        "usage: wldm COMMAND ...",
        "",
    ]
    for name in COMMANDS:
        doc = ast.get_docstring(source(name)) or ""
        first = " ".join(doc.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
        lines.append(textwrap.fill(f"  {name:<14}{first}", 110, subsequent_indent=" " * 16))
    return "\n".join([*lines, "", "wldm COMMAND --help lists the options of a command; --version prints the version"])


def command_help(name: str) -> str:
    """Return the help on the command ``name``: its options with their defaults, and the settings of its config."""
    function, config = source(name), COMMANDS[name][1]
    arguments, defaults = function.args.args, function.args.defaults
    required = [argument.arg for argument in arguments[: len(arguments) - len(defaults)]]
    usage = " ".join(["usage: wldm", name, *(argument.upper() for argument in required), "[--option value ...]"])
    lines = [usage, "", ast.get_docstring(function) or "", "", "options:"]
    for argument, default in zip(arguments[len(required) :], defaults, strict=True):
        lines.append(f"  --{argument.arg:<22} default {_default(default)}")
    if config:
        lines += ["", f"settings of configs/{config}.yaml:", *settings_help(config, [a.arg for a in arguments])]
    return "\n".join(lines)


def _default(node: ast.expr) -> str:
    text = ast.unparse(node)
    return (
        text.removeprefix("str(ROOT / ").removesuffix(")").replace("' / '", "/").strip("'") if "ROOT" in text else text
    )


def settings_help(config: str, taken: list[str]) -> list[str]:
    """Return the help on the settings of a config except those ``taken`` by the command: description, allowed values
    and default."""
    import yaml

    content = yaml.safe_load(Path(BUNDLE_ROOT, "configs", f"{config}.yaml").read_text(encoding="utf-8"))
    lines = []
    for name, setting in SETTINGS.items():
        if name in content and name not in taken and name != "dataset_dir":
            default = content[name]
            text = "" if isinstance(default, str) and default.startswith("$") else f" Default {_yaml(default)}."
            lines.append(
                textwrap.fill(
                    f"{setting.help} ({setting.allowed}).{text}",
                    110,
                    initial_indent=f"  --{name:<22} ",
                    subsequent_indent=" " * 27,
                )  # fmt: skip
            )
    return lines


def settings_page() -> str:
    """``docs/settings.md``: every setting by config, from the same table as the check and the help."""
    import yaml

    lines = [
        "# Settings",
        "",
        "Given as `--name value` to the configs below and to the commands that run them; checked before",
        "anything is read. Generated by `python tests/test_docs.py`.",
        "",
    ]
    seen: set[str] = set()
    for config in ("inference", "train", "train_autoencoder", "finetune", "whole_body", "equal_time", "evaluate"):
        content = yaml.safe_load(Path(BUNDLE_ROOT, "configs", f"{config}.yaml").read_text(encoding="utf-8"))
        names = [name for name in SETTINGS if name in content and name not in seen]
        seen |= set(names)
        lines += [f"## {config}.yaml", "", "| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
        for name in names:
            default, setting = content[name], SETTINGS[name]
            text = "see the config" if isinstance(default, str) and default.startswith("$") else f"`{_yaml(default)}`"
            lines.append(f"| `{name}` | {text} | {setting.allowed} | {setting.help} |")
        lines.append("")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """Format ``value`` as in YAML and on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
