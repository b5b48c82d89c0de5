"""Runs in the environment of ``make dose``: the same photon and proton plan on a CT and on a synthetic CT. Knows numpy,
SimpleITK, pyRadPlan and pymedphys, and nothing of this project.

    python plan_worker.py IN.npz OUT.npz

IN: ``ct`` and ``sct`` (z, y, x) in HU, ``body`` and ``target`` masks, ``spacing`` in mm, ``origin`` in mm (LPS), the
prescribed ``dose`` in Gy, ``modes``, ``photons_angles`` and ``protons_angles`` in degrees of the gantry, ``bixel`` in
mm and ``gamma`` as rows of percent and mm. OUT: for each mode ``MODE_ct`` and ``MODE_sct`` in Gy, and
``MODE_gamma_PERCENT_MM`` (NaN where the dose is below a tenth of the largest).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import SimpleITK as sitk

CUTOFF = 10  # percent of the largest dose, below which gamma says nothing
FRACTIONS = 1


def image(values: np.ndarray, given: Any) -> sitk.Image:
    made = sitk.GetImageFromArray(values)
    made.SetSpacing([float(given["spacing"])] * 3)
    made.SetOrigin([float(value) for value in given["origin"]])
    return made


def plan_of(mode: str, given: Any) -> Any:
    """A plan of equally weighted directions with the generic machine that comes with pyRadPlan."""
    from pyRadPlan import IonPlan, PhotonPlan

    angles = np.asarray(given[f"{mode}_angles"], dtype=float)
    plan = PhotonPlan(machine="Generic") if mode == "photons" else IonPlan(radiation_mode=mode, machine="Generic")
    plan.prop_stf = {
        "gantry_angles": angles, "couch_angles": np.zeros_like(angles), "bixel_width": float(given["bixel"])
    }  # fmt: skip
    plan.num_of_fractions = FRACTIONS
    plan.prescribed_dose = float(given["dose"])
    plan.prop_opt = {"solver": "scipy"}
    return plan


def structures(ct: Any, given: Any) -> Any:
    from pyRadPlan import StructureSet
    from pyRadPlan.cst import create_voi
    from pyRadPlan.optimization.objectives import MeanDose, SquaredDeviation, SquaredOverdosing

    dose = float(given["dose"])
    vois = []
    for name, kind in (("BODY", "EXTERNAL"), ("TARGET", "TARGET")):
        mask = image(given[name.lower()].astype(np.uint8), given)
        vois.append(create_voi(voi_type=kind, name=name, ct_image=ct, mask=mask))
    vois[0].objectives = [MeanDose(priority=1.0, d_ref=0.0), SquaredOverdosing(priority=10.0, d_max=0.8 * dose)]
    vois[1].objectives = [SquaredDeviation(priority=200.0, d_ref=dose)]
    return StructureSet(vois=vois, ct_image=ct)


def doses(mode: str, given: Any) -> list[np.ndarray]:
    """Optimise on the CT; return the dose of this plan on CT and synthetic CT, (z, y, x) in Gy."""
    from pyRadPlan import CT, calc_dose_forward, calc_dose_influence, fluence_optimization, generate_stf

    ct, sct = (CT(cube_hu=image(given[name].astype(np.float32), given)) for name in ("ct", "sct"))
    plan, cst = plan_of(mode, given), structures(ct, given)
    plan.prop_dose_calc = {"dose_grid": ct.grid}
    stf = generate_stf(ct, cst, plan)
    influence = calc_dose_influence(ct, cst, stf, plan)
    fluence = fluence_optimization(ct, cst, stf, influence, plan)
    found = [calc_dose_forward(one, cst, stf, plan, fluence)["physical_dose"] for one in (ct, sct)]
    return [np.asarray(sitk.GetArrayFromImage(one), dtype=np.float32) for one in found]


def gamma(reference: np.ndarray, other: np.ndarray, spacing: float, percent: float, distance: float) -> np.ndarray:
    """Global gamma index after Low et al. 1998, by pymedphys."""
    from pymedphys import gamma as of

    axes = tuple(np.arange(size) * spacing for size in reference.shape)
    return of(
        axes, reference, axes, other, percent, distance, lower_percent_dose_cutoff=CUTOFF, interp_fraction=5,
        max_gamma=2, quiet=True,
    )  # fmt: skip


def main(source: str, target: str) -> None:
    given = np.load(source)
    made: dict[str, Any] = {}
    for mode in given["modes"].tolist():
        reference, other = doses(mode, given)
        made[f"{mode}_ct"], made[f"{mode}_sct"] = reference, other
        for percent, distance in given["gamma"]:
            index = gamma(reference, other, float(given["spacing"]), percent, distance)
            made[f"{mode}_gamma_{percent:g}_{distance:g}"] = index.astype(np.float32)
    np.savez_compressed(target, **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
