"""``python -m bundle ship CHECKPOINT``: use the result of a training as the weights of the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bundle.calibrate import calibrate, guard
from bundle.workflow import ROOT
from custom_modules.errors import InputError
from custom_modules.files import write_text
from custom_modules.networks.weights import read_weights, save_weights

LIMIT = 25 * 10**6  # bytes; the model zoo accepts no larger file


def ship(
    checkpoint: str | Sequence[str],
    output: str = str(ROOT / "models" / "model.pt"),
    dataset_dir: str | None = None,
    datalist: str | None = None,
    **settings: Any,
) -> None:
    """Make the result of a training the weights of the bundle, with the statistics that belong to them.

    Writes the weights in half precision to OUTPUT and their SHA-256 to OUTPUT.sha256 and, given the training data,
    ``calibration.json`` (validation split) and ``guard.json`` (training split) in the same folder.

    Args:
        checkpoint: weights of a training; of several, joined by commas, the mean (model soups, Wortsman et al. 2022).
        dataset_dir: folder that the datalist's paths are relative to.
        datalist: MONAI datalist; DATASET_DIR/datalist.json when None.
        settings: of configs/inference.yaml, such as --device, for calibration and guard.
    """
    state, trained_with = mean_weights(checkpoint.split(",") if isinstance(checkpoint, str) else checkpoint)
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


def mean_weights(checkpoints: Sequence[str]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the mean of the weights in several files, and what they were trained with.

    Raises:
        InputError: for files of different networks, or that were trained with other settings.
    """
    first, *others = files = [read_weights(path.strip()) for path in checkpoints]
    if air := [state["air"] for state, _ in files if "air" in state]:  # weights from before 0.15 lack it
        for state, _ in files:
            state.setdefault("air", air[0])
    for path, (state, trained_with) in zip(checkpoints[1:], others):
        if trained_with != first[1] or {k: v.shape for k, v in state.items()} != {
            k: v.shape for k, v in first[0].items()
        }:
            raise InputError(f"{path.strip()}: of another network or other settings than {checkpoints[0].strip()}")
    states = [state for state, _ in (first, *others)]
    mean = {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value) for key, value in first[0].items()
    }
    return mean, first[1]
