"""Scores of a split of a datalist by patient, together with trivial baselines, and summaries of the cohort."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from custom_modules.data.body import ct_body_mask
from custom_modules.data.grid import check_same_grid
from custom_modules.data.hu import check_hu
from custom_modules.data.pairs import load_pairs
from custom_modules.data.volumes import EXTENSIONS, read_volume, sibling_path
from custom_modules.errors import InputError, stop
from custom_modules.evaluation.clinical import clinical_figures
from custom_modules.evaluation.metrics import METRICS, PROTOCOLS, bias, score, slice_inconsistency
from custom_modules.evaluation.organs import organ_dice
from custom_modules.evaluation.uncertainty import FRACTIONS, assess, spearman
from custom_modules.files import inside, write_json
from custom_modules.inference.workflow import inference_workflow

logger = logging.getLogger(__name__)

Row = dict[str, Any]
BORDER_MM = 6.0
LOOKUP_BIN = 10.0  # MR units
LOOKUP_TOP = 2000.0
RESAMPLES = 9999


class Evaluation:
    """Synthesises the MRs of a split and scores them on their own grid against the CTs (``label``).

    Writes to ``output_dir`` the synthetic CTs, ``metrics.csv`` (one row per patient and system) and ``metrics.json``
    (mean, SD, median and the bootstrap 95 % interval of the mean). The systems are the predictions and two baselines:
    0 HU everywhere, and the mean HU of the training patients for each MR intensity. A patient who cannot be scored has
    a row with the reason and is left out of all means; the program then ends with a list of these patients.

    Args:
        dataset_dir: folder that the datalist's paths are relative to.
        datalist: MONAI datalist; ``DATASET_DIR/datalist.json`` when None.
        split: of the datalist.
        output_dir: folder for the results.
        pred_dir: folder of finished synthetic CTs, ``<patient>_sct`` with any extension, and their SD, if any, as
            ``<patient>_sct_sd``; synthesised when None. Figures of ``wldm pet`` and ``wldm dose`` beside them go into
            the rows.
        labels: folder of organ labels, ``<patient>_ct`` and ``<patient>_sct``; made by TotalSegmentator, if it is
            installed, when None.
        config: overlays on inference.yaml for other networks, such as configs/baselines/unet.yaml.
        name: of the system in the rows.
        settings: changed settings of inference.yaml; those that are None keep their default.
    """

    def __init__(
        self,
        dataset_dir: str,
        datalist: str | None,
        split: str,
        output_dir: str,
        pred_dir: str | None = None,
        labels: str | None = None,
        config: str | Sequence[str] | None = None,
        name: str = "3D-WLDM",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(datalist or Path(dataset_dir) / "datalist.json")
        self.dataset_dir, self.split, self.output_dir, self.name = dataset_dir, split, Path(output_dir), name
        self.pred_dir, self.labels = pred_dir, labels
        self.config = [config] if isinstance(config, str) else list(config or ())
        self.settings = {key: value for key, value in (settings or {}).items() if value is not None}

    @cached_property
    def pairs(self) -> list[dict[str, str]]:
        """Pairs of the split, each with ``patient``."""
        return self._splits[self.split]

    @cached_property
    def _splits(self) -> dict[str, list[dict[str, str]]]:
        """Pairs of the split and, for the MR lookup, of the training split if there is one. CTs without an MR, which
        training takes, are left out."""
        try:
            found = load_pairs(
                self.path, self.dataset_dir, list(dict.fromkeys((self.split, "training"))), unpaired=True
            )
        except InputError:
            found = load_pairs(self.path, self.dataset_dir, [self.split], unpaired=True)
        pairs = {split: [pair for pair in entries if "image" in pair] for split, entries in found.items()}
        left_out = len(found[self.split]) - len(pairs[self.split])
        if left_out:
            logger.warning("%d CTs without an MR are not scored; wldm simulate makes pairs of them", left_out)
        return pairs

    def run(self) -> list[Row]:
        """Synthesise, score and write everything; return the rows of ``metrics.csv``."""
        try:
            self._check()
            if self.pred_dir is None:
                self.synthesize()
            rows = self.score()
        except InputError as error:
            stop(str(error))
        write_csv(rows, self.output_dir / "metrics.csv")
        write_json(self.summary(rows), self.output_dir / "metrics.json")
        print_rows(rows)
        print(f"written to {self.output_dir / 'metrics.csv'} and metrics.json")
        problems = [f"  {row['patient']}: {row['problem']}" for row in rows if row["problem"]]
        if problems:
            total = len(self.pairs)
            stop(f"{len(problems)} of {total} patients are not, or only partly, scored:\n" + "\n".join(problems))
        return rows

    def _check(self) -> None:
        """Raise InputError for what is wrong with folders and names, before anything is computed."""
        for name in ("pred_dir", "labels"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise InputError(f"{folder}: no such folder; --{name} must be one")
        if not self.pairs:
            raise InputError(f"{self.path}: split '{self.split}' is empty")
        patients = [pair["patient"] for pair in self.pairs]
        twice = sorted({patient for patient in patients if patients.count(patient) > 1})
        if twice:
            raise InputError(f"{self.path}: patient {', '.join(twice)} more than once in '{self.split}'")
        for patient in patients:
            inside(self.output_dir, patient)

    def synthesize(self) -> None:
        """Run inference.yaml on the MRs of the split. Volumes that fail are reported by :meth:`score`."""
        volumes = []
        for pair in self.pairs:
            output = f"{pair['patient']}_sct.nii.gz"
            target = inside(self.output_dir, output)
            for old in (target, sibling_path(target, "_sd"), sibling_path(target, "", ".json")):
                old.unlink(missing_ok=True)
            volumes.append({"image": pair["image"], "output": output})
        settings = {**self.settings, "output_dir": str(self.output_dir), "dataset#data": volumes}
        workflow = inference_workflow(self.config, logging_file=False, **settings)
        try:
            workflow.run()
        except SystemExit:
            if not any((self.output_dir / volume["output"]).exists() for volume in volumes):
                raise
            logger.exception("some volumes were not synthesised", exc_info=False)

    def score(self) -> list[Row]:
        """Return the rows of all patients and systems."""
        rows = []
        for pair in tqdm(self.pairs, desc="scoring", unit="patient"):
            try:
                sct = self._prediction(pair["patient"])
                rows += score_patient(pair, sct, self.lookup, self.name)
            except InputError as error:
                rows.append({"patient": pair["patient"], "system": self.name, "problem": str(error)})
                continue
            row = next(row for row in reversed(rows) if row["system"] == self.name)
            row.update(clinical_figures(sct))
            try:
                row.update(organ_dice(pair["patient"], pair["label"], sct, self.labels))
            except InputError as error:
                row["organs"] = "not computed"
                row["problem"] = "; ".join(filter(None, (row["problem"], str(error))))
        return rows

    def _prediction(self, patient: str) -> Path:
        folder = Path(self.pred_dir or self.output_dir)
        paths = [inside(folder, f"{patient}_sct{extension}") for extension in EXTENSIONS]
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise InputError(f"{paths[0]}: no synthetic CT of this patient")
        return found

    @cached_property
    def lookup(self) -> np.ndarray | None:
        """Mean HU of each MR intensity in the training split; None without that split, or if it cannot be read."""
        try:
            return fit_lookup(self._splits["training"]) if self._splits.get("training") else None
        except InputError as error:
            logger.warning("scores without the MR lookup baseline: %s", error)
            return None

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the content of ``metrics.json``."""
        systems = list(dict.fromkeys(row["system"] for row in rows))
        files: dict[str, dict[str, Any]] = {
            pair["patient"]: {"image": pair["image"], "label": pair["label"]} for pair in self.pairs
        }
        for row in rows:
            if row["system"] == self.name:
                files[row["patient"]] |= {key: row.get(key) for key in ("sct", "problem", "organs", "curves")}
        return {
            "split": self.split,
            "datalist": str(self.path),
            "system": self.name,
            "patients": files,
            "systems": {name: summarize([row for row in rows if row["system"] == name]) for name in systems},
            "uncertainty": across_patients([row for row in rows if row["system"] == self.name]),
        }


