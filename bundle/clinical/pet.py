"""``python -m bundle pet``: the error that a synthetic CT would cause in a PET."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bundle.clinical.maps import moved, save_map
from bundle.clinical.pair import Pair, read_pair
from bundle.montage import montage
from custom_modules.clinical.attenuation import FWHM, Grid, attenuation_of, smooth
from custom_modules.clinical.pet import Ring, pet_error
from custom_modules.clinical.study import MARK
from custom_modules.data.hu import BONE_HU, TISSUE_HU
from custom_modules.data.volumes import sibling_path
from custom_modules.errors import InputError
from custom_modules.files import write_json
from custom_modules.memory import peak_memory_gib


def pet(
    ct: str, sct: str, kvp: int = 120, model: str = "carney", fwhm: float = FWHM, diameter: float = 700.0,
    pitch: float = 4.0, angles: int = 120, mr: str | None = None, outline: bool = False, output: str | None = None,
) -> None:  # fmt: skip
    """Compare the attenuation correction of a PET by a synthetic CT with that by the CT.

    Prints, and writes to SCT_pet.json: the relative difference of the attenuation correction factors on the lines of
    response through the body, and that of the activity in a uniform body with hot lesions after reconstruction. Writes
    the latter as SCT_pet.nii.gz, in percent, and a picture SCT_pet.png.

    Args:
        ct: the CT, HU.
        sct: the synthetic CT, HU, in the same frame of reference.
        kvp: tube voltage, see wldm attenuation.
        model: of attenuation, see there.
        fwhm: mm, resolution of the PET, by which both maps are smoothed.
        diameter: mm, of the ring's field of view.
        pitch: mm, between lines of response, slices and pixels.
        angles: directions over 180 degrees.
        mr: the MR; where it is 0 the synthetic CT had nothing to go by, and both maps are air.
        outline: keep the synthetic CT beyond the body of the CT, otherwise it is air there.
        output: the JSON file to write; SCT_pet.json when None.
    """
    if not (1 <= pitch <= 20 and 100 <= diameter <= 2000 and 8 <= angles <= 2000):
        raise InputError("--pitch must be 1 to 20 mm, --diameter 100 to 2000 mm, --angles 8 to 2000")
    started = time.perf_counter()
    pair = read_pair(ct, sct, mr, outline)
    target = pair.upright(pitch)
    true_mu, mu = (on_pet(attenuation_of(hu, kvp, model), pair.grid, target, fwhm) for hu in (pair.ct, pair.sct))
    regions = regions_of(pair, target)
    figures, volumes = pet_error(true_mu, mu, regions, Ring(diameter, pitch, angles))
    seconds = time.perf_counter() - started
    path = Path(output) if output else sibling_path(sct, "_pet", ".json")
    settings = {"kvp": kvp, "model": model, "fwhm": fwhm, "diameter": diameter, "pitch": pitch, "angles": angles}
    memory = round(peak_memory_gib("cpu"), 2)
    record = {"ct": str(Path(ct).resolve()), "sct": str(Path(sct).resolve()), "settings_pet": settings, **figures}
    write_json({**record, "time_s": round(seconds, 1), "peak_memory_gib": memory, "note": MARK}, path)
    save_map(100 * volumes["relative"], target, path.with_suffix(".nii.gz"), f"activity difference, percent; {MARK}")
    picture([true_mu, mu], volumes["relative"], target, path.with_suffix(".png"))
    report(figures)
    print(f"written        {path}, .nii.gz, .png\ntime           {seconds:.1f} s\npeak memory    {memory:.2f} GiB")


def on_pet(mu: np.ndarray, grid: Grid, target: Grid, fwhm: float) -> np.ndarray:
    """Smooth a map to the resolution of a PET and put it on its grid."""
    return moved(smooth(mu, grid.spacing, fwhm), grid, target, "the CT")


def regions_of(pair: Pair, target: Grid) -> dict[str, np.ndarray]:
    """Return body, soft tissue, bone and air of a CT as masks on the grid of the PET: voxels with more than half of
    each."""
    hu, body, grid = pair.ct, pair.body, pair.grid
    classes = {
        "body": body, "soft": body & (hu > TISSUE_HU) & (hu <= BONE_HU), "bone": body & (hu > BONE_HU),
        "air": body & (hu <= TISSUE_HU),
    }  # fmt: skip
    shares = {
        name: moved(smooth(mask.astype(np.float32), grid.spacing, min(target.spacing)), grid, target, name)
        for name, mask in classes.items()
    }
    return {name: share > 0.5 for name, share in shares.items()}


def picture(maps: list[np.ndarray], relative: np.ndarray, target: Grid, path: Path) -> None:
    columns = {
        "attenuation, CT": (maps[0], "mu"), "attenuation, synthetic CT": (maps[1], "mu"),
        "activity, difference": (100 * relative, "percent"),
    }  # fmt: skip
    montage(columns, target.affine, path, title=f"PET ({MARK})")


def report(figures: dict[str, Any]) -> None:
    """Print the figures, one line for each place."""
    rows = {"correction factors": figures["acf"], **{f"activity, {k}": v for k, v in figures["suv"].items()}}
    rows["activity, lesions"] = figures["lesion"]
    print(f"{'difference, %':<22}{'mean':>8}{'mean abs':>10}{'5 %':>8}{'95 %':>8}{'largest':>9}")
    for name, row in rows.items():
        if row:
            cells = [row[key] for key in ("mean", "mean_abs", "p5", "p95", "max_abs")]
            print(f"{name:<22}" + "".join(f"{cell:>{width}.2f}" for cell, width in zip(cells, (8, 10, 8, 8, 9))))
