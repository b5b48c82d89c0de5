"""``python -m bundle export-dicom SCT``: a DICOM CT series and a structure set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from custom_modules.clinical.ct_series import CTSeries, ct_series, write_ct_series
from custom_modules.clinical.structures import write_structure_set
from custom_modules.clinical.study import Origin
from custom_modules.data.dicom import is_series, series_at, split_address
from custom_modules.data.volumes import read_volume, sibling_path, volume_files
from custom_modules.errors import InputError
from custom_modules.files import sha256


def export_dicom(
    sct: str, series: str | None = None, output_dir: str | None = None, structures: str = "EXTERNAL"
) -> None:
    """Write a synthetic CT as a DICOM CT series, with a structure set beside it.

    The series has patient, study, frame of reference and slices of the MR's; without one it is a study of its own, in
    axial slices. Every file says that it is synthetic and for research.

    Args:
        sct: the synthetic CT with its record ``.json`` beside it.
        series: DICOM series of the MR; that of the record when None.
        output_dir: folder for the series, which appears once it is complete; ``sct`` without its extension when None.
        structures: EXTERNAL, BONE, LUNG, AIR, separated by commas; none: no structure set.
    """
    record = read_record(sct)
    target = Path(output_dir) if output_dir else sibling_path(sct, "", "")
    made = series_of(sct, record, series)
    if not (split_address(sct)[0].is_dir() and target == Path(sct)):  # written as a series already
        write_ct_series(made, target)
    print(f"CT series      {target} ({len(made.stack)} slices)")
    export_structures(made, structures, target)


def export_structures(made: CTSeries, structures: str, target: Path) -> None:
    """Write the structures named in a list separated by commas beside the series ``target``."""
    names = structure_names(structures)
    if names:
        path = sibling_path(target, "_structures", ".dcm")
        volumes = write_structure_set(made, names, path)
        print(f"structure set  {path} ({', '.join(f'{name} {ml:.0f} mL' for name, ml in volumes.items())})")


def structure_names(structures: Any) -> list[str]:
    """Return the names in a list separated by commas, as fire gives it."""
    listed = structures if isinstance(structures, (list, tuple)) else str(structures).split(",")
    return [str(name).strip().upper() for name in listed if str(name).strip().lower() not in ("", "none", "false")]


def read_record(sct: str | Path) -> dict[str, Any]:
    """Return the record of a synthetic CT.

    Raises:
        InputError: for one that is missing or not of this file.
    """
    path = sibling_path(sct, "", ".json")
    if not Path(sct).exists():
        raise InputError(f"{sct}: no such file or folder")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        hashes = {record["output_sha256"], record["input_sha256"], record["version"]}
    except FileNotFoundError:
        raise InputError(
            f"{sct}: its record {path.name}, which names MR and weights, is not beside it; put it there, or synthesise "
            "again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not the record of a synthetic CT ({error}); synthesise again") from None
    if sha256(sct) not in hashes:
        raise InputError(f"{sct}: is not the file that {path.name} describes; it was changed, synthesise again")
    return record


def series_of(sct: str | Path, record: dict[str, Any], series: str | None = None) -> CTSeries:
    """Return a synthetic CT on the slices of its MR.

    Raises:
        InputError: when the MR is not a series, or not that of the record.
    """
    volume = read_volume(sct)
    origin = Origin(record["input_sha256"], record.get("model_sha256"), record["version"], record.get("settings") or {})
    source = str(series or record["input"])
    there = split_address(source)[0].exists()
    if series is not None and not (there and is_series(series)):
        raise InputError(f"{series}: is no DICOM series; give the folder of the MR's series")
    if series is None and there and is_series(source) and sha256(volume_files(source)) != origin.input_sha256:
        raise InputError(f"{source}: is not the MR any more that {sct} was made from; give it by --series")
    if series is None and not there and not _is_file_name(source):
        raise InputError(f"{source}: the MR series of {sct} is not there any more; give it by --series")
    made = ct_series(np.asarray(volume[0]), np.asarray(volume.affine), origin, source)
    if is_series(sct) and series_at(sct).uid != made.uid:
        raise InputError(f"{sct}: is not the series that its record and {source} lead to; synthesise again")
    return made


def _is_file_name(source: str) -> bool:
    return sibling_path(source, "", "").name != Path(source).name
