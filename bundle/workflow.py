"""The path of the repository, and the inference workflow for other commands."""

from __future__ import annotations

from pathlib import Path

from custom_modules import BUNDLE_ROOT
from custom_modules.inference.workflow import inference_workflow

__all__ = ["ROOT", "inference_workflow"]

ROOT = Path(BUNDLE_ROOT)
