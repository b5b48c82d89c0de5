"""Systems of ``wldm compare``, trained side by side on one GPU, which no single one of them keeps busy.

    wldm pack --dataset_dir DIR --output_dir packed --splits training,validation,test --step 4
    python benchmarks/side_by_side.py --dataset_dir packed --output_dir out --minutes 7.4

All have the same minutes and start together. They share the GPU, so these minutes give fewer steps than a GPU for one.
OUT/results then holds the records, OUT/results.md the tables, and OUT/SYSTEM/log.txt what was printed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import fire
from common import ROOT

from bundle.compare.command import SYSTEMS, compare

# packed MRs are corrected; validation and checkpoints take as long as hundreds of steps on a GPU
SETTINGS = {
    "correct_bias": False, "batch_size": 4, "augmented_copies": 16, "validations": 6, "workers": 3, "log_interval": 50,
    "steps_per_epoch": 1000, "checkpoint_interval": 1_000_000,
}  # fmt: skip
CAPTURED = {"vanilla", "wrm", "wrm_smd", "full"}  # those that were tried in a CUDA graph


def take_shared_stages(name: str, owners: dict[str, str], ended: dict[str, Event], folder: Path) -> None:
    """Wait for the stages of ``name`` that other systems train, by ``owners``, and copy them. What an owner did not
    finish is left for ``name`` to train."""
    for stage in SYSTEMS[name].stages:
        if (owner := owners[stage.folder]) != name:
            trained = folder / owner / "runs" / stage.folder
            while not (trained / "budget.json").exists() and not ended[owner].wait(1):
                pass
            if (trained / "budget.json").exists():
                shutil.copytree(trained, folder / name / "runs" / stage.folder, dirs_exist_ok=True)


def train_and_score(
    name: str, owners: dict[str, str], ended: dict[str, Event], folder: Path, settings: dict[str, object]
) -> None:  # fmt: skip
    """Run ``wldm compare`` for one system in a process of its own."""
    own, results = folder / name, folder / name / "results"
    try:
        take_shared_stages(name, owners, ended, folder)
        given = settings | ({"cuda_graph": True} if name in CAPTURED else {})
        flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "bundle", "compare", "--systems", name, *flags, "--output_dir", str(own),
                   "--results", str(results)]  # fmt: skip
        with (own / "log.txt").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    finally:
        ended[name].set()
    record = results / f"{name}.json"
    problem = json.loads(record.read_text())["problem"] if record.exists() else "it broke off"
    print(f"{name}: {f'{problem}; see {own}/log.txt' if problem else 'scored'}", flush=True)


def main(
    dataset_dir: str, output_dir: str, minutes: float, systems: str = "unet,pix2pix,vanilla,wrm,full,wrm_smd",
    **settings: object,
) -> None:  # fmt: skip
    """Train and score ``systems`` for ``minutes`` each.

    Args:
        dataset_dir: of ``wldm pack``, with all three splits.
        systems: names joined by commas. The first that has a stage trains it for the others.
        settings: of all trainings, in place of SETTINGS.
    """
    names = systems.split(",") if isinstance(systems, str) else list(systems)
    folder, data = Path(output_dir).resolve(), str(Path(dataset_dir).resolve())
    owners = {stage.folder: name for name in reversed(names) for stage in SYSTEMS[name].stages}
    ended = {name: Event() for name in names}
    own = {**SETTINGS, **settings, "dataset_dir": data, "budget": minutes}
    for name in names:
        (folder / name / "results").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: train_and_score(name, owners, ended, folder, own), names))
    for name in names:
        shutil.copytree(folder / name / "results", folder / "results", dirs_exist_ok=True)
    compare(data, budget=minutes, systems="", output_dir=str(folder / "report"), results=str(folder / "results"))


if __name__ == "__main__":
    fire.Fire(main)
