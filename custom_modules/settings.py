"""The settings of the configs: one table of their types, ranges and meaning, and the check that runs first.

Defaults are in the configs. The table is used by the check, ``--help`` and the label app.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from custom_modules.errors import InputError

if TYPE_CHECKING:
    pass

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
KINDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text",
    "device": "cpu, cuda or cuda:N", "ints": "whole numbers", "floats": "numbers",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The type of a setting and its allowed values.

    Attributes:
        kind: a key of :data:`KINDS`.
        help: one line of description.
        low, high: bounds of a number, or of each number in a list.
        size: length of a list.
        choices: allowed texts.
        nullable: whether null is allowed.
        changes_result: whether another value can give another synthetic CT, so that a finished one has to be made
            again.
        increasing: whether the numbers of a list must increase, as those of a window do.
    """

    kind: str
    help: str
    low: float = -math.inf
    high: float = math.inf
    size: int = 3
    choices: tuple[str, ...] = ()
    nullable: bool = False
    changes_result: bool = False
    increasing: bool = False

    @property
    def allowed(self) -> str:
        """Description of the allowed values."""
        text = f"one of {', '.join(self.choices)}" if self.choices else KINDS[self.kind]
        if self.kind in ("ints", "floats"):
            text = f"{self.size} {'increasing ' if self.increasing else ''}{text}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            text += f" from {_text(self.low)} to {_text(self.high)}"
        elif math.isfinite(self.low):
            text += f" of at least {_text(self.low)}"
        return text + (", or null" if self.nullable else "")

    def parse(self, name: str, value: Any) -> Any:
        """Convert ``value``, which may be text from a command line, to the type of the setting.

        Raises:
            InputError: for a value that is not allowed.
        """
        if value is None or (
            isinstance(value, str) and value.lower() in ("null", "none") and value not in self.choices
        ):
            if self.nullable:
                return None
            raise InputError(f"--{name} {value}: must be {self.allowed}")
        if isinstance(value, str) and not value.strip():
            raise InputError(f"--{name}: is empty; give {self.allowed}")
        try:
            return self._check(self._convert(value))
        except InputError:
            raise
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"--{name} {value}: must be {self.allowed}") from None

    def _convert(self, value: Any) -> Any:
        if self.kind == "bool":
            return parse_bool(value)
        if self.kind in ("ints", "floats"):
            items = json.loads(value) if isinstance(value, str) else value
            return [number(item, self.kind == "ints") for item in items]
        if self.kind in ("int", "float"):
            return number(value, self.kind == "int")
        if self.kind == "device":
            return check_device(str(value))
        return str(value)

    def _check(self, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value] if isinstance(value, (int, float)) else []
        if not all(self.low <= item <= self.high for item in numbers):
            raise ValueError
        if isinstance(value, list) and (len(value) != self.size or (self.increasing and value != sorted(set(value)))):
            raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        return value


