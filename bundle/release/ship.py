"""``python -m bundle ship CHECKPOINT``: a training's result as the bundle's weights."""

from __future__ import annotations

from pathlib import Path

from bundle.workflow import ROOT
from custom_modules.files import write_text
from custom_modules.networks.weights import read_weights, save_weights

LIMIT = 25 * 10**6  # bytes; the model zoo takes no larger file


def ship(checkpoint: str, output: str = str(ROOT / "models" / "model.pt")) -> None:
    """Write ``checkpoint`` in half precision to ``output`` and its SHA-256 to ``output``.sha256."""
    state, trained_with = read_weights(checkpoint)
    digest = save_weights(state, output, trained_with=trained_with)
    size = Path(output).stat().st_size
    write_text(f"{digest}  {Path(output).name}\n", output + ".sha256")
    print(f"{output}: {size / 1e6:.1f} MB, SHA-256 {digest}")
    if size > LIMIT:
        print(f"warning: larger than the {LIMIT / 1e6:.0f} MB that the model zoo takes")