def fit_lookup(pairs: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Return the mean HU of each MR intensity (bins of 10 units) over the bodies of ``pairs``."""
    bins = int(LOOKUP_TOP / LOOKUP_BIN) + 1
    total, count = np.zeros(bins), np.zeros(bins)
    for pair in pairs:
        mr, ct = (np.asarray(read_volume(pair[key])[0]) for key in ("image", "label"))
        mask = ct_body_mask(ct, mr)
        index = _lookup_index(mr[mask])
        total += np.bincount(index, ct[mask], bins)
        count += np.bincount(index, minlength=bins)
    filled = np.flatnonzero(count)
    return np.interp(np.arange(bins), filled, total[filled] / count[filled])


def _lookup_index(mr: np.ndarray) -> np.ndarray:
    return (np.clip(mr, 0, LOOKUP_TOP) / LOOKUP_BIN).astype(int)


def score_patient(pair: Mapping[str, str], sct: Path, lookup: np.ndarray | None, name: str = "3D-WLDM") -> list[Row]:
    """Return the rows of one patient: the prediction, with its bias near cut surfaces and inside, and the baselines. If
    the SD of the samples lies next to the prediction, its row also has scores of how well SD predicts the error.

    Raises:
        InputError: for volumes that cannot be read, are on different grids or are not in HU.
    """
    mr, label, pred = read_volume(pair["image"]), read_volume(pair["label"]), read_volume(sct)
    for volume in (pred, mr):
        check_same_grid(volume, label)
    spacing, axial = np.asarray(mr.pixdim), list(nib.io_orientation(mr.affine)[:, 0]).index(2)
    mr, ct, pred = (np.asarray(x[0]) for x in (mr, label, pred))
    for path, volume in ((pair["label"], ct), (sct, pred)):
        check_hu(volume, str(path))
    mask = ct_body_mask(ct, mr)
    systems = {name: pred, "0 HU": np.zeros_like(ct)}
    if lookup is not None:
        systems["MR lookup"] = lookup[_lookup_index(mr)]
    rows = [
        {"patient": pair["patient"], "system": system, "problem": "", **_scores(values, ct, mask)}
        for system, values in systems.items()
    ]
    near = mask & near_border(mask.shape, spacing)
    rows[0]["slice_inconsistency"] = slice_inconsistency(pred, ct, mask, axial)
    rows[0].update(sct=str(sct), border_bias=bias(pred, ct, near), inside_bias=bias(pred, ct, mask & ~near))
    if not mask.any():
        rows[0]["problem"] = f"{pair['label']}: no body where the MR has signal; no metric is defined"
    sd = sibling_path(sct, "_sd")
    if sd.exists():
        volume = read_volume(sd)
        check_same_grid(volume, label)
        values = assess(pred, ct, np.asarray(volume[0]), mask)
        rows[0]["curves"] = {key: values.pop(key) for key in ("sparsification", "oracle")}
        rows[0].update({f"sd_{key}": value for key, value in values.items()})
    return rows


def _scores(pred: np.ndarray, ct: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    return {f"{p}_{metric}": value for p in PROTOCOLS for metric, value in score(pred, ct, mask, p).items()}


def near_border(shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """Return the voxels within 6 mm of a face of the field of view; in the body, these are at a cut surface."""
    near = np.zeros(shape, dtype=bool)
    for axis, (size, step) in enumerate(zip(shape, spacing)):
        index = np.arange(size)
        line = (np.minimum(index, size - 1 - index) + 0.5) * step < BORDER_MM
        near |= line.reshape([-1 if a == axis else 1 for a in range(3)])
    return near


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Summarise each number in the rows of one system over the patients for whom it is defined: ``mean``, ``sd``,
    ``median``, ``ci95`` (of the mean), ``n``, and the patients for whom it is ``not_defined``."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float))
    result = {}
    for name in names:
        values = {row["patient"]: row.get(name, float("nan")) for row in rows}
        defined = np.array([v for v in values.values() if not np.isnan(v)])
        result[name] = {**_statistics(defined), "not_defined": [p for p, v in values.items() if np.isnan(v)]}
    return result


def _statistics(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"mean": None, "sd": None, "median": None, "ci95": None, "n": 0}
    ci95 = None  # one patient, or an infinite value, has no interval
    if len(values) > 1 and np.isfinite(values).all():
        interval = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0).confidence_interval
        ci95 = [float(interval.low), float(interval.high)]
    sd = float(values.std(ddof=1)) if ci95 else float("nan")
    return {"mean": float(values.mean()), "sd": sd, "median": float(np.median(values)), "ci95": ci95, "n": len(values)}


def across_patients(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the statistics of SD over the cohort: its rank correlation with the error by patient, and the mean
    sparsification curves; None without SD."""
    rows = [row for row in rows if "curves" in row]
    if not rows:
        return None
    errors, spreads = (np.array([row[key] for row in rows]) for key in ("synthrad2025_mae", "sd_mean_sd"))
    curves = {key: np.mean([row["curves"][key] for row in rows], axis=0).tolist() for key in rows[0]["curves"]}
    return {"spearman_by_patient": spearman(errors, spreads), "fractions": FRACTIONS.tolist(), **curves}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row; ``nan`` means not defined, an empty cell not applicable."""
    fields = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    fields.append(fields.pop(fields.index("problem")))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


SHOWN = ["mae", "bias", "rmse", "psnr", "ssim", "ms_ssim", "ncc", "soft_mae", "bone_mae", "bone_dice"]


def print_rows(rows: Sequence[Row]) -> None:
    """Print both protocols as tables: the patients, and below them the mean of every system over defined values."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for protocol in PROTOCOLS:
        names = [f"{protocol}_{metric}" for metric in SHOWN if metric in METRICS]
        print(f"\n{protocol:<24}" + "".join(f"{name.removeprefix(protocol + '_'):>11}" for name in names))
        for row in (row for row in rows if row["system"] == systems[0]):
            print(f"{row['patient']:<12}{row['system']:<12}" + _cells([row.get(name) for name in names]))
        for system in systems:
            summary = summarize([row for row in rows if row["system"] == system])
            print(f"{'mean':<12}{system:<12}" + _cells([summary.get(name, {}).get("mean") for name in names]))


def _cells(values: Sequence[float | None]) -> str:
    return "".join(f"{'not def.':>11}" if v is None or np.isnan(v) else f"{v:>11.3f}" for v in values)
