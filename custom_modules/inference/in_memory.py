"""Synthesis of one volume from memory to memory, by the same workflow as from file to file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import Compose

from custom_modules.data.inputs import find_volumes
from custom_modules.data.volumes import NIFTI_UNITS, SaveVolumed, volume_from
from custom_modules.errors import InputError, cause
from custom_modules.inference.workflow import inference_workflow


class SyntheticCT(NamedTuple):
    """What :func:`synthesize` returns.

    Attributes:
        hu: int16 HU on the grid of the MR.
        sd: standard deviation of the samples, float32 HU, on the same grid; None for one sample.
        warnings: in what the MR is unlike the training MRs, a line each.
    """

    hu: nib.Nifti1Image
    sd: nib.Nifti1Image | None
    warnings: list[str]


def synthesize(
    mr: Any,
    *,
    spacing: Sequence[float] | None = None,
    affine: Any = None,
    device: str | None = None,
    seed: int = 0,
    num_samples: int = 1,
    **settings: Any,
) -> SyntheticCT:
    """Return the synthetic CT of one MR. The network is loaded by the first call and kept.

    Args:
        mr: an array (D, H, W), a NiBabel image, or the path of a volume or a DICOM series.
        spacing: of an array, mm; its axes then go to the right, to the front and up (RAS).
        affine: of an array, 4 x 4, from voxels to RAS mm; instead of ``spacing``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; a GPU if there is one when None.
        seed: of the noise.
        num_samples: with two or more, their standard deviation too.
        settings: others of ``configs/inference.yaml``.

    Raises:
        InputError: a ValueError whose message is one line, for an MR, a setting or weights that cannot be used.
    """
    item = {"image": _image(mr, spacing, affine), "output": "sct.nii.gz"}
    if device is not None:
        settings["device"] = device
    workflow = inference_workflow(
        keep_network=True, seed=seed, num_samples=num_samples, quiet=settings.pop("quiet", True),
        **{"dataset#data": [item], **settings},
    )  # fmt: skip
    return _run(workflow)


def _run(workflow: ConfigWorkflow) -> SyntheticCT:
    """Run the evaluator of a workflow, which keeps instead of writing."""
    evaluator = workflow.parser.get_parsed_content("evaluator")
    steps = Compose([step for step in evaluator.finish.transforms if not isinstance(step, SaveVolumed)])
    made: dict[str, Any] = {}

    def keep_findings(name: str, output: str, findings: Mapping[str, Any] | None, seconds: float) -> None:
        made["warnings"] = list((findings or {}).get("warnings", []))

    evaluator.finish, evaluator.sidecar = lambda item: made.update(steps(item)), keep_findings
    evaluator.run()
    if evaluator.errors:
        raise cause(evaluator.errors[0])
    affine = np.asarray(made["image"].meta["source_affine"])
    hu, sd = (made.get(key) for key in ("pred", "sd"))
    return SyntheticCT(_nifti(hu, affine), None if sd is None else _nifti(sd, affine), made["warnings"])


def _nifti(volume: MetaTensor, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(np.asarray(volume)[0], affine)
    image.header.set_xyzt_units("mm")
    return image


def _image(mr: Any, spacing: Sequence[float] | None, affine: Any) -> MetaTensor | str:
    """Return an MR as the pipeline takes it: a checked volume in memory, or the address of one."""
    if (isinstance(mr, (str, Path)) or hasattr(mr, "affine")) and (spacing is not None or affine is not None):
        raise InputError("spacing and affine are for arrays; a file or an image has its own")
    if isinstance(mr, (str, Path)):
        found = find_volumes(str(mr))
        if len(found) > 1:
            raise InputError(f"{mr}: holds {len(found)} volumes; give the path of one")
        return found[0]["image"]
    if isinstance(mr, nib.spatialimages.SpatialImage):
        grid, units = np.array(mr.affine, dtype=np.float64), getattr(mr.header, "get_xyzt_units", lambda: ("mm",))()
        grid[:3] *= NIFTI_UNITS.get(units[0], 1.0)
        return volume_from(np.asanyarray(mr.dataobj), grid, {"filename_or_obj": mr.get_filename() or "the image"})
    array = np.asarray(mr)
    if array.dtype == object or array.dtype.kind in "USO":
        raise InputError(f"{type(mr).__name__} is no MR; give an array, a NiBabel image or a path")
    return volume_from(array, _grid(spacing, affine), {"filename_or_obj": "the array"})


def _grid(spacing: Sequence[float] | None, affine: Any) -> np.ndarray:
    """Return the affine of an array.

    Raises:
        InputError: unless exactly one of both is given, in the right shape.
    """
    if (spacing is None) == (affine is None):
        raise InputError("an array needs its grid: give spacing=(x, y, z) in mm, or affine=, 4 x 4, voxels to RAS mm")
    try:
        grid = np.diag([*map(float, spacing), 1.0]) if spacing is not None else np.array(affine, dtype=np.float64)
    except (TypeError, ValueError):
        grid = np.empty(0)
    if grid.shape != (4, 4):
        raise InputError("spacing must be three numbers in mm, affine 4 x 4 numbers")
    return grid
