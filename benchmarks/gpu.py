"""Everything that a short loan of a GPU is for, in one command: training, and the GPU rows of docs/performance.md.

    wldm pack --dataset_dir DIR --output_dir packed --step 8      # on any machine: less than 60 MB
    make gpu DATA=packed OUT=out MINUTES=10                       # on the machine with the GPU

It needs the repository, PyTorch, MONAI, Ignite, scikit-image, fire, nibabel and pydicom, and no network. OUT then holds
the weights of each stage with their curves, and the tables of the benchmarks. Score the weights where the data are:

    wldm ship out/diffusion/model.pt --dataset_dir DIR; wldm evaluate --dataset_dir DIR
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fire
import torch
from common import RESULTS, ROOT

from bundle.compare.report import write_curves
from bundle.train import RECIPES, run_stage

# validation and checkpoints take as long as hundreds of steps on a GPU
SETTINGS = {
    "check_data": False, "correct_bias": False, "cuda_graph": True, "log_interval": 50, "steps_per_epoch": 1000,
    "checkpoint_interval": 5000,
}  # fmt: skip
AUTOENCODER = {"batch_size": 4, "validations": 1}
DIFFUSION = {
    "batch_size": 8, "roi_size": [96, 96, 64], "distinct_patients": False, "ema_decay": 0.999, "validations": 5,
    "augmented_copies": 16, "renewed_copies": 2, "steps_per_epoch": 400,
}  # fmt: skip
BENCHES = (
    ["pipeline.py", "volumes", "--amp", "True"], ["pipeline.py", "volumes"], ["pipeline.py", "settings"], ["blocks.py"],
    ["graph.py"],
)  # fmt: skip


def bench(folder: Path, device: str, until: float) -> None:
    """Run the benchmarks one after the other while there is time, and copy what they found."""
    for script, *arguments in BENCHES:
        left = until - time.monotonic()
        if left < 5:
            print(f"no time left for {script} {' '.join(arguments)}", flush=True)
            continue
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--device", device]
        try:
            subprocess.run(command, cwd=ROOT, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"{script} {' '.join(arguments)}: not finished in time", flush=True)
    for path in RESULTS.glob("*_gpu*.json"):
        shutil.copy(path, folder)


def main(
    dataset_dir: str, output_dir: str, minutes: float = 10.0, recipe: str = "whole_body", device: str | None = None,
    bench_share: float = 0.15, first_share: float = 0.2, **settings: object,
) -> None:  # fmt: skip
    """Train ``recipe`` and run the benchmarks within ``minutes``, reading the data included.

    Args:
        device: cuda, or cpu to try the script; cuda where there is one when None.
        bench_share: of the time, for the benchmarks; 0 for none.
        first_share: of the training, for the first of two stages.
        settings: of the training configs, such as --batch_size.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder, until = Path(output_dir), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    stages, reading = RECIPES[recipe].stages, 0.0  # reading the volumes is not in the time of a stage
    shares = [first_share, 1 - first_share] if len(stages) == 2 else [1.0]
    for number, stage in enumerate(stages):
        left = (until - time.monotonic()) / 60 - bench_share * minutes - reading * len(stages[number:])
        budget = left * shares[number] / sum(shares[number:])
        print(f"{stage.folder}: {budget:.1f} min on {where}", flush=True)
        started = time.monotonic()
        run_stage(
            stage, folder, dataset_dir, str(Path(dataset_dir) / "datalist.json"), budget / stage.share,
            {**SETTINGS, **(AUTOENCODER if stage.folder == "autoencoder" else DIFFUSION),
             "device": f"$torch.device('{where}')", **settings},
        )  # fmt: skip
        reading = max((time.monotonic() - started) / 60 - budget, 0.0)
        print(f"{stage.folder}: took {budget + reading:.1f} min", flush=True)
    used = [json.loads((folder / stage.folder / "budget.json").read_text()) for stage in stages]
    write_curves({recipe: {"stages": used}}, {recipe: recipe}, folder)
    if bench_share:
        bench(folder, where, until)


if __name__ == "__main__":
    fire.Fire(main)
