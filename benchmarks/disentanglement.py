"""Do structure and modality separate? Mean cosines of the halves of the latents, on validation patients.

    python benchmarks/disentanglement.py --dataset_dir DIR runs/autoencoder/autoencoder.pt runs/without/autoencoder.pt

For each autoencoder: S of a patient's MR and CT, S of different patients (same modality), and the same for M, each a
cosine in [-1, 1]. Different volumes are compared over the central crop that all of them hold.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import fire
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.workflow import inference_workflow  # noqa: E402
from custom_modules.data.pairs import load_pairs  # noqa: E402
from custom_modules.data.transforms import Preprocess  # noqa: E402
from custom_modules.networks.weights import load_weights  # noqa: E402


def centre(volume: torch.Tensor, size: list[int]) -> torch.Tensor:
    return volume[(..., *(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(volume.shape[1:], size)))]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def main(*autoencoders: str, dataset_dir: str, split: str = "validation", config: str | None = None) -> None:
    parser = inference_workflow(config or ()).parser
    network = parser.get_parsed_content("network_def").autoencoder.eval()
    windows = [parser.get_parsed_content(name) for name in ("mr_window", "hu_window")]
    read = Preprocess(parser.get_parsed_content("spacing"), label=True)
    pairs = [read(pair) for pair in load_pairs(f"{dataset_dir}/datalist.json", dataset_dir, [split])[split]]
    size = [min(pair["image"].shape[axis] for pair in pairs) // 16 * 16 for axis in (1, 2, 3)]
    images = [
        [
            ((centre(pair[key].as_tensor(), size) - a) / (b - a) * 2 - 1).clamp(-1, 1)[None]
            for key, (a, b) in zip(("image", "label"), windows)
        ]
        for pair in pairs
    ]
    print(f"{len(pairs)} {split} patients, central crop {size}")
    print(f"{'':<40}{'S, pair':>10}{'S, others':>11}{'M, pair':>10}{'M, others':>11}")
    for path in autoencoders:
        load_weights(network, path)
        with torch.inference_mode():
            halves = [[network.split(network.encode(x)[0]) for x in pair] for pair in images]
        row = []
        for half in (0, 1):
            row.append([cosine(mr[half], ct[half]) for mr, ct in halves])
            row.append([cosine(a[m][half], b[m][half]) for a, b in itertools.combinations(halves, 2) for m in (0, 1)])
        print(f"{path:<40}" + "".join(f"{np.mean(v):>10.3f}" for v in row))


if __name__ == "__main__":
    fire.Fire(main)
