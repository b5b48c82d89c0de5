"""The blocks of the networks against what they could be instead, on one device.

    python benchmarks/blocks.py [--device cuda] [--repeats 7]

Ratios of the others' times to ours, in inference and in training (forward and backward).
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


class ShiftedAdds(DepthwiseConv3d):
    """The depthwise convolution as a sum of shifted copies, one a tap."""

    def forward(self, x: Tensor) -> Tensor:
        r = self.kernel_size[0] // 2
        padded, (d, h, w) = F.pad(x, (r,) * 6), x.shape[2:]
        out = self.bias.view(1, -1, 1, 1, 1).expand_as(x).clone()
        for i in range(2 * r + 1):
            for j in range(2 * r + 1):
                for k in range(2 * r + 1):
                    tap = self.weight[None, :, 0, i, j, k, None, None, None]
                    out = torch.addcmul(out, padded[:, :, i : i + d, j : j + h, k : k + w], tap)
        return out


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


def of_modules(part: str, x: Tensor, modules: Mapping[str, nn.Module], repeats: int) -> list[dict[str, Any]]:
    modules = {name: m.to(x.device, memory_format=torch.channels_last_3d) for name, m in modules.items()}
    x.requires_grad_()  # as within a network
    works = {name: (lambda m=m: m(x), [x, *m.parameters()]) for name, m in modules.items()}
    return compare(part, f"{x.shape[1]} x {x.shape[2]}³", works, repeats, x.device)


def main(device: str = "cpu", repeats: int = 7) -> None:
    torch.manual_seed(0)
    where, rows = torch.device(device), []
    for channels, size in ((32, 64), (64, 32)):
        x = torch.randn(1, channels, size, size, size, device=where).contiguous(memory_format=torch.channels_last_3d)
        wide = torch.randn(1, 8 * channels, *[size // 2] * 3, device=where)
        wide = wide.contiguous(memory_format=torch.channels_last_3d)
        rows += of_modules("block", x, {
            "WaveletBlock": WaveletBlock(channels, channels),
            "ResidualBlock without wavelets": ResidualBlock(channels, channels),
            "MONAI's AEKLResBlock": AEKLResBlock(3, channels, 16, 1e-6, channels),
        }, repeats)  # fmt: skip
        rows += of_modules("depthwise convolution", wide, {
            "channels last, own gradient": DepthwiseConv3d(8 * channels, 3),
            "PyTorch's": PlainDepthwise(8 * channels, 3),
            "27 shifted adds": ShiftedAdds(8 * channels, 3),
        }, repeats)  # fmt: skip
        rows += of_modules("norm", x, {
            "norm and products": ChannelRMSNorm(channels), "PyTorch's RMSNorm": PlainRMSNorm(channels),
        }, repeats)  # fmt: skip
    x = torch.randn(4, 64, 16, 16, 16, device=where).contiguous(memory_format=torch.channels_last_3d)
    module = StructureEmphasis(64, 8, 64).to(where)
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
