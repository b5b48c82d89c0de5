"""``python -m bundle evaluate``: scores of a split of a datalist, together with trivial baselines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bundle.synthesis import picture
from custom_modules.errors import one_line
from custom_modules.evaluation.split import Evaluation
from custom_modules.files import inside, writable_or_stop

logger = logging.getLogger(__name__)


def evaluate(
    dataset_dir: str,
    datalist: str | None = None,
    split: str = "test",
    output_dir: str = "eval",
    pred_dir: str | None = None,
    labels: str | None = None,
    pictures: bool = True,
    config: str | None = None,
    **settings: Any,
) -> None:
    """Synthesise the MRs of ``split`` and score them on their own grid against the CTs (``label``).

    Prints one row per patient and the means, and writes ``OUTPUT_DIR/metrics.csv``, ``metrics.json`` and one picture
    per patient; see :class:`~custom_modules.evaluation.split.Evaluation`.

    Args:
        dataset_dir: folder that the datalist's paths are relative to.
        datalist: MONAI datalist; ``DATASET_DIR/datalist.json`` when None.
        pred_dir: folder of finished synthetic CTs, named ``<patient>_sct.nii.gz``; synthesised when None.
        labels: folder of organ labels, ``<patient>_ct`` and ``<patient>_sct``.
        config: overlay on configs/inference.yaml for other networks, such as configs/baselines/unet.yaml; its name is
            that of the system in the rows.
        settings: of configs/inference.yaml.
    """
    writable_or_stop(output_dir)
    evaluation = Evaluation(
        str(dataset_dir), datalist, split, str(output_dir), pred_dir, labels, config,
        name=Path(config).stem if config else "3D-WLDM", settings=settings,
    )  # fmt: skip
    try:
        evaluation.run()
    finally:  # of patients that were scored, even if others were not
        if pictures:
            for pair in evaluation.pairs:
                _picture(pair, Path(pred_dir or output_dir), Path(output_dir))


def _picture(pair: dict[str, str], pred_dir: Path, output_dir: Path) -> None:
    """Write the picture of a patient; one that fails is logged and does not stop the others."""
    name = f"{pair['patient']}_sct.nii.gz"
    try:
        target = inside(output_dir, f"{pair['patient']}_sct.png")
        picture(pair["image"], inside(pred_dir, name), pair["label"], target)
    except (ValueError, OSError) as error:  # missing or on another grid, which the scores report too; or not writable
        logger.warning("%s: no picture (%s)", pair["patient"], one_line(error, name))
