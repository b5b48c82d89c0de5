"""Building blocks shared by the autoencoder and the denoiser.

No block uses spatial statistics: the value of a voxel depends on its receptive field only. A volume that is computed in
tiles therefore equals the whole one, except within that field of a tile's edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_modules.networks.wavelets import BANDS, WaveletTransform3d

GROUP_WIDTH = 16  # channels of the groups that take the place of depthwise ones


class ChannelRMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the channels of each voxel of (N, C, D, H, W) (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).to(self.weight.dtype)
        # faster on CPUs than ``F.rms_norm``, which stores the squares first (benchmarks/blocks.py)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return (x * (square + torch.finfo(x.dtype).eps).rsqrt() * self.weight).movedim(-1, 1)


class _DepthwiseConvolution(torch.autograd.Function):
    """``conv3d(groups=channels)`` with gradients that are faster on CPUs than PyTorch's (benchmarks/blocks.py). That of
    the input is a depthwise convolution, too, with the flipped kernel. That of the kernel is the diagonal of the one
    that a convolution with wider groups would have."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding="same", groups=len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        channels, size = len(weight), weight.shape[2:]
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding="same", groups=channels)
        width = math.gcd(channels, GROUP_WIDTH)
        if 2 in grad.shape[2:]:  # oneDNN's is sometimes NaN in bfloat16 there
            grad, x = grad.float(), x.float()
        wide = grad.new_empty(channels, width, *size)  # only its shape and type are read
        _, grad_wide, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, wide, [channels], [1] * 3, [n // 2 for n in size], [1] * 3, False, [0] * 3,
            channels // width, [False, True, True],
        )  # fmt: skip
        own = grad_wide.unflatten(0, (-1, width)).diagonal(dim1=1, dim2=2).movedim(-1, 1)
        return grad_x, own.reshape(weight.shape).to(weight.dtype), grad_bias.to(weight.dtype)


class DepthwiseConv3d(nn.Conv3d):
    """Convolution with one group per channel that keeps the size.

    On CUDA it is one with wider groups, whose kernels are zero but for the diagonal: in training they take a
    sixth to an eleventh of the time, in bfloat16 on an H200 (benchmarks/blocks.py).
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__(channels, channels, kernel_size, padding="same", groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            weight = self.wide_weight()
            return F.conv3d(x, weight, self.bias, padding="same", groups=len(weight) // weight.shape[1])
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        with torch.autocast("cpu", enabled=False):
            x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            if torch.is_grad_enabled():
                return _DepthwiseConvolution.apply(x, weight, bias)
            return self._conv_forward(x, weight, bias)

    def wide_weight(self) -> Tensor:
        """Return the kernels (channels, width, ...) of the same convolution with groups of ``width`` channels."""
        kernels = self.weight[:, 0].unflatten(0, (-1, math.gcd(len(self.weight), GROUP_WIDTH)))
        return torch.diag_embed(kernels.movedim(1, -1), dim1=1, dim2=2).flatten(0, 1)


def group_wise(channels: int, kernel_size: int, width: int) -> nn.Conv3d:
    """Return a convolution that keeps the size, with groups of ``width`` channels, or of the greatest common divisor of
    both where ``channels`` is no multiple of it; depthwise for 1."""
    width = math.gcd(channels, width)
    if width == 1:
        return DepthwiseConv3d(channels, kernel_size)
    return nn.Conv3d(channels, channels, kernel_size, padding="same", groups=channels // width)


class WaveletResidualModule(nn.Module):
    """Wavelet Residual Module (Fig. 2): (N, C, D, H, W) of any size to the same shape.

    Primary stream: ``x`` + point-wise(group-wise(x)). High stream: H1' = group-wise(H1). Low stream:
    L1' = group-wise(L1), and L1'' = IWT(group-wise(WT(L1))). IWT(L1' + L1'', H1') joins the primary stream,
    and a point-wise convolution gives the output.

    Args:
        channels: C.
        kernel_size: of the group-wise convolutions, odd.
        wavelet: see :class:`~custom_modules.networks.wavelets.WaveletTransform3d`.
        branch_scale: initial value of the learned factor on the wavelet branch, one per channel; small, so that an
            untrained module is close to its primary stream.
        group_width: channels of each group, of which the paper does not tell the number; 1 for depthwise convolutions.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, wavelet: str = "haar", branch_scale: float = 0.1,
        group_width: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transform = WaveletTransform3d(wavelet)
        self.primary = nn.Sequential(group_wise(channels, kernel_size, group_width), nn.Conv3d(channels, channels, 1))
        self.level1 = group_wise(BANDS * channels, kernel_size, group_width)
        self.level2 = group_wise(BANDS * channels, kernel_size, group_width)
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1, 1), branch_scale))
        self.out = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        bands1 = self.transform(x)
        low1, (_, _, *size1) = bands1[:, :channels], bands1.shape
        low1_deeper = self.transform.inverse(self.level2(self.transform(low1)), size1)  # L1''
        low1, high1 = self.level1(bands1).split([channels, (BANDS - 1) * channels], dim=1)  # L1', H1'
        bands1 = torch.cat([low1 + low1_deeper, high1], dim=1)
        enhanced = self.transform.inverse(bands1, x.shape[2:])
        del bands1, low1, high1, low1_deeper  # memory use peaks here
        return self.out(torch.addcmul(x + self.primary(x), self.scale.to(enhanced.dtype), enhanced))


class ResidualBlock(nn.Module):
    """Pre-activation residual block, (N, C_in, D, H, W) to (N, C_out, D, H, W): normalisation, SiLU and convolution,
    twice. An optional embedding of the timestep scales and shifts the features in between (Dhariwal and Nichol 2021).
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ChannelRMSNorm(out_channels)
        self.conv2: nn.Module = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        self.embedding = nn.Linear(embedding_channels, 2 * out_channels) if embedding_channels else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.embedding is not None:
            scale, shift = self.embedding(F.silu(embedding))[:, :, None, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class WaveletBlock(ResidualBlock):
    """Residual block of the autoencoder, with the Wavelet Residual Module as its second layer (Fig. 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, wavelet: str = "haar", group_width: int = 1
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels)
        self.conv2 = WaveletResidualModule(out_channels, kernel_size, wavelet, group_width=group_width)
