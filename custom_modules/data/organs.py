"""Label volumes of organs: their classes, the names of these, and the tissue that each is of."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from nibabel.filebasedimages import ImageFileError
from scipy import ndimage

from custom_modules.data.volumes import read_volume
from custom_modules.errors import InputError

MUSCLES = ("muscle", "gluteus", "autochthon", "iliopsoas", "quadriceps", "sartorius", "thigh")
BONES = (
    "vertebra", "sacrum", "rib_", "hip_", "femur", "humerus", "scapula", "clavicula", "sternum", "skull", "patella",
    "tibia", "fibula", "tarsal", "radius", "ulna", "carpal",
)  # fmt: skip
# the tissues that data/simulation.py knows, and words in the names of their TotalSegmentator classes; air and fat show
# in the HU
TISSUE_WORDS: dict[str, tuple[str, ...]] = {
    "fluid": ("bladder", "cyst"), "liver": ("liver",), "spleen": ("spleen",), "kidney": ("kidney",),
    "pancreas": ("pancreas",), "blood": ("aorta", "vena", "vein", "artery", "trunk", "heart", "atri", "ventricle"),
    "brain": ("brain", "spinal_cord"), "muscle": MUSCLES,
    "marrow": BONES,
}  # fmt: skip


def read_labels(path: str | Path) -> MetaTensor:
    """Read a label volume.

    Raises:
        InputError: for values that are not whole numbers of at least 0.
    """
    volume = read_volume(path)
    values = np.asarray(volume)
    if values.min() < 0 or (values != values.round()).any():
        raise InputError(f"{path}: not a label volume, its values are not whole numbers of at least 0")
    return volume


def class_names(path: str | Path) -> dict[int, str]:
    """Read the names of the classes from the header of a label volume, where TotalSegmentator stores them; empty if it
    has none."""
    names: dict[int, str] = {}
    try:
        for extension in nib.load(path).header.extensions:  # type: ignore[attr-defined]
            text = bytes(extension.get_content()).strip(b"\0 \n")
            if text.startswith(b"<?xml"):  # of Caret (Connectome Workbench)
                found = ElementTree.fromstring(text).iter("Label")
                names |= {int(label.attrib["Key"]): (label.text or "").strip() for label in found}
    except (AttributeError, TypeError, ValueError, KeyError, ElementTree.ParseError, ImageFileError):
        pass
    return names


def organ_tissues(path: str | Path, ct: MetaTensor) -> np.ndarray:
    """Return of which tissue the organs of a label volume are, (D, H, W) on the grid of a CT (1, D, H, W): its place in
    :data:`TISSUE_WORDS` plus one; 0 where there is no organ, or one of none of these tissues.

    Raises:
        InputError: for a volume that is not of labels, or has classes without a name in its header.
    """
    volume = read_labels(path)
    labels, names = np.asarray(volume[0]).astype(int), class_names(path)
    unknown = sorted(set(np.unique(labels).tolist()) - {0, *names})
    if unknown:
        raise InputError(f"{path}: no name for class {', '.join(map(str, unknown))} in its header")
    table = np.zeros(int(labels.max()) + 1, dtype=np.uint8)
    for label in range(1, len(table)):
        words = enumerate(TISSUE_WORDS.values(), start=1)
        table[label] = next((n for n, some in words if any(word in names.get(label, "").lower() for word in some)), 0)
    to_labels = np.linalg.inv(np.asarray(volume.affine)) @ np.asarray(ct.affine)
    return ndimage.affine_transform(
        table[labels], to_labels[:3, :3], to_labels[:3, 3], output_shape=tuple(ct.shape[1:]), order=0
    )
