"""Registration of the CT to the MR: rigid, then B-spline, by mutual information with Elastix (Klein et al. 2010)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from monai.transforms import SpatialCrop
from scipy import ndimage

from custom_modules.data.body import body_mask, ct_tissue_mask, fill_cavities
from custom_modules.data.hu import AIR_HU
from custom_modules.errors import InputError
from custom_modules.evaluation.metrics import dice

PARAMETERS = Path(__file__).parent / "elastix"
STAGES = ("none", "rigid", "bspline")
UNCOVERED = -32768.0  # DefaultPixelValue of the parameter maps
SURROUND = 12.0  # mm of air around the body that the measures of an alignment include
LEAST_OVERLAP = 0.1  # of the MR's body that the CT must cover
NO_OVERLAP = "MR and CT do not overlap: the CT covers {:.0%} of the MR's body in scanner coordinates"
BINS = 64
SEEN_AIR = 4.0  # mm around the body that the metric samples: enough for its outline, with most samples in tissue
SEEN_HU = (-300.0, 600.0)  # range of the metric's bins, so that fat and muscle are in separate bins
SEEN_MR = 99.5  # percentile in the body to which the MR is clipped; vessels may be much brighter than the rest
OUTLINE = (0.25, 0.5)  # threshold and smoothing of body_mask: tight, while the mask for cropping is generous


@dataclass(frozen=True)
class Alignment:
    """A CT on the grid of its MR.

    Attributes:
        stage: kind of the registration: ``none`` (scanner coordinates), ``rigid`` or ``bspline``.
        ct: (1, D, H, W) HU, air beyond the field of view of the CT.
        covered: (D, H, W), mask of that field of view.
        transform: Elastix' parameter maps, from points of the MR to points of the CT.
    """

    stage: str
    ct: MetaTensor
    covered: np.ndarray
    transform: Any


def register(
    mr: MetaTensor, ct: MetaTensor, body: np.ndarray, stage: str = "bspline", parameters: str | Path = PARAMETERS
) -> dict[str, Alignment]:
    """Register ``ct`` (HU, any grid) to ``mr``, both (1, D, H, W).

    Args:
        body: (D, H, W) mask of the MR's body.
        stage: the last one of :data:`STAGES` to run.
        parameters: folder of the parameter maps ``rigid.txt`` and ``bspline.txt``.

    Returns:
        An :class:`Alignment` for each stage, ``none`` first; each is a single linear interpolation of ``ct``.

    Raises:
        InputError: when the CT covers less than a tenth of the body, or Elastix cannot register them.
    """
    fixed, moving = (metatensor_to_itk_image(volume, channel_dim=0) for volume in (mr, ct))
    before = _align("none", _identity(fixed), moving, mr)
    overlap = before.covered[body].mean()
    if overlap < LEAST_OVERLAP:
        raise InputError(NO_OVERLAP.format(overlap))
    alignments = {"none": before}
    maps = STAGES[1 : STAGES.index(stage) + 1]
    if maps:
        files = [Path(parameters, f"{name}.txt") for name in maps]
        seen = mr.clamp(max=float(np.percentile(np.asarray(mr[0])[body], SEEN_MR))), ct.clamp(*SEEN_HU)
        seen_mr, seen_ct = (metatensor_to_itk_image(volume, channel_dim=0) for volume in seen)
        found = _elastix(seen_mr, seen_ct, _mask_image(surround(body, mr, SEEN_AIR), mr), files)
        for number, name in enumerate(maps, start=1):
            transform = itk.ParameterObject.New()
            for n in range(number):
                transform.AddParameterMap(found.GetParameterMap(n))
            alignments[name] = _align(name, transform, moving, mr)
    return alignments


def crop_around(ct: MetaTensor, mr: MetaTensor, margin: float = 60.0) -> MetaTensor:
    """Crop ``ct`` to what is within ``margin`` mm of the bounding box of ``mr``, both (1, D, H, W) on any grids.

    Raises:
        InputError: when nothing is left.
    """
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(mr.shape[1:]) - 1)
    to_ct = np.linalg.inv(ct.affine) @ np.asarray(mr.affine)
    points = nib.affines.apply_affine(to_ct, corners)
    reach = margin / np.asarray(ct.pixdim)
    start = np.floor(np.maximum(points.min(0) - reach, 0) + 1e-3).astype(int)  # tolerance for rounded headers
    end = np.ceil(np.minimum(points.max(0) + reach + 1, ct.shape[1:]) - 1e-3).astype(int)
    if (end - start < 2).any():
        raise InputError(NO_OVERLAP.format(0))
    return SpatialCrop(roi_start=start.tolist(), roi_end=end.tolist())(ct)


def _elastix(fixed: Any, moving: Any, mask: Any, files: Sequence[Path]) -> Any:
    parameters = itk.ParameterObject.New()
    for file in files:
        parameters.AddParameterFile(str(file))
    method = itk.ElastixRegistrationMethod.New(fixed, moving)
    method.SetFixedMask(mask)
    method.SetParameterObject(parameters)
    method.SetLogToConsole(False)
    method.SetNumberOfThreads(1)
    try:
        method.UpdateLargestPossibleRegion()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"MR and CT cannot be registered ({reason[:160]})") from error
    return method.GetTransformParameterObject()


def _identity(fixed: Any) -> Any:
    """Return the identity transform of scanner coordinates, on the grid of ``fixed``."""
    transform = itk.ParameterObject.New()
    transform.AddParameterMap({
        "Transform": ["TranslationTransform"],
        "NumberOfParameters": ["3"],
        "TransformParameters": ["0", "0", "0"],
        "InitialTransformParameterFileName": ["NoInitialTransform"],
        "HowToCombineTransforms": ["Compose"],
        "FixedImageDimension": ["3"],
        "MovingImageDimension": ["3"],
        "FixedInternalImagePixelType": ["float"],
        "MovingInternalImagePixelType": ["float"],
        **_grid(fixed),
        "Resampler": ["DefaultResampler"],
        "ResampleInterpolator": ["FinalLinearInterpolator"],
        "DefaultPixelValue": [str(UNCOVERED)],
        "ResultImagePixelType": ["float"],
    })  # fmt: skip
    return transform


def _grid(image: Any) -> dict[str, list[str]]:
    """Return the grid of ``image`` as in the parameter map of a transform."""
    return {
        "Size": [str(n) for n in itk.size(image)],
        "Index": ["0", "0", "0"],
        "Spacing": [repr(float(s)) for s in itk.spacing(image)],
        "Origin": [repr(float(o)) for o in itk.origin(image)],
        "Direction": [repr(float(d)) for d in itk.array_from_matrix(image.GetDirection()).T.ravel()],
        "UseDirectionCosines": ["true"],
    }


def on_grid(alignment: Alignment, ct: MetaTensor, grid: MetaTensor) -> Alignment:
    """Resample ``ct`` by ``alignment`` on another grid of the MR, such as the one on which it was scanned."""
    transform = itk.ParameterObject.New()
    for number in range(alignment.transform.GetNumberOfParameterMaps()):
        texts = dict(alignment.transform.GetParameterMap(number))
        transform.AddParameterMap({**texts, **_grid(metatensor_to_itk_image(grid, channel_dim=0))})
    return _align(alignment.stage, transform, metatensor_to_itk_image(ct, channel_dim=0), grid)


def _transformix(transform: Any, moving: Any) -> Any:
    method = itk.TransformixFilter.New(moving)
    method.SetTransformParameterObject(transform)
    method.SetLogToConsole(False)
    return method


def _align(stage: str, transform: Any, moving: Any, mr: MetaTensor) -> Alignment:
    method = _transformix(transform, moving)
    method.UpdateLargestPossibleRegion()
    hu = np.ascontiguousarray(itk.array_view_from_image(method.GetOutput()).transpose(2, 1, 0))
    covered = hu > UNCOVERED / 2
    ct = torch.from_numpy(np.where(covered, hu, np.float32(AIR_HU)))
    return Alignment(stage, MetaTensor(ct[None], affine=mr.affine), covered, transform)


def displacement(transform: Any, moving: Any) -> np.ndarray:
    """Return the displacement of each point of the MR's grid by ``transform``, (3, D, H, W) in RAS mm."""
    method = _transformix(transform, moving)
    method.ComputeDeformationFieldOn()
    with tempfile.TemporaryDirectory() as folder:  # transformix writes the field to a file too
        method.SetOutputDirectory(folder)
        method.UpdateLargestPossibleRegion()
    field = itk.array_view_from_image(method.GetOutputDeformationField()).transpose(3, 2, 1, 0)
    return field * np.array([-1, -1, 1], dtype=np.float32).reshape(3, 1, 1, 1)


