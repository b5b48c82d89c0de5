"""``python -m bundle synthesize MR``: a synthetic CT and a picture of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bundle.clinical.further import Further
from bundle.montage import montage
from bundle.workflow import inference_workflow
from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import EXTENSIONS, read_volume, sibling_path
from custom_modules.errors import InputError
from custom_modules.memory import peak_memory_gib


def synthesize(
    mr: str, output_dir: str = "eval", structures: str | None = None, attenuation: int | None = None,
    density: str | None = None, pet: str | None = None, dose: str | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Synthesise the CT of an MR, or of each MR in a folder, and write a picture of both.

    Args:
        mr: a volume, a folder of volumes and DICOM series, a list of paths, or a datalist.
        output_dir: a folder, or for a single MR the file to write.
        structures: EXTERNAL, BONE, LUNG, AIR, separated by commas: a DICOM structure set too, see wldm export-dicom.
        attenuation: tube voltage in kVp, such as 120: the attenuation at 511 keV too, see wldm attenuation.
        density: electron, mass or both: densities too, see wldm density.
        pet, dose: the CT of a single MR: the error in a PET or in dose too, see wldm pet and wldm dose.
        settings: of configs/inference.yaml, such as --num_inference_steps, --seed, --sampling or --device.
    """
    choice = {name: settings[name] for name in ("series", "pattern", "output_format") if name in settings}
    volumes = find_volumes(str(mr), **choice)
    names = structures if structures is None or isinstance(structures, str) else ",".join(structures)  # fire's tuple
    further = Further(names, attenuation, density, pet, dose)
    further.check(len(volumes))
    folder = Path(str(output_dir))
    if str(output_dir).lower().endswith(EXTENSIONS):
        if len(volumes) > 1:
            raise InputError(f"{mr}: holds {len(volumes)} volumes; --output_dir must then be a folder")
        volumes[0]["output"], folder = folder.name, folder.parent
    started = time.perf_counter()
    own: dict[str, Any] = {"output_dir": str(folder), "dataset#data": volumes}
    workflow = inference_workflow(**own, **settings)
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
            further.run(target, volume["image"])
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
    path = path or sibling_path(sct, "", ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return montage(columns, np.asarray(image.affine), path, title=sct.name)
