"""Are samples like CTs, and is their spread the error? By where a sample starts and its DDIM steps, on real patients.

    python benchmarks/samples.py --dataset_dir DIR [--split validation] [--num_samples 16]

Beside the one-step estimate: MAE, bone MAE, the difference of neighbouring slices over that of the CT, the slope of the
power spectrum (logarithm against logarithm, 8 to 50 mm) in the middle of the patient. Of the SD: the factor that fits
it to the error on the same patients, how much of the error then lies in the 95 % interval, and the rank correlation.
"""

from __future__ import annotations

from typing import Any

import fire
import nibabel as nib
import numpy as np
from common import ROOT, publish
from tqdm import tqdm

from bundle import synthesize
from custom_modules.data.body import ct_body_mask
from custom_modules.data.hu import BONE_HU
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import read_volume
from custom_modules.evaluation.metrics import slice_inconsistency
from custom_modules.evaluation.uncertainty import coverage, fit_scale, spearman

BAND = 8.0, 50.0  # mm, wavelengths
CUBE = 128.0  # mm
WAYS = {  # sample_timestep and sample_steps
    "noise at timestep 150, 1 step": (150, 1),
    "noise at timestep 300, 1 step": (300, 1),
    "noise at timestep 300, 4 steps": (300, 4),
    "noise alone, 8 steps": (None, 8),
}


def spectral_slope(volume: np.ndarray, spacing: np.ndarray) -> float:
    """Slope of the radial power spectrum of the middle of a volume (D, H, W), tapered to its faces."""
    size = [min(n, round(CUBE / step)) for n, step in zip(volume.shape, spacing)]
    middle = volume[tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(volume.shape, size))]
    taper = np.einsum("i,j,k->ijk", *(np.hanning(s) for s in size))
    power = np.abs(np.fft.fftn((middle - middle.mean()) * taper)) ** 2
    axes = np.meshgrid(*(np.fft.fftfreq(s, step) for s, step in zip(size, spacing)), indexing="ij")
    frequency = np.sqrt(sum(axis**2 for axis in axes))
    edges = np.geomspace(1 / BAND[1], 1 / BAND[0], 9)
    rings = [(frequency >= low) & (frequency < high) for low, high in zip(edges, edges[1:])]
    means = np.log([power[ring].mean() for ring in rings if ring.any()])
    centres = np.log([frequency[ring].mean() for ring in rings if ring.any()])
    return float(np.polyfit(centres, means, 1)[0])


def measure(
    pair: dict[str, str], way: tuple[int | None, int] | None, num_samples: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Numbers of one patient, of the estimate (no ``way``) or of samples with their SD."""
    mr, label = read_volume(pair["image"]), read_volume(pair["label"])
    axial = list(nib.io_orientation(mr.affine)[:, 0]).index(2)
    if way:
        own: dict[str, Any] = {"num_samples": num_samples, "output": "sample"}
        own |= dict(zip(("sample_timestep", "sample_steps"), way))
        made = synthesize(pair["image"], calibration=None, **own, **settings)
    else:
        made = synthesize(pair["image"], **settings)
    pred, ct, spacing = made.hu.get_fdata(dtype=np.float32), np.asarray(label[0]), np.asarray(mr.pixdim)
    mask = ct_body_mask(ct, np.asarray(mr[0]))
    found = {
        "MAE, HU": np.abs(pred - ct)[mask].mean(),
        "bone MAE, HU": np.abs(pred - ct)[mask & (ct > BONE_HU)].mean(),
        "slices": slice_inconsistency(pred, ct, mask, axial),
        "slope": spectral_slope(pred, spacing),
        "slope of the CT": spectral_slope(ct, spacing),
    }
    if made.sd is not None:
        found |= {"sd": made.sd.get_fdata(dtype=np.float32)[mask], "bone": ct[mask] > BONE_HU}
    return {**found, "estimate error": (pred - ct)[mask]}


def main(
    dataset_dir: str, split: str = "validation", num_samples: int = 16, patients: int | None = None, **settings: Any,
) -> None:  # fmt: skip
    pairs = load_pairs(f"{dataset_dir}/datalist.json", dataset_dir, [split, "training"])[split][:patients]
    rows, errors = [], []
    for name, way in tqdm({"estimate": None, **WAYS}.items(), unit="setting"):
        found = [measure(pair, way, num_samples, settings) for pair in pairs]
        errors = errors or [each["estimate error"] for each in found]  # SD is to be that of the estimate
        row: dict[str, Any] = {"": name}
        numbers = [key for key, value in found[0].items() if isinstance(value, (float, np.floating))]
        row |= {key: float(np.nanmean([each[key] for each in found])) for key in numbers}
        if way:
            spreads = [each["sd"] for each in found]
            scale = fit_scale(errors, spreads)
            row |= {"factor on SD": scale}
            bone = [
                coverage(e[each["bone"]], scale * s[each["bone"]], 0.95) for e, s, each in zip(errors, spreads, found)
            ]
            row["in 95 %"] = float(np.mean([coverage(e, scale * s, 0.95) for e, s in zip(errors, spreads)]))
            row["bone in 95 %"] = float(np.nanmean(bone))
            row["rank correlation"] = float(np.mean([spearman(e, s) for e, s in zip(errors, spreads)]))
        rows.append(row)
    publish("samples", rows, list(rows[-1]), page=ROOT / "docs" / "evaluation.md")


if __name__ == "__main__":
    fire.Fire(main)