def _mask_image(mask: np.ndarray, like: MetaTensor) -> Any:
    return metatensor_to_itk_image(MetaTensor(torch.from_numpy(mask)[None], affine=like.affine), dtype=np.uint8)


def surround(body: np.ndarray, like: MetaTensor, reach: float = SURROUND) -> np.ndarray:
    """Widen ``body`` by ``reach`` mm, so that it includes its outline."""
    return ndimage.distance_transform_edt(~body, sampling=np.asarray(like.pixdim)) <= reach


def mutual_information(mr: np.ndarray, ct: np.ndarray, mask: np.ndarray) -> float:
    """Mutual information of MR and CT over ``mask`` in nats, from a histogram of 64 x 64 bins between percentiles 0.5
    and 99.5; NaN if the mask is empty."""
    if not mask.any():
        return float("nan")
    a, b = (np.clip(v[mask], *np.percentile(v[mask], (0.5, 99.5))) for v in (mr, ct))
    joint, _, _ = np.histogram2d(a, b, bins=BINS)
    joint /= joint.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / product[filled])).sum())


def body_dice(mr: np.ndarray, ct: np.ndarray, region: np.ndarray) -> float:
    """Overlap within ``region`` of the bodies in MR and CT (HU), both outlined about where they are half air."""
    outlines = body_mask(mr, *OUTLINE), fill_cavities(ct_tissue_mask(ct), upright=True)
    return dice(*(outline & region for outline in outlines))


