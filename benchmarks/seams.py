"""Are there seams? Mean absolute jump between neighbouring voxels across window borders, over that inside windows.

    python benchmarks/seams.py --dataset_dir DIR [--split validation] [--overlap 0.5] [--num_inference_steps 4]

1 means that a border cannot be told from the inside. Measured in the body, on the grid of the networks: at the borders
of the denoiser's attention windows, and at those of windows sampled on their own; the CT at the same places is the
reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from monai.data import load_decathlon_datalist
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import _get_scan_interval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bundle.workflow import inference_workflow  # noqa: E402
from custom_modules.data.transforms import Preprocess  # noqa: E402
from custom_modules.inference.inferer import LatentSampler  # noqa: E402
from custom_modules.networks.synthesizer import Synthesizer  # noqa: E402
from custom_modules.tiling import pad_to_windows  # noqa: E402


def border_planes(
    shape: tuple[int, ...], sampling: str, inferer: LatentSampler, network: Synthesizer
) -> list[np.ndarray]:
    """For each axis, the positions p at which a window (of the denoiser's attention, or of sampling) starts or ends
    between voxels p - 1 and p of the volume."""
    unit = network.downsampling
    padded, inside = pad_to_windows(torch.zeros(1, 1, *shape), inferer._least_size(network), unit, inferer.margin)
    size = padded.shape[2:]
    planes = []
    for axis in range(3):
        if sampling == "windows":
            interval = _get_scan_interval(size, inferer.window_size, 3, (inferer.overlap,) * 3)
            windows = dense_patch_slices(size, inferer.window_size, interval)
            edges = {edge for window in windows for edge in (window[axis].start, window[axis].stop)}
        else:
            edges = set(range(0, size[axis], network.denoiser.window * network.autoencoder.downsampling))
        first = inside[1 + axis].start
        planes.append(np.array(sorted(e - first for e in edges if 0 < e - first < shape[axis]), dtype=int))
    return planes


def jump_ratio(volume: np.ndarray, body: np.ndarray, planes: list[np.ndarray], unit: int) -> float:
    """Mean |v[p] - v[p - 1]| in the body at the planes over that at the other planes of the same phase: those a
    multiple of ``unit`` away, so that the grid of the networks itself does not count as a seam."""
    at, elsewhere = [], []
    for axis, positions in enumerate(planes):
        v, b = np.moveaxis(volume, axis, 0), np.moveaxis(body, axis, 0)
        jumps, both = np.abs(np.diff(v, axis=0)), b[1:] & b[:-1]
        is_border = np.zeros(len(jumps), dtype=bool)
        is_border[positions - 1] = True
        same_phase = np.isin((np.arange(len(jumps)) + 1) % unit, positions % unit) & ~is_border
        at.append(jumps[is_border][both[is_border]])
        elsewhere.append(jumps[same_phase][both[same_phase]])
    return float(np.concatenate(at).mean() / np.concatenate(elsewhere).mean())


def main(dataset_dir: str, split: str = "validation", **settings: Any) -> None:
    pairs = load_decathlon_datalist(str(Path(dataset_dir) / "datalist.json"), True, split, base_dir=dataset_dir)
    workflow = inference_workflow(dataset_dir=pairs[0]["image"], **settings)
    parser = workflow.parser
    network = parser.get_parsed_content("network")
    low, high = parser.get_parsed_content("mr_window")
    read = Preprocess(parser.get_parsed_content("spacing"), label=True)
    inferers = parser.get_parsed_content("inferers")
    ratios: dict[str, list[float]] = {"whole": [], "CT there": [], "windows": [], "CT at theirs": []}
    for pair in pairs:
        data = read({key: pair[key] for key in ("image", "label")})
        mr = ((data["image"].as_tensor() - low) / (high - low) * 2 - 1).clamp(-1, 1)[None]
        body = data["body"].as_tensor()[None]
        inside, unit = body[0, 0].numpy() > 0.5, network.downsampling
        for sampling, reference in (("whole", "CT there"), ("windows", "CT at theirs")):
            inferer = inferers[sampling]
            inferer.progress = False
            planes = border_planes(mr.shape[2:], sampling, inferer, network)
            hu = network.to_hu(inferer(mr, network, body=body))[0, 0].numpy()
            ratios[sampling].append(jump_ratio(hu, inside, planes, unit))
            ratios[reference].append(jump_ratio(data["label"][0].numpy(), inside, planes, unit))
    print(f"overlap {inferer.overlap:g}, {inferer.num_inference_steps} steps, {len(pairs)} volumes")
    for name, values in ratios.items():
        print(f"{name:<14}" + "".join(f"{v:8.3f}" for v in values) + f"   mean {np.mean(values):.3f}")


if __name__ == "__main__":
    fire.Fire(main)
