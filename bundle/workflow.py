"""The inference workflow of ``configs/inference.yaml`` for other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[1]


def inference_workflow(**settings: Any) -> ConfigWorkflow:
    """``configs/inference.yaml`` with ``settings`` in place of its own, initialised and ready to ``run()``.

    Raises:
        KeyError: for a setting that the config does not have.
    """
    config = ROOT / "configs" / "inference.yaml"
    workflow = ConfigWorkflow(config_file=str(config), workflow_type="infer")
    for name, value in settings.items():
        if name not in workflow.parser:
            known = ", ".join(k for k in workflow.parser.get() if not isinstance(workflow.parser[k], (dict, list)))
            raise SystemExit(f"error: no setting '{name}' in {config.name}; some of them are {known}")
        workflow.parser[name] = value
    workflow.initialize()
    return workflow
