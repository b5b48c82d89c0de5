"""Milliseconds of a training step on a GPU, by stage and batch size, with its kernels launched one by one and as a CUDA
graph.

    python benchmarks/graph.py [--repeats 20]

Random crops of 64³ in bfloat16: forward and backward pass, gradient clipping and Adam, without data or logging. Then
the forward and backward pass of single blocks, as a graph too: a GPU then does not wait for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import fire
import numpy as np
import torch
from common import publish, seconds
from monai.inferers import SimpleInferer
from torch import Tensor

from custom_modules.networks.blocks import ResidualBlock, WaveletBlock
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.training.batches import AutocastInferer, OneStepEstimate
from custom_modules.training.losses import AutoencoderLoss, EstimateLoss

SIZE, DEVICE = 64, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stage_one(network: Synthesizer, infer: AutocastInferer, batch: int) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """Return what is trained, and its loss for ``batch`` patients, each with MR and CT."""
    images, loss = torch.randn(2 * batch, 1, SIZE, SIZE, SIZE, device=DEVICE), AutoencoderLoss()
    return network.autoencoder, lambda: loss(infer(images, network.autoencoder), images)


def stage_two(network: Synthesizer, infer: AutocastInferer, batch: int) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """Return what is trained, and its loss for ``batch`` crops."""
    estimate, loss, side = OneStepEstimate(network), EstimateLoss(), SIZE // network.autoencoder.downsampling
    clean, z_mr = torch.randn(2, batch, network.autoencoder.latent_channels, side, side, side, device=DEVICE)
    mr, ct = torch.randn(2, batch, 1, SIZE, SIZE, SIZE, device=DEVICE)

    def run() -> Tensor:
        timesteps, noise = torch.randint(0, 1000, (batch,), device=DEVICE), torch.randn_like(clean)
        output = infer(clean, estimate, noise=noise, timesteps=timesteps, condition=z_mr, mr=mr)
        return loss(output, (network.schedule.target(clean, noise, timesteps), torch.ones_like(ct), ct))

    return estimate, run


def measure(stage: Callable, batch: int, cuda_graph: bool, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a step, and the GiB that PyTorch took on a GPU at most."""
    torch.manual_seed(0)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network = Synthesizer().to(DEVICE, memory_format=torch.channels_last_3d)
    trained, loss = stage(network, AutocastInferer(SimpleInferer(), True, cuda_graph), batch)
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()

    times = [seconds(step, DEVICE) for _ in range(repeats + 3)][3:]
    return 1000 * float(np.median(times)), torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def measure_block(block: torch.nn.Module, channels: int, size: int, batch: int, repeats: int) -> float:
    """Median milliseconds of the forward and backward pass of a block, on a GPU as a graph."""
    block = block.to(DEVICE, memory_format=torch.channels_last_3d)
    x = torch.randn(batch, channels, size, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
    infer, leaf = AutocastInferer(SimpleInferer(), True, cuda_graph=True), x.requires_grad_()
    times = [seconds(lambda: infer(leaf, block).square().mean().backward(), DEVICE) for _ in range(repeats + 3)][3:]
    return 1000 * float(np.median(times))


def main(repeats: int = 20, batch: int = 16) -> None:
    rows: list[dict[str, object]] = []
    for channels, size in ((32, 32), (64, 16)):
        wavelet, plain = (
            measure_block(kind(channels, channels), channels, size, batch, repeats)
            for kind in (WaveletBlock, ResidualBlock)
        )
        on = f"{batch} x {channels} x {size}³"
        rows.append({"on": on, "WaveletBlock, ms": wavelet, "ResidualBlock, ms": plain, "ratio": wavelet / plain})
        print(rows[-1], flush=True)
    publish("graph_blocks_gpu" if DEVICE.type == "cuda" else "graph_blocks", rows, list(rows[0]), DEVICE)
    rows = []
    for name, stage, batches in (("1, patients", stage_one, (4, 8)), ("2, crops", stage_two, (8, 16, 32))):
        for batch in batches:
            row: dict[str, object] = {"stage": name, "batch": batch}
            for how in ("one by one", "CUDA graph") if DEVICE.type == "cuda" else ("one by one",):
                row[f"{how}, ms"], row[f"{how}, GiB"] = measure(stage, batch, how == "CUDA graph", repeats)
            rows.append(row)
            print(row, flush=True)
    publish("graph_gpu" if DEVICE.type == "cuda" else "graph", rows, list(rows[0]), DEVICE)


if __name__ == "__main__":
    fire.Fire(main)
