"""``python -m bundle synthesize MR``: a synthetic CT and a picture of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bundle.montage import montage
from bundle.workflow import inference_workflow
from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import EXTENSIONS, read_volume
from custom_modules.errors import InputError
from custom_modules.memory import peak_memory_gib


def synthesize(mr: str, output_dir: str = "eval", **settings: Any) -> None:
    """Synthesise the CT of an MR, or of each MR in a folder, and write a picture of both.

    Args:
        mr: a volume, a folder of volumes and DICOM series, a list of paths, or a datalist.
        output_dir: a folder, or for a single MR the file to write.
        settings: of configs/inference.yaml, such as --num_inference_steps, --seed, --sampling or --device.
    """
    volumes = find_volumes(str(mr), series=settings.get("series"), pattern=settings.get("pattern"))
    folder = Path(str(output_dir))
    if str(output_dir).lower().endswith(EXTENSIONS):
        if len(volumes) > 1:
            raise InputError(f"{mr}: holds {len(volumes)} volumes; --output_dir must then be a folder")
        volumes[0]["output"], folder = folder.name, folder.parent
    started = time.perf_counter()
    own: dict[str, Any] = {"output_dir": str(folder), "dataset#data": volumes}
    workflow = inference_workflow(keep_network=True, **own, **settings)
    failed: SystemExit | None = None
    try:
        workflow.run()
    except SystemExit as error:  # some volumes failed: show the others first
        failed = error
    seconds = time.perf_counter() - started
    for volume in volumes:
        target = folder / volume["output"]
        if target.exists() and target.stat().st_mtime >= time.time() - seconds - 1:
            print(f"synthetic CT  {target}\npicture       {picture(volume['image'], target)}")
    print(f"time          {seconds:.1f} s\npeak memory   {peak_memory_gib('cpu'):.2f} GiB")
    if failed:
        raise failed


def picture(mr: str | Path, sct: str | Path, ct: np.ndarray | None = None, path: Path | None = None) -> Path:
    """Draw MR and synthetic CT, and with a CT also the CT and the error.

    Args:
        path: of the PNG; that of ``sct`` with the extension .png when None.
    """
    image, pred = read_volume(mr), read_volume(sct)
    columns = {"MR": (np.asarray(image[0]), "MR"), "synthetic CT": (np.asarray(pred[0]), "HU")}
    if ct is not None:
        columns["CT"] = (ct, "HU")
        columns["synthetic CT - CT"] = (np.asarray(pred[0]) - ct, "error")
    sct = Path(sct)
    extension = next(e for e in EXTENSIONS if sct.name.lower().endswith(e))
    path = path or sct.with_name(sct.name[: -len(extension)] + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return montage(columns, np.asarray(image.affine), path, title=sct.name)
