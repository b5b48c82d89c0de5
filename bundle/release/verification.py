"""Checks that a packaged bundle must pass on its own: this file runs in the unpacked archive and imports nothing of the
repository.

    cd UNPACKED && python -E -P .../bundle/release/verification.py DATA SCRATCH [SCHEMA]
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, cast

PARTS = ("LICENSE", "configs", "custom_modules", "docs", "models")
LIMIT = 25 * 10**6  # bytes; the model zoo accepts no larger file
REQUIRED = (
    "schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
    "task", "description", "authors", "copyright", "data_source", "intended_use", "eval_metrics",
)  # fmt: skip
TENSOR = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range")
INFERENCE, METADATA = "configs/inference.yaml", "configs/metadata.json"
# one step of each stage, with networks of full size; in single precision, because bfloat16 gradients of crops this
# small can be NaN on CPUs with AMX
STEP = {
    "roi_size": [32, 32, 32], "amp": False, "batch_size": 2, "steps_per_epoch": 1, "max_epochs": 1, "val_interval": 1,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "train+train_autoencoder": {"adversarial_warmup": 0},
    "train": {"augmented_copies": 1, "autoencoder_checkpoint": "train+train_autoencoder/autoencoder.pt"},
    "train+finetune": {"augmented_copies": 1, "initial_checkpoint": "train/model.pt"},
}
WORKFLOWS = ("inference", "train", "train+train_autoencoder", "train+finetune", "train+evaluate")


class Failure(Exception):
    """A check failed; the message is one line."""


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def check_contents(root: Path) -> str:
    """Check that there are the parts of a bundle and nothing else, and no file above the limit of the model zoo."""
    parts = sorted(path.name for path in root.iterdir())
    if parts != sorted(PARTS):
        raise Failure(f"holds {', '.join(parts)}; it should be {', '.join(PARTS)}")
    for path in files(root):
        if path.stat().st_size > LIMIT:
            size = path.stat().st_size / 1e6
            raise Failure(f"{path.relative_to(root)} has {size:.1f} MB, the model zoo accepts {LIMIT / 1e6:.0f}")
    return f"{len(files(root))} files, the largest {max(p.stat().st_size for p in files(root)) / 1e6:.1f} MB"


def check_weights(root: Path) -> str:
    """Check that ``models/model.pt`` has the recorded SHA-256, which the statistics made with it also name, and that no
    ``.pt`` has a shorter name, which MONAI Label would load instead."""
    models = root / "models"
    digest = hashlib.sha256((models / "model.pt").read_bytes()).hexdigest()
    recorded = {"models/model.pt.sha256": (models / "model.pt.sha256").read_text().split()[0]}
    for path in sorted(models.glob("*.json")):
        recorded[f"models/{path.name}"] = json.loads(path.read_text())["model_sha256"]
    for name, other in recorded.items():
        if other != digest:
            raise Failure(f"models/model.pt has SHA-256 {digest[:12]}..., {name} says {other[:12]}...")
    for path in models.glob("*.pt"):
        if path.name != "model.pt" and len(path.name) <= len("model.pt"):
            raise Failure(f"models/{path.name} is not longer than model.pt: MONAI Label would load it")
    return f"SHA-256 {digest[:12]}..."


def check_metadata(root: Path, schema: Path | None, scratch: Path) -> str:
    """Check ``metadata.json`` against its schema: ``schema``, or the one at the address in the metadata. If that is not
    available, only the keys that MONAI's schema and the model zoo require are checked, and the result says so."""
    from monai.bundle import verify_metadata

    metadata = json.loads((root / METADATA).read_text())
    missing = [key for key in REQUIRED if key not in metadata]
    formats = metadata.get("network_data_format", {})
    for path in (("inputs", "image"), ("outputs", "pred"), ("post_processed_outputs", "pred")):
        tensor = formats.get(path[0], {}).get(path[1], {})
        missing += ["#".join(("network_data_format", *path, key)) for key in TENSOR if key not in tensor]
    if missing:
        raise Failure(f"configs/metadata.json lacks {', '.join(missing)}")
    if metadata["version"] not in metadata["changelog"]:
        raise Failure(f"configs/metadata.json: version {metadata['version']} is not in its changelog")
    socket.setdefaulttimeout(10)
    fetched = scratch / "schema.json"
    try:
        verify_metadata(meta_file=str(root / METADATA), filepath=str(schema or fetched))
    except OSError as error:  # urllib's too
        if schema is None and not fetched.exists():
            return f"required keys only, its schema is not available: {error}"
        raise
    finally:
        socket.setdefaulttimeout(None)
    return f"by {schema or metadata['schema']}"


def check_data_shape() -> str:
    """Check that ``network_def`` maps a tensor of the documented input to one of the documented output."""
    from monai.bundle import verify_net_in_out

    verify_net_in_out("network_def", meta_file=METADATA, config_file=INFERENCE, device="cpu")
    return ""


def settings_of(name: str, scratch: Path) -> dict[str, Any]:
    """Return the settings of a stage, including the weights that it starts from."""
    own = STAGES.get(name, STAGES["train"] if name.startswith("train+") else {})
    return {key: str(scratch / value) if str(value).endswith(".pt") else value for key, value in own.items()}


