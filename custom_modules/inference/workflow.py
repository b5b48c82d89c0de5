"""``configs/inference.yaml`` as a workflow, through which evaluation and all commands synthesise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from custom_modules import BUNDLE_ROOT
from custom_modules.config_check import check_settings
from custom_modules.errors import InputError

# MONAI warns that it does not configure logging, as requested
logging.getLogger("monai.bundle.workflows").addFilter(lambda record: "skipping logging" not in str(record.msg))


def inference_workflow(
    config: str | Path | Sequence[str | Path] = (), logging_file: str | bool | None = False, **settings: Any
) -> ConfigWorkflow:
    """Return the workflow of ``configs/inference.yaml`` with ``settings`` changed, initialised and ready to ``run()``.

    Args:
        config: overlays, such as ``configs/baselines/unet.yaml``, for another network.
        logging_file: a logging configuration; False keeps that of the program.
        settings: of the config by id, such as ``seed`` or ``dataset#data``.

    Raises:
        InputError: for an overlay that does not exist, or a setting or value that the config does not allow.
    """
    overlays = [config] if isinstance(config, (str, Path)) else list(config)
    for overlay in overlays:
        if not Path(overlay).is_file():
            raise InputError(f"{overlay}: no such config")
    files = [str(Path(BUNDLE_ROOT, "configs", "inference.yaml")), *map(str, overlays)]
    workflow = ConfigWorkflow(config_file=files, workflow_type="infer", logging_file=logging_file)
    workflow.parser.update(settings)
    check_settings(workflow.parser, [name.split("#")[0] for name in settings])
    workflow.initialize()
    return workflow