def _text(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def parse_bool(value: Any) -> bool:
    """Convert true or false as written in Python, YAML or on a command line.

    Raises:
        ValueError: for anything else.
    """
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ValueError(f"{value} is neither true nor false")
    return text in TRUE


def number(value: Any, whole: bool) -> int | float:
    """Convert a number or a text to a finite number.

    Raises:
        ValueError: for anything else; with ``whole`` also for a fraction.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    found = float(value)
    if not math.isfinite(found) or (whole and found != int(found)):
        raise ValueError(f"{value} is not a finite number")
    return int(value) if whole and isinstance(value, int) else int(found) if whole else found


def check_device(device: str) -> str:
    """Return ``device`` if PyTorch can use it.

    Raises:
        InputError: for a CUDA device that this machine does not have.
        ValueError: for an unknown or unsupported device.
    """
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{device} is not a device") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{device} is not supported")
    return device


def _on(kind: str, help: str, **rules: Any) -> Setting:
    """Make a setting that changes the synthetic CT."""
    return Setting(kind, help, changes_result=True, **rules)


MANY = 2**31 - 1
WEIGHTS = "stored with the weights, which cannot be used with another value"

SETTINGS: dict[str, Setting] = {
    # paths and the machine
    "dataset_dir": Setting(
        "str", "input: a volume, a folder of volumes or DICOM series, or for training the folder of the datalist"
    ),
    "datalist": Setting("str", "MONAI datalist; image is the MR, label the CT"),
    "output_dir": Setting("str", "folder for the results"),
    "checkpoint": Setting("str", "weights"),
    "autoencoder_checkpoint": Setting("str", "weights of stage 1"),
    "initial_checkpoint": Setting("str", "weights that fine-tuning starts from"),
    "best_weights": Setting("str", "file name in output_dir of the weights of the best validation"),
    "device": Setting("device", "GPU if there is one, else CPU"),
    "memory_limit": Setting("float", "GiB that the process may use; null: what is free", low=0.1, nullable=True),
    "compile": Setting("bool", "torch.compile of the networks: worthwhile on a GPU or for many volumes"),
    "amp": _on("bool", "bfloat16 in the denoiser, in training in all networks"),
    "seed": _on("int", "of the noise and, in training, of everything random", low=0, high=2**32 - 1),
    # inference
    "resume": Setting("bool", "keep finished volumes; in training, continue from the newest checkpoint"),
    "quiet": Setting("bool", "print warnings and errors only"),
    "verbose": Setting("bool", "print the lines of MONAI and Ignite, and a bar for the tiles of each volume"),
    "strict": Setting("bool", "refuse an MR that is unlike the training MRs instead of warning"),
    "guard_statistics": Setting("str", "statistics of the training MRs; null: inputs are not compared", nullable=True),
    "calibration": Setting("str", "of bone and SD, stored with the weights; null: unchanged", nullable=True),
    "allow_ct": Setting("bool", "accept a CT, or DICOM of another modality, as the MR"),
    "series": Setting(
        "str", "take only the DICOM series of this UID, number or description (a shell pattern)", nullable=True
    ),
    "pattern": Setting("str", "take only the files of this name or path (a shell pattern)", nullable=True),
    "output_format": Setting(
        "str", "of the synthetic CT: mr, that of the MR; nifti; dicom; both", choices=("mr", "nifti", "dicom", "both")
    ),
    "crop_above_shoulders": _on("bool", "leave out head and neck, as the paper does"),
    "correct_bias": _on("bool", "divide the MR by the bias field of the coils, found by N4"),
    "output": _on("str", "the estimate, or the first sample", choices=("mean", "sample")),
    "num_inference_steps": _on("int", "DDIM steps of the estimate", low=1, high=1000),
    "num_samples": _on("int", "samples per volume; with 2 or more their SD is written too", low=1, high=64),
    "sample_steps": _on("int", "DDIM steps of each sample", low=1, high=1000),
    "sample_timestep": _on(
        "int", "where samples start, the estimate with noise of it; null: noise alone", low=1, high=999, nullable=True
    ),
    "sampling": _on(
        "str", "one latent for the patient, or windows sampled one by one and blended", choices=("whole", "windows")
    ),
    "window_size": _on("ints", "voxels of the windows of sampling: windows", low=1, high=4096),
    "overlap": _on("float", "share of a window that neighbours have in common", low=0, high=0.95),
    "margin": _on("int", "voxels added on each side by replicating the edge", low=0, high=256),
    "tile_voxels": _on("int", "voxels of the largest tile that is encoded or decoded at once", low=4096, high=MANY),
    "halo": _on("int", "voxels computed around each tile", low=0, high=512),
    "sw_batch_size": Setting("int", "windows computed at once; null: by free memory", low=1, high=1024, nullable=True),
    # what the weights depend on
    "spacing": _on("floats", f"mm, of the grid of the networks; {WEIGHTS}", low=0.1, high=20),
    "mr_window": _on("floats", f"standardised MR units that become [-1, 1]; {WEIGHTS}", size=2, increasing=True),
    "mr_reference": _on("float", f"value to which the 99th percentile of an MR is scaled; {WEIGHTS}", low=1e-3),
    "hu_window": _on("floats", f"HU that become [-1, 1]; {WEIGHTS}", size=2, increasing=True),
    "attention_window": _on("int", f"voxels along each side of the denoiser's attention; {WEIGHTS}", low=4, high=1024),
    "group_width": Setting(
        "int", "channels of each group in the convolutions of the wavelet blocks; 1: depthwise", low=1, high=1024
    ),
    # training
    "roi_size": Setting("ints", "voxels of a training crop", low=1, high=1024),
    "check_data": Setting("bool", "read every volume before training and refuse pairs that cannot be used"),
    "batch_size": Setting("int", "patients per batch", low=1, high=1024),
    "cuda_graph": Setting("bool", "on a GPU, replay the steps of training as a CUDA graph"),
    "distinct_patients": Setting("bool", "in training, no patient twice in a batch"),
    "accumulation": Setting("int", "batches per optimiser step", low=1, high=1024),
    "augmented_copies": Setting("int", "copies of each patient, encoded before stage 2", low=1, high=1000),
    "renewed_copies": Setting("int", "of these copies, replaced by new ones in each epoch", low=0, high=1000),
    "steps_per_epoch": Setting("int", "optimiser steps per epoch", low=1, high=MANY),
    "max_epochs": Setting("int", "epochs", low=1, high=MANY),
    "val_interval": Setting("int", "epochs between validations", low=1, high=MANY),
    "checkpoint_interval": Setting("int", "iterations between checkpoints", low=1, high=MANY),
    "log_interval": Setting("int", "iterations between entries for TensorBoard", low=1, high=MANY),
    "learning_rate": Setting("float", "of Adam, after the warm-up", low=1e-8, high=1),
    "ema_decay": Setting("float", "of the moving average of the weights, per step", low=0, high=0.999999),
    "image_weight": Setting("float", "of the L1 between decoded estimate and CT; 0 leaves it out", low=0),
    "workers": Setting("int", "processes that read and augment", low=1, high=256),
    "bone_weight": Setting("float", "of voxels of bone in that L1", low=0),
    "latent_weight": Setting("float", "of the latent diffusion loss (Eq. 12)", low=0),
    "last_timestep_share": Setting("float", "of the crops, at the timestep where sampling starts", low=0, high=1),
    "sample_share": Setting("float", "of the crops, which train samples, too", low=0, high=1),
    "train_encoder": Setting("bool", "stage 2 trains the encoder of the MR, too"),
    "unpaired_share": Setting("float", "of the crops, from CTs without an MR (whole_body.yaml)", low=0, high=1),
    "simulated_share": Setting("float", "of the copies of pairs, with a simulated MR (whole_body.yaml)", low=0, high=1),
    "largest": Setting("ints", "voxels of the part of a volume that is simulated at once", low=16, high=4096),
    "kl_weight": Setting("float", "alpha of Eq. 8", low=0),
    "disentanglement_weight": Setting("float", "beta of Eq. 8", low=0),
    "pooled_modality": Setting("bool", "L_D compares M as a whole, not voxel by voxel"),
    "adversarial_weight": Setting("float", "gamma of Eq. 8", low=0),
    "adversarial_warmup": Setting("int", "iterations without the adversarial term", low=0, high=MANY),
    "minutes": Setting("float", "wall time of a training in a comparison (equal_time.yaml)", low=1e-3),
    "validations": Setting("int", "validations within that time", low=1, high=1000),
    "patience": Setting("int", "validations without improvement that end it; null: no limit", low=1, nullable=True),
    # evaluation
    "split": Setting("str", "split of the datalist"),
    "pred_dir": Setting("str", "folder of finished synthetic CTs; null: synthesise them", nullable=True),
}  # fmt: skip


# of `prepare`, whose defaults stand in its dataclasses
PREPARATION: dict[str, Setting] = {
    "mr": Setting("str", "shell pattern that names the MR in a patient's folder", nullable=True),
    "ct": Setting("str", "shell pattern that names the CT in a patient's folder", nullable=True),
    "spacing": Setting("float", "mm, of the output", low=0.1, high=20),
    "hu_window": Setting("floats", "HU that the CT is clipped to", size=2, increasing=True),
    "registration": Setting("str", "the last step to take", choices=("none", "rigid", "bspline")),
    "parameters": Setting("str", "folder of Elastix' parameter maps"),
    "bias_correction": Setting("bool", "N4 of the MR"),
    "crop_above_shoulders": Setting("bool", "leave out head and neck, as the paper does"),
    "unpaired": Setting("bool", "patients may have a CT alone, for training on simulated MRs"),
    "remove_contrast": Setting("bool", "take contrast medium out of CTs alone: organs, heart, great vessels"),
    "test": Setting("float", "share of the patients", low=0, high=1),
    "validation": Setting("float", "share of the patients", low=0, high=1),
    "seed": Setting("int", "of the split", low=0, high=2**32 - 1),
    "min_dice": Setting("float", "of the two bodies", low=0, high=1),
    "min_mutual_information": Setting("float", "nats", low=0),
    "max_deformation": Setting("float", "mm beyond the rigid motion", low=0),
    "max_folded": Setting("float", "share of the body", low=0, high=1),
    "min_covered": Setting("float", "share of the MR's body that the CT covers", low=0, high=1),
}


def parse_settings(values: Mapping[str, Any], table: Mapping[str, Setting]) -> dict[str, Any]:
    """``values`` in the types of a table.

    Raises:
        InputError: for a name that is not in the table, or a value that is not allowed.
    """
    for name in values:
        if name not in table:
            raise InputError(f"no setting '{name}'{suggestion(name, table)}")
    return {name: table[name].parse(name, value) for name, value in values.items()}


def suggestion(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(sorted(names))}"
