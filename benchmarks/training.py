"""Steps per second, peak memory and the share of time that data loading takes, of each training stage at several crop
sizes.

    python benchmarks/training.py [--dataset_dir DIR] [--sizes 48,64,96] [--steps 12]

Each case is a process of its own, so that its peak memory is its own. Without ``dataset_dir`` the data are phantoms.
The first third of the steps is left out of the times.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bundle.phantom.command import torso_phantom  # noqa: E402
from custom_modules.networks.synthesizer import Synthesizer  # noqa: E402

STAGES = {
    "1": ["train.yaml", "train_autoencoder.yaml"],
    "2": ["train.yaml"],
    "U-Net": ["train.yaml", "train_autoencoder.yaml", "baselines/unet.yaml"],
}


def phantoms(folder: Path, patients: int = 9) -> str:
    """A datalist of small torsos, 128 x 96 x 107 voxels at 3 mm."""
    entries = []
    for n in range(patients):
        mr, ct, affine = torso_phantom(shape=(128, 96, 107), spacing=3.0, seed=n)
        (folder / f"p{n}").mkdir()
        for name, volume in (("mr", mr), ("ct", ct)):
            nib.save(nib.Nifti1Image(volume, affine), folder / f"p{n}/{name}.nii")
        entries.append({"image": f"p{n}/mr.nii", "label": f"p{n}/ct.nii"})
    (folder / "datalist.json").write_text(json.dumps({"training": entries[:-1], "validation": entries[-1:]}))
    return str(folder)


def case(stage: str | int, size: int, steps: int, dataset_dir: str, scratch: str) -> None:
    """One stage at one crop size; prints a line of JSON."""
    stage = str(stage)
    torch.manual_seed(0)
    network = Synthesizer()
    torch.save(network.autoencoder.state_dict(), Path(scratch) / "autoencoder.pt")
    settings = {"autoencoder_checkpoint": f"{scratch}/autoencoder.pt"} if stage == "2" else {}
    workflow = ConfigWorkflow(
        config_file=[str(ROOT / "configs" / name) for name in STAGES[stage]], workflow_type="train",
        dataset_dir=dataset_dir, output_dir=f"{scratch}/{stage}_{size}", roi_size=[size] * 3, steps_per_epoch=steps,
        max_epochs=1, val_interval=2, check_data=False, adversarial_warmup=0, **settings,
    )  # fmt: skip
    if stage == "2":
        workflow.parser["augmented_copies"] = 1
    workflow.initialize()
    times: dict[str, list[float]] = {"wait": [], "step": []}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        times[name].append(now - clock)
        clock = now

    trainer = workflow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: lap("wait"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: lap("step"))
    workflow.run()
    wait, step = (np.array(values[steps // 3 :]) for values in times.values())
    device = workflow.parser.get_parsed_content("device")
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    result = {
        "stage": stage, "crop": size, "batch_size": workflow.parser.get_parsed_content("batch_size"),
        "seconds_per_step": float(np.median(wait + step)), "data_share": float(wait.sum() / (wait + step).sum()),
        "peak_gib": peak / 2**30, "device": str(device),
    }  # fmt: skip
    print("RESULT " + json.dumps(result))


def main(dataset_dir: str | None = None, sizes: tuple[int, ...] = (48, 64, 96), steps: int = 12) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = dataset_dir or phantoms(Path(scratch))
        for stage in STAGES:
            for size in sizes if isinstance(sizes, (tuple, list)) else (sizes,):
                command = [sys.executable, __file__, "case", stage, str(size), str(steps), data, scratch]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    print(f"stage {stage} at {size}: failed, {done.stderr.strip().splitlines()[-1]}")
                    continue
                rows.append(json.loads(line[7:]))
                r = rows[-1]
                rate = 1 / r["seconds_per_step"]
                print(
                    f"stage {r['stage']:<6} crop {r['crop']:>4}  batch {r['batch_size']}  {rate:6.2f} steps/s"
                    f"  data {100 * r['data_share']:4.1f} %  peak {r['peak_gib']:5.2f} GiB  ({r['device']})"
                )
    (ROOT / "runs").mkdir(exist_ok=True)
    (ROOT / "runs" / "bench_training.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    fire.Fire({"main": main, "case": case} if sys.argv[1:2] == ["case"] else main)
