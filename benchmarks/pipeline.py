"""Time and memory of the pipeline from a normalised MR to the synthetic CT, by volume and by setting, on CPU or GPU.

    python benchmarks/pipeline.py volumes [--device cuda] [--amp True] [--compile True]
    python benchmarks/pipeline.py settings [--device cuda]

Needs nothing but the repository, PyTorch and MONAI, fire and tqdm. The volumes are simple bodies, elliptic
cylinders, for the cost depends on their size only; the weights are the shipped ones.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import fire
import numpy as np
import torch
from common import ROOT, medians, publish, seconds
from monai.utils import set_determinism
from torch.utils.flop_counter import FlopCounterMode

from custom_modules.inference.inferer import WholeVolumeInferer
from custom_modules.inference.windows import WindowInferer
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.networks.weights import load_weights

# name: voxels at 2 mm, and the share of the box that is body
VOLUMES = {
    "64³": ((64, 64, 64), 0.6),
    "128³": ((128, 128, 128), 0.6),
    "torso": ((250, 250, 400), 0.5),
    "whole body": ((266, 186, 566), 0.3),
}
GIB = 2**30


def volume(shape: tuple[int, int, int], share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """MR in [-1, 1] and body, both (1, 1, D, H, W): an elliptic cylinder that fills ``share`` of the box."""
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    body = (x[:, None] ** 2 + y[None] ** 2)[..., None] <= share * 4 / math.pi + 0 * z
    texture = np.sin(9 * x)[:, None, None] + np.sin(7 * y)[None, :, None] + np.sin(40 * z)
    mr = np.where(body, 0.1 + 0.2 * texture, -1).clip(-1, 1).astype(np.float32)
    return torch.from_numpy(mr)[None, None], torch.from_numpy(body)[None, None]


class Peak:
    """The most memory that was held while it was entered, above what was held before, in GiB."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        import psutil

        self.process, self.running = psutil.Process(), True
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self.device) / GIB
            return
        self.running = False
        self.thread.join()
        self.gib = (self.most - self.before) / GIB