def config_files(name: str) -> list[str]:
    return [f"configs/{part}.yaml" for part in name.split("+")]


def check_properties(data: Path, scratch: Path) -> str:
    """Run MONAI's property check of every workflow."""
    from monai.bundle import ConfigWorkflow

    for name in WORKFLOWS:
        workflow = ConfigWorkflow(
            config_files(name), METADATA, None, workflow_type="infer" if name == "inference" else "train",
            dataset_dir=str(data), output_dir=str(scratch / "properties"), device="cpu", **settings_of(name, scratch),
        )  # fmt: skip
        workflow.initialize()
        try:
            wrong = workflow.check_properties()
        except (Exception, SystemExit) as error:
            raise Failure(f"{name}: {error}") from error
        if wrong:
            raise Failure(f"{name}: {', '.join(wrong)}")
    return ", ".join(WORKFLOWS)


def run(name: str, output: Path, **settings: Any) -> None:
    """Run a config, or overlays joined by ``+``, with ``monai.bundle`` on the CPU."""
    import monai.bundle

    monai.bundle.run(config_file=config_files(name), output_dir=str(output), device="$torch.device('cpu')", **settings)


def check_inference(data: Path, scratch: Path) -> str:
    """Synthesise the CT of a phantom with the shipped weights; it must be int16 HU on the grid of the MR."""
    import nibabel as nib
    import numpy as np

    mr = json.loads((data / "datalist.json").read_text())["test"][0]["image"]
    run("inference", scratch / "sct", dataset_dir=str(data / mr))
    paths = data / mr, next((scratch / "sct").glob("*_sct.nii.gz"))
    image, sct = (cast(nib.Nifti1Image, nib.load(path)) for path in paths)
    hu = np.asarray(sct.dataobj)
    if hu.dtype != np.int16 or hu.shape != image.shape or not np.allclose(sct.affine, image.affine):
        raise Failure(f"a synthetic CT of {hu.dtype}, {hu.shape} for an MR of {image.shape}")
    if not hu.min() < 0 < hu.max():
        raise Failure(f"a synthetic CT of {hu.min()} to {hu.max()} HU")
    return f"{hu.shape}, {hu.min()} to {hu.max()} HU"


def check_stage(name: str, data: Path, scratch: Path) -> str:
    """Run one step of a training stage, which must leave weights."""
    run(name, scratch / name, dataset_dir=str(data), **STEP, **settings_of(name, scratch))
    weights = [path.name for path in (scratch / name).glob("*.pt")]
    if not {"autoencoder.pt", "model.pt"} & set(weights):
        raise Failure(f"left no weights, only {weights}")
    return ""


def check_evaluation(data: Path, scratch: Path) -> str:
    """Score a phantom."""
    run("evaluate", scratch / "scores", dataset_dir=str(data), split="test")
    return f"{len((scratch / 'scores' / 'metrics.csv').read_text().splitlines()) - 1} rows"


def check_loading(root: Path) -> str:
    """Check that ``monai.bundle.load`` loads the network with its weights from the unpacked folder."""
    import torch
    from monai.bundle import load

    from custom_modules.networks.synthesizer import Synthesizer
    from custom_modules.networks.weights import read_weights

    network = load(root.name, model=Synthesizer(), bundle_dir=str(root.parent), device="cpu")
    for key, value in read_weights(root / "models" / "model.pt")[0].items():
        if not torch.equal(network.state_dict()[key], value.float()):
            raise Failure(f"{key} differs from models/model.pt")
    return ""


def check_alone(root: Path) -> str:
    """Check that nothing of the repository has been imported."""
    import custom_modules

    if Path(custom_modules.__file__).parents[1] != root or "bundle" in sys.modules:
        raise Failure(f"custom_modules came from {custom_modules.__file__}")
    return ""


def checks(root: Path, data: Path, scratch: Path, schema: Path | None) -> dict[str, Callable[[], str]]:
    """Return the checks by name, the quick ones first."""
    return {
        "contents": lambda: check_contents(root),
        "weights": lambda: check_weights(root),
        "metadata": lambda: check_metadata(root, schema, scratch),
        "data shape of network_def": check_data_shape,
        "load": lambda: check_loading(root),
        "inference on a phantom": lambda: check_inference(data, scratch),
        **{f"a step of {name}": partial(check_stage, name, data, scratch) for name in STAGES},
        "evaluate": lambda: check_evaluation(data, scratch),
        "properties": lambda: check_properties(data, scratch),
        "imports": lambda: check_alone(root),
    }


def main(data: str, scratch: str, schema: str | None = None) -> int:
    """Check the bundle in the working directory: one line per check, and exit status 1 at the first that fails."""
    root = Path.cwd()
    sys.path.insert(0, str(root))  # as `python -m monai.bundle` does
    sys.dont_write_bytecode = True
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, check in checks(root, Path(data), Path(scratch), Path(schema) if schema else None).items():
        started = time.perf_counter()
        try:
            with redirect_stdout(sys.stderr):
                found = check()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"failed: {name}: {reason[:400]}", flush=True)
            return 1
        print(f"  {name:<28}{time.perf_counter() - started:5.1f} s  {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
