"""What does the input guard see? AUROC of its score between the test MRs and MRs that should be warned of.

    python benchmarks/guard.py --dataset_dir DIR [--statistics models/guard.json] [--held_out liver,chest_lidc]

The odd ones: MRs of the torso, CTs given as MR, an MR of another contrast, an empty scan of noise, and every test MR
with its voxels rotated or flipped while the header stays. A score is the largest deviation in standard deviations of
the training patients; a rate is the share above the limit. The second AUROC leaves spacing and field of view out. For
the CTs in ``torso_ct`` that the weights have not seen, MRs of the known contrasts are simulated, which count as usual,
and images of fat or water alone, which do not.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import yaml
from scipy.stats import mannwhitneyu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.calibrate import KNOWN  # noqa: E402
from bundle.workflow import ROOT, inference_workflow  # noqa: E402
from custom_modules.data.pairs import load_pairs  # noqa: E402
from custom_modules.data.simulation import SimulateMR  # noqa: E402
from custom_modules.data.transforms import Preprocess  # noqa: E402
from custom_modules.inference.guard import LIMIT  # noqa: E402

ALTERED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rotated: foot to head along back to front": lambda v: v.transpose(0, 2, 1),
    "rotated: foot to head along left to right": lambda v: v.transpose(2, 1, 0),
    "rotated by 90 degrees in plane": lambda v: np.rot90(v, axes=(0, 1)),
    "flipped left to right": lambda v: v[::-1],
    "flipped back to front": lambda v: v[:, ::-1],
    "flipped foot to head": lambda v: v[..., ::-1],
    "contrast inverted": lambda v: np.where(v > 0, np.percentile(v, 99) - np.minimum(v, np.percentile(v, 99)) + 1, 0),
    "noise only": lambda v: np.abs(np.random.default_rng(0).normal(0, 20, v.shape)),
}


ALONE = {  # images of one of the two, by a Dixon method
    "fat alone": {"sequence": "gradient_echo", "repetition_time": [100, 250], "flip_angle": [50, 80],
                  "water_signal": [0, 0.03]},
    "water alone": {"sequence": "gradient_echo", "repetition_time": [100, 250], "flip_angle": [50, 80],
                    "fat_signal": [0, 0.03]},
}  # fmt: skip


def auroc(usual: list[float], odd: list[float]) -> float:
    """The chance that an odd one scores higher than a usual one, ties counted half."""
    return float(mannwhitneyu(odd, usual).statistic / (len(odd) * len(usual)))


def altered(paths: list[str], change: Callable, folder: Path) -> Iterator[Path]:
    """Copies whose voxels are changed and whose header is not."""
    for number, path in enumerate(paths):
        image = nib.Nifti1Image.from_filename(path)
        target = folder / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(change(image.get_fdata(dtype=np.float32)), image.affine), target)
        yield target


def simulated(cts: list[Path], contrasts: dict[str, Any], folder: Path, seeds: int = 3) -> list[Path]:
    """MRs of each of ``contrasts`` for each CT, ``seeds`` of each."""
    draw, paths = SimulateMR(contrasts), []
    read = Preprocess((2.0, 2.0, 2.0))
    for ct in cts:
        data = read({"label": str(ct)})
        hu, regions = np.asarray(data["label"][0]), np.asarray(data["regions"][0])
        for number, name in enumerate(contrasts):
            for seed in range(seeds):
                draw.set_random_state(100 * number + seed)
                paths.append(folder / f"{ct.name.split('.')[0]}_{name.replace(' ', '_')}_{seed}.nii.gz")
                mr = draw(hu, regions, (2.0, 2.0, 2.0), name)
                nib.save(nib.Nifti1Image(mr.astype(np.int16), np.asarray(data["label"].affine)), paths[-1])
    return paths


def findings(paths: list[Any], **settings: Any) -> list[dict[str, Any] | str]:
    """The guard's result for each file, or why it was refused before."""
    data = [{"image": str(path), "output": ""} for path in paths]
    parser = inference_workflow(**{"dataset#data": data, **settings}).parser
    guard, network = (parser.get_parsed_content(name) for name in ("guard", "network"))
    batches = parser.get_parsed_content("dataloader")
    return [batch["failure"] if "failure" in batch else guard(batch, network) for batch in batches]


def score(found: dict[str, Any] | str) -> float:
    """The largest deviation; what was refused before is beyond all."""
    return np.inf if isinstance(found, str) else found["score"]


def image_score(found: dict[str, Any] | str) -> float:
    """The largest deviation of the image itself, spacing and field of view left out."""
    if isinstance(found, str):
        return np.inf
    return max(v for name, v in found["deviations"].items() if not name.endswith("spacing") and "field" not in name)


def main(
    dataset_dir: str, split: str = "test", statistics: str | None = None, patients: int | None = None,
    held_out: str = "liver,chest_lidc",
) -> None:  # fmt: skip
    settings = {"guard_statistics": statistics} if statistics else {}
    root = Path(dataset_dir)
    usual = [pair["image"] for pair in load_pairs(root / "datalist.json", root, [split, "training"])[split]][:patients]
    groups = {split: findings(usual, **settings)}
    for name in ("torso_mr", "torso_ct"):
        paths = sorted(path for path in (root / name).glob("*.nii.gz") if "labels" not in path.name)
        groups[name] = findings(paths, **settings)
    cts = [root / "torso_ct" / f"{name}.nii.gz" for name in str(held_out).split(",")]
    config = yaml.safe_load((ROOT / "configs" / "whole_body.yaml").read_text())["contrasts"]
    with tempfile.TemporaryDirectory() as scratch:
        known = {name: config[name] for name in KNOWN.split(",")}
        groups["known contrasts, simulated"] = findings(simulated(cts, known, Path(scratch)), **settings)
        for name, contrast in ALONE.items():
            groups[name] = findings(simulated(cts, {name: contrast}, Path(scratch)), **settings)
        for name, change in ALTERED.items():
            groups[name] = findings(list(altered(usual, change, Path(scratch))), **settings)
    scores, image_scores = (
        {name: [of(found) for found in group] for name, group in groups.items()} for of in (score, image_score)
    )
    print(f"{'':<46}{'AUROC':>7}{'image':>7}{'warned':>8}   scores; measures that were outside")
    for name, values in scores.items():
        measures = [
            measure for found in groups[name] if not isinstance(found, str)
            for measure, value in found["deviations"].items() if value > LIMIT
        ]  # fmt: skip
        often = ", ".join(sorted(set(measures), key=measures.count, reverse=True)[:3])
        alike = [split, "known contrasts, simulated"] if name in ALONE or name == "torso_mr" else [split]
        areas = [f"{auroc(sum((s[n] for n in alike), []), s[name]):.3f}" for s in (scores, image_scores)]
        rate = f"{np.mean(np.array(values) > LIMIT):.0%}"
        each = " ".join(f"{value:.1f}" for value in sorted(values))
        print(f"{name:<46}{areas[0]:>7}{areas[1]:>7}{rate:>8}   {each}; {often}")


if __name__ == "__main__":
    fire.Fire(main)