def load(device: torch.device, compiled: bool = False) -> Synthesizer:
    network = load_weights(Synthesizer(), ROOT / "models" / "model.pt").eval()
    network = network.to(device, memory_format=torch.channels_last_3d)
    if compiled:
        network.compile()
    return network


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product, the limit of the machine."""
    a, b = torch.randn(2, 4096, 4096, device=device).to(dtype)
    return 2 * 4096**3 / medians({"product": lambda: a @ b}, 3, device)["product"]


def operations_per_voxel(network: Synthesizer) -> dict[str, float]:
    """Floating-point operations of convolutions and matrix products for each voxel of the image that passes a stage, as
    PyTorch counts them."""
    size, f = network.denoiser.window * network.autoencoder.downsampling, network.autoencoder.downsampling
    image = torch.zeros(1, 1, size, size, size, device=network.device)
    z = torch.zeros(1, network.autoencoder.latent_channels, *[size // f] * 3, device=network.device)
    work: dict[str, Callable[[], Any]] = {
        "encode": lambda: network.encode(image, "MR"),
        "denoise": lambda: network.predict(z, 500, network.condition(z)),
        "decode": lambda: network.decode(z),
    }
    found = {}
    for stage, run in work.items():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            run()
        found[stage] = counter.get_total_flops() / image.numel()
    return found


INFERERS = {"whole": WholeVolumeInferer, "windows": WindowInferer}


class Stages:
    """Seconds spent in each stage of an inferer, by wrapping its methods."""

    def __init__(self, inferer: WholeVolumeInferer, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        for stage, method in (("encode", "_encode"), ("denoise", "_sample"), ("decode", "_decode")):
            setattr(inferer, method, self._timed(stage, getattr(inferer, method), device))

    def _timed(self, stage: str, method: Callable, device: torch.device) -> Callable:
        def run(*args: Any) -> Any:
            result: list[Any] = []
            self.seconds[stage] = seconds(lambda: result.append(method(*args)), device)
            return result[0]

        return run


def volumes(device: str = "cpu", amp: bool = False, compile: bool = False, repeats: int = 3) -> None:
    """Measure one row per volume: seconds of each stage and of all, memory, and the fraction of the peak that is
    reached."""
    set_determinism(0)
    where = torch.device(device)
    network, rows = load(where, compile), []
    flops = operations_per_voxel(load(where))
    peaks = {"encode": peak_flops(where, torch.float32), "decode": peak_flops(where, torch.float32)}
    peaks["denoise"] = peak_flops(where, torch.bfloat16 if amp else torch.float32)
    for name, (shape, share) in VOLUMES.items():
        mr, body = volume(shape, share)
        inferer: Any = WholeVolumeInferer(amp=amp, progress=False)
        stages, found = Stages(inferer, where), []
        with Peak(where) as peak:
            for _ in range(repeats + 1):
                total = seconds(functools.partial(inferer, mr, network, body), where)
                found.append({**stages.seconds, "all": total})
        median = {stage: float(np.median([f[stage] for f in found[1:]])) for stage in found[0]}
        computed = voxels_computed(inferer, network, mr, body)
        done = {stage: flops[stage] * computed[stage] for stage in flops}
        row: dict[str, Any] = {
            "volume": name,
            "voxels": "x".join(map(str, shape)),
            "body, Mvoxel": float(body.sum()) / 1e6,
        }
        row["computed"] = ", ".join(f"{computed[s] / 1e6:.3g}" for s in flops)
        row.update({f"{stage}, s": median[stage] for stage in (*flops, "all")})
        row["memory, GiB"] = peak.gib
        row["of peak, %"] = ", ".join(f"{100 * done[s] / median[s] / peaks[s]:.0f}" for s in flops)
        row["TFLOP"] = sum(done.values()) / 1e12
        rows.append(row)
        print(row, flush=True)
    exponent = np.polyfit(np.log([r["body, Mvoxel"] for r in rows]), np.log([r["all, s"] for r in rows]), 1)[0]
    rows.append({"volume": f"time grows as body volume to the power {exponent:.2f}", "exponent": exponent})
    name = (
        "pipeline"
        if where.type == "cpu"
        else f"pipeline_gpu_{'bf16' if amp else 'fp32'}{'_compiled' if compile else ''}"
    )
    publish(name, rows, list(rows[0]), where)


def voxels_computed(
    inferer: WholeVolumeInferer, network: Synthesizer, mr: torch.Tensor, body: torch.Tensor
) -> dict[str, int]:
    """Voxels of the image that pass each stage, halos and all."""
    cube, seen = network.autoencoder.downsampling**3, dict.fromkeys(("encode", "denoise", "decode"), 0)
    channels, parts = network.autoencoder.latent_channels, (network.encode, network.predict, network.decode)

    def encode(image: torch.Tensor, modality: str) -> torch.Tensor:
        seen["encode"] += image.numel()
        return image.new_zeros(1, channels, *(size // network.autoencoder.downsampling for size in image.shape[2:]))

    def predict(z: torch.Tensor, *_: Any) -> torch.Tensor:
        seen["denoise"] += z[:, 0].numel() * cube
        return torch.zeros_like(z)

    def decode(z: torch.Tensor, detail: torch.Tensor | None = None) -> torch.Tensor:
        seen["decode"] += z[:, 0].numel() * cube
        return z.new_zeros(1, 1, *(size * network.autoencoder.downsampling for size in z.shape[2:]))

    network.encode, network.predict, network.decode = encode, predict, decode  # type: ignore[method-assign, assignment]
    try:
        inferer(mr, network, body)
    finally:
        network.encode, network.predict, network.decode = parts  # type: ignore[method-assign]
    return seen


def settings(device: str = "cpu", repeats: int = 3) -> None:
    """Ratios of times to the default settings on 128³, and how far the synthetic CT moves."""
    where = torch.device(device)
    network = load(where)
    mr, body = volume(*VOLUMES["128³"])
    everywhere = torch.ones_like(body)
    cases: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
        "default: 1 step, whole": ({}, body),
        "2 steps": ({"num_inference_steps": 2}, body),
        "4 steps": ({"num_inference_steps": 4}, body),
        "8 steps": ({"num_inference_steps": 8}, body),
        "4 samples of one step in one pass": ({"num_samples": 4, "sample_steps": 1}, body),
        "windows, each on its own": ({"sampling": "windows"}, body),
        "nothing skipped": ({}, everywhere),
        "bfloat16": ({"amp": True}, body),
        "tiles of 2 Mvoxel": ({"tile_voxels": 2_000_000}, body),
    }
    inferers = {
        name: INFERERS[kwargs.pop("sampling", "whole")](progress=False, **kwargs) for name, (kwargs, _) in cases.items()
    }
    times = medians(
        {name: functools.partial(inferers[name], mr, network, cases[name][1]) for name in cases}, repeats, where
    )
    first = next(iter(cases))
    rows = [{"setting": name, "time, ratio": times[name] / times[first], "s": times[name]} for name in cases]
    publish("settings" if where.type == "cpu" else "settings_gpu", rows, list(rows[0]), where)


if __name__ == "__main__":
    fire.Fire({"volumes": volumes, "settings": settings})
