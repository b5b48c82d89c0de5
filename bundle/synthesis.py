"""``python -m bundle synthesize MR``: a synthetic CT and a picture of it."""

from __future__ import annotations

import base64
import json
import time
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np

from bundle.clinical.further import Further
from bundle.montage import montage
from bundle.pages.niivue import MISSING, packed_script
from bundle.workflow import inference_workflow
from custom_modules.data.body import ct_body_mask
from custom_modules.data.grid import check_same_grid
from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import EXTENSIONS, read_volume, sibling_path
from custom_modules.errors import InputError
from custom_modules.files import atomic_write, write_text
from custom_modules.memory import peak_memory_gib

KINDS = {"MR": "MR", "SD": "SD"}  # of volumes that are not in HU
ERROR = "synthetic CT - CT"


def synthesize(
    mr: str, output_dir: str = "eval", view: bool = False, structures: str | None = None,
    attenuation: int | None = None, density: str | None = None, pet: str | None = None, dose: str | None = None,
    **settings: Any,
) -> None:  # fmt: skip
    """Synthesise the CT of an MR, or of each MR in a folder, and write a picture of both.

    Args:
        mr: a volume, a folder of volumes and DICOM series, a list of paths, or a datalist.
        output_dir: a folder, or for a single MR the file to write.
        view: write a page with an interactive viewer beside each synthetic CT too, and open it.
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
            if view:
                open_page(volume["image"], target)
            further.run(target, volume["image"])
    print(f"time          {seconds:.1f} s\npeak memory   {peak_memory_gib('cpu'):.2f} GiB")
    if failed:
        raise failed


def picture(mr: str | Path, sct: str | Path, ct: str | Path | None = None, path: Path | None = None) -> Path:
    """Draw MR and synthetic CT with the guard's warnings, the SD where there is one, and with a CT also CT and error.

    Args:
        path: of the PNG; that of ``sct`` with the extension .png when None.
    """
    columns, affine = shown(mr, sct, ct)
    path = path or sibling_path(sct, "", ".png")
    with atomic_write(path) as temporary:
        montage(columns, affine, temporary, title=Path(sct).name, notes=guard_warnings(sct))
    return path


def shown(
    mr: str | Path, sct: str | Path | None, ct: str | Path | None = None
) -> tuple[dict[str, tuple[np.ndarray, str]], np.ndarray]:
    """Return the volumes of a synthesis as (array, kind) by title, and their affine. The error is NaN where it is not
    scored: outside the body in CT and MR.

    Raises:
        InputError: when a volume cannot be read or is on another grid than the MR.
    """
    paths = {"MR": mr, "synthetic CT": sct, "CT": ct}
    if sct is not None:  # that of a DICOM series is in NIfTI
        spread = sibling_path(sct, "_sd", EXTENSIONS[0] if Path(sct).is_dir() else None)
        paths["SD"] = spread if spread.exists() else None
    volumes = {name: read_volume(path) for name, path in paths.items() if path}
    for volume in volumes.values():
        check_same_grid(volume, volumes["MR"])
    columns = {name: (np.asarray(volume[0]), KINDS.get(name, "HU")) for name, volume in volumes.items()}
    if "CT" in columns and "synthetic CT" in columns:
        reference = columns["CT"][0]
        error = columns["synthetic CT"][0] - reference
        columns[ERROR] = (np.where(ct_body_mask(reference, columns["MR"][0]), error, np.nan), "error")
    return columns, np.asarray(volumes["MR"].affine)


def guard_warnings(sct: str | Path) -> list[str]:
    """Return the warnings of the input guard in the record of a synthetic CT."""
    record = sibling_path(sct, "", ".json")
    guard = json.loads(record.read_text(encoding="utf-8")).get("guard") if record.is_file() else None
    return [f"not like the training MRs: {warning}" for warning in (guard or {}).get("warnings", [])]


def open_page(mr: str | Path, sct: str | Path) -> None:
    """Write the page with the viewer of a synthesis and open it in the browser."""
    page = write_page(mr, sct)
    print(f"viewer        {page}")
    webbrowser.open(page.resolve().as_uri())


def write_page(mr: str | Path, sct: str | Path) -> Path:
    """Write a page with the viewer and the picture of a synthesis beside ``sct``, and return its path."""
    from bundle.pages.layers import layers
    from bundle.pages.render import render

    volumes, note = layers(*shown(mr, sct)) if packed_script() else ([], MISSING)
    source = base64.b64encode(sibling_path(sct, "", ".png").read_bytes()).decode()
    figures = [{"caption": "MR, synthetic CT", "source": f"data:image/png;base64,{source}"}]
    path = sibling_path(sct, "", ".html")
    text = render(
        "view.html", title=Path(sct).name, warnings=guard_warnings(sct), layers=volumes, note=note, figures=figures
    )  # fmt: skip
    write_text(text, path)
    return path
