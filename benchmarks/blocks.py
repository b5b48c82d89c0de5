"""The blocks of the networks against what they could be instead, on one device.

    python benchmarks/blocks.py [--device cuda] [--repeats 7]

Ratios of the others' times to ours, in inference and in training (forward and backward), on the features of a training
batch, 4 crops of 64³ voxels. Training is in bfloat16 by default (``amp``), inference on CPUs in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import fire
import torch
import torch.nn.functional as F
from common import medians, publish
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

from custom_modules.networks.blocks import ChannelRMSNorm, DepthwiseConv3d, ResidualBlock, WaveletBlock
from custom_modules.networks.dsca import StructureEmphasis


class PlainDepthwise(DepthwiseConv3d):
    """The same by PyTorch alone, in the memory format that comes."""

    forward = nn.Conv3d.forward


class PlainRMSNorm(ChannelRMSNorm):
    """The same by PyTorch alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.RMSNorm.forward(self, x.movedim(1, -1)).movedim(-1, 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v


def compare(
    part: str,
    case: str,
    works: Mapping[str, tuple[Callable[[], Any], list[Tensor]]],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for each but the first of ``works``, name to (what makes the output, what gradients go to)."""

    def infer(work: Callable) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            work()

        return run

    def train(work: Callable, leaves: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(work().square().mean(), leaves)

        return run

    inference = medians({name: infer(work) for name, (work, _) in works.items()}, repeats, device)
    training = medians({name: train(*work) for name, work in works.items()}, repeats, device)
    first, *others = works
    return [
        {
            "part": part,
            "on": case,
            "ours": first,
            "ours, ms": 1000 * inference[first],
            "against": other,
            "inference, ratio": inference[other] / inference[first],
            "training, ratio": training[other] / training[first] if other in training else None,
        }
        for other in others
    ]


def of_modules(
    part: str, x: Tensor, modules: Mapping[str, nn.Module], repeats: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """Rows of :func:`compare` for modules that take ``x``, under autocast to ``dtype``."""
    modules = {name: m.to(x.device, memory_format=torch.channels_last_3d) for name, m in modules.items()}
    x.requires_grad_()  # as within a network

    def run(module: nn.Module) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return module(x)

    works = {name: (lambda m=m: run(m), [x, *m.parameters()]) for name, m in modules.items()}
    on = f"{x.shape[0]} x {x.shape[1]} x {x.shape[2]}³, {str(dtype).removeprefix('torch.')}"
    return compare(part, on, works, repeats, x.device)


def main(device: str = "cpu", repeats: int = 7) -> None:
    torch.manual_seed(0)
    where, rows = torch.device(device), []
    for channels, size in ((32, 32), (64, 16)):
        x = torch.randn(4, channels, size, size, size, device=where).contiguous(memory_format=torch.channels_last_3d)
        wide = torch.randn(4, 8 * channels, *[size // 2] * 3, device=where)
        wide = wide.contiguous(memory_format=torch.channels_last_3d)
        for dtype in (torch.float32, torch.bfloat16):
            rows += of_modules("block", x, {
                "WaveletBlock": WaveletBlock(channels, channels),
                "ResidualBlock without wavelets": ResidualBlock(channels, channels),
                "MONAI's AEKLResBlock": AEKLResBlock(3, channels, 16, 1e-6, channels),
            }, repeats, dtype)  # fmt: skip
            rows += of_modules("depthwise convolution", wide, {
                "own gradients": DepthwiseConv3d(8 * channels, 3),
                "PyTorch's": PlainDepthwise(8 * channels, 3),
            }, repeats, dtype)  # fmt: skip
        rows += of_modules("norm", x, {
            "norm and products": ChannelRMSNorm(channels), "PyTorch's RMSNorm": PlainRMSNorm(channels),
        }, repeats)  # fmt: skip
    x = torch.randn(4, 64, 16, 16, 16, device=where).contiguous(memory_format=torch.channels_last_3d)
    module = StructureEmphasis(64, 8, 64, 16).to(where)
    nn.init.normal_(module.out.weight)
    pooled, full = (torch.randn(4, 8, size, size, size, device=where) for size in (8, 16))
    keys = {"pooled": module.keys_and_values(pooled), "full": module.keys_and_values(full)}
    keys = {name: tuple(t.detach() for t in pair) for name, pair in keys.items()}
    leaves = list(module.query.parameters())
    rows += compare("SEM of 4 windows", "64 x 16³", {
        "512 keys": (lambda: module(x, *keys["pooled"]), leaves),
        "4096 keys": (lambda: module(x, *keys["full"]), leaves),
    }, repeats, where)  # fmt: skip
    q, k, v = (torch.randn(4, 1, n, 64, device=where) for n in (4096, 512, 512))
    rows += compare("attention", "4096 queries, 512 keys", {
        "scaled_dot_product_attention": (lambda: F.scaled_dot_product_attention(q.requires_grad_(), k, v), [q]),
        "softmax written out": (lambda: attention(q.requires_grad_(), k, v), [q]),
    }, repeats, where)  # fmt: skip
    publish("blocks" if where.type == "cpu" else "blocks_gpu", rows, list(rows[0]), where)


if __name__ == "__main__":
    fire.Fire(main)
