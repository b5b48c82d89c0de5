"""``configs/inference.yaml`` as a workflow, through which evaluation, all commands and Python programs synthesise."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from custom_modules import BUNDLE_ROOT
from custom_modules.config_check import check_settings, references
from custom_modules.errors import InputError

# MONAI warns that it does not configure logging, as requested
logging.getLogger("monai.bundle.workflows").addFilter(lambda record: "skipping logging" not in str(record.msg))


def inference_workflow(
    config: str | Path | Sequence[str | Path] = (),
    logging_file: str | bool | None = False,
    keep_network: bool = False,
    **settings: Any,
) -> ConfigWorkflow:
    """Return the workflow of ``configs/inference.yaml`` with ``settings`` changed, initialised and ready to ``run()``.

    Args:
        config: overlays, such as ``configs/baselines/unet.yaml``, for another network.
        logging_file: a logging configuration; False keeps that of the program.
        keep_network: load the network now, or take that of the last call if it was made of the same settings and
            weights: a server or a notebook loads it once.
        settings: of the config by id, such as ``seed`` or ``dataset#data``.

    Raises:
        InputError: for an overlay that does not exist, or a setting or value that the config does not allow; with
            ``keep_network`` also for weights that cannot be used.
    """
    overlays = [config] if isinstance(config, (str, Path)) else list(config)
    for overlay in overlays:
        if not Path(overlay).is_file():
            raise InputError(f"{overlay}: no such config")
    files = [str(Path(BUNDLE_ROOT, "configs", "inference.yaml")), *map(str, overlays)]
    workflow = ConfigWorkflow(config_file=files, workflow_type="infer", logging_file=logging_file)
    workflow.parser.update(settings)
    check_settings(workflow.parser, [name.split("#")[0] for name in settings])
    recipe = _recipe(workflow.parser) if keep_network else ""
    if recipe in _kept:
        workflow.parser["network"] = _kept[recipe]
    workflow.initialize()
    if keep_network and recipe not in _kept:
        _kept.clear()  # before the next one takes memory
        try:
            _kept[recipe] = workflow.parser.get_parsed_content("network")
        except SystemExit as error:  # weights that cannot be used end a program with one line
            raise InputError(str(error).removeprefix("error: ")) from error
    return workflow


_kept: dict[str, nn.Module] = {}  # the last network by what it was made of


def _recipe(parser: ConfigParser) -> str:
    """Everything that the network of a config is made of: what it refers to, and the state of the weights' file."""
    content, names, left = parser.get(), set(), {"network"}
    while left:
        names.add(name := left.pop())
        left |= {other for other in references(content[name]) if other in content} - names
    weights = Path(parser.get_parsed_content("checkpoint"))
    state = weights.stat() if weights.is_file() else None
    stamp = state and (str(weights.resolve()), state.st_mtime_ns, state.st_size, state.st_ino)
    return json.dumps([stamp, {name: content[name] for name in sorted(names)}], default=repr)