def measure(alignments: Mapping[str, Alignment], mr: MetaTensor, body: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute body Dice and mutual information of each alignment over the same voxels: those in and around the body
    that the CT covers in all alignments."""
    region = surround(body, mr)
    for alignment in alignments.values():
        region = region & alignment.covered
    pairs = {stage: (np.asarray(mr[0]), np.asarray(alignment.ct[0])) for stage, alignment in alignments.items()}
    measures = {"dice": body_dice, "mutual_information": mutual_information}
    return {stage: {name: of(*pair, region) for name, of in measures.items()} for stage, pair in pairs.items()}


def measure_motion(
    alignments: Mapping[str, Alignment], stage: str, ct: MetaTensor, body: np.ndarray
) -> dict[str, float]:
    """Measure how far ``stage`` moved the CT: median rigid shift and largest further deformation in mm, and the
    fraction of the body that is folded (Jacobian determinant <= 0)."""
    motion = {"shift": 0.0, "deformation": 0.0, "folded": 0.0}
    if stage == "none":
        return motion
    moving = metatensor_to_itk_image(ct, channel_dim=0)
    rigid = displacement(alignments["rigid"].transform, moving)[:, body]
    motion["shift"] = float(np.median(np.linalg.norm(rigid, axis=0)))
    if stage == "bspline":
        transform = alignments["bspline"].transform
        rigid -= displacement(transform, moving)[:, body]
        motion["deformation"] = float(np.linalg.norm(rigid, axis=0).max())
        motion["folded"] = float((jacobian(transform, moving)[body] <= 0).mean())
    return motion


def jacobian(transform: Any, moving: Any) -> np.ndarray:
    """Return the determinant of the transform's spatial Jacobian on the MR's grid, (D, H, W): 1 preserves volume, <= 0
    folds."""
    method = _transformix(transform, moving)
    method.ComputeDeterminantOfSpatialJacobianOn()
    with tempfile.TemporaryDirectory() as folder:
        method.SetOutputDirectory(folder)
        method.UpdateLargestPossibleRegion()
        determinant = method.ComputeSpatialJacobianDeterminantImage()
    return itk.array_view_from_image(determinant).transpose(2, 1, 0)
