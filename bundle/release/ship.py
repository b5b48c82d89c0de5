"""``python -m bundle ship CHECKPOINT``: use the result of a training as the weights of the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bundle.calibrate import calibrate, guard
from bundle.workflow import ROOT
from custom_modules.files import write_text
from custom_modules.networks.weights import read_weights, save_weights

LIMIT = 25 * 10**6  # bytes; the model zoo accepts no larger file


def ship(
    checkpoint: str,
    output: str = str(ROOT / "models" / "model.pt"),
    dataset_dir: str | None = None,
    datalist: str | None = None,
    **settings: Any,
) -> None:
    """Make the result of a training the weights of the bundle, with the statistics that belong to them.

    Writes the weights in half precision to OUTPUT and their SHA-256 to OUTPUT.sha256 and, given the training data,
    ``calibration.json`` (validation split) and ``guard.json`` (training split) in the same folder.

    Args:
        dataset_dir: folder that the datalist's paths are relative to.
        datalist: MONAI datalist; DATASET_DIR/datalist.json when None.
        settings: of configs/inference.yaml, such as --device, for calibration and guard.
    """
    state, trained_with = read_weights(checkpoint)
    digest = save_weights(state, output, trained_with=trained_with)
    size = Path(output).stat().st_size
    write_text(f"{digest}  {Path(output).name}\n", output + ".sha256")
    print(f"{output}: {size / 1e6:.1f} MB, SHA-256 {digest}")
    if size > LIMIT:
        print(f"warning: larger than the {LIMIT / 1e6:.0f} MB that the model zoo accepts")
    folder = Path(output).parent
    if dataset_dir is None:
        old = [name for name in ("calibration.json", "guard.json") if (folder / name).is_file()]
        if old:
            print(f"warning: {' and '.join(old)} in {folder} belong to other weights; ship with --dataset_dir")
        return
    calibrate(dataset_dir, datalist, path=str(folder / "calibration.json"), checkpoint=output, **settings)
    guard(dataset_dir, datalist, path=str(folder / "guard.json"), checkpoint=output, **settings)
