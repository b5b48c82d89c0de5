"""The inference workflow of ``configs/inference.yaml`` for other commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from custom_modules.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def inference_workflow(
    config: str | Sequence[str] = (), logging_file: str | bool | None = None, **settings: Any
) -> ConfigWorkflow:
    """``configs/inference.yaml`` with ``settings`` in place of its own, initialised and ready to ``run()``.

    Args:
        config: overlays, such as ``configs/baselines/unet.yaml``, for the network of another config.
        logging_file: False leaves the program's logging as it is; the bundle's logging.conf when None.

    Raises:
        InputError: for an overlay that is not there.
        SystemExit: for a setting that the config does not have.
    """
    overlays = [config] if isinstance(config, str) else list(config)
    for overlay in overlays:
        if not Path(overlay).is_file():
            raise InputError(f"{overlay}: no such config")
    files = [str(ROOT / "configs" / "inference.yaml"), *overlays]
    workflow = ConfigWorkflow(config_file=files, workflow_type="infer", logging_file=logging_file)
    for name, value in settings.items():
        if name not in workflow.parser:
            known = ", ".join(k for k in workflow.parser.get() if not isinstance(workflow.parser[k], (dict, list)))
            raise SystemExit(f"error: no setting '{name}' in inference.yaml; some of them are {known}")
        workflow.parser[name] = value
    workflow.initialize()
    return workflow
