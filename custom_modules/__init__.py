"""3D-WLDM: the networks, data, inference, training and evaluation used by the bundle's configs."""

from __future__ import annotations

import json
from pathlib import Path

BUNDLE_ROOT = str(Path(__file__).resolve().parents[1])


def bundle_version() -> str:
    """Return the version in ``configs/metadata.json``."""
    return json.loads(Path(BUNDLE_ROOT, "configs", "metadata.json").read_text(encoding="utf-8"))["version"]
