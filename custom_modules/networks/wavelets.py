"""3D discrete wavelet transform and its exact inverse, for feature maps of any size.

Band order: the eight bands of a one-level transform follow one another along the channels,
``aaa aad ada add daa dad dda ddd`` (a = low, d = high; letters along depth, height, width), each with
all the input's channels, so ``bands[:, :channels]`` is the low band. Coefficients, signs and the
half-sample symmetric extension at the borders are those of PyWavelets' ``dwtn(..., mode="symmetric")``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDS = 8


def _haar_matrix(reference: Tensor) -> Tensor:
    """Return the orthogonal 8 x 8 matrix that maps a 2 x 2 x 2 block of voxels to its eight Haar bands."""
    pair = torch.full(
        (2, 2), 1 / 2**0.5, dtype=torch.float64, device=reference.device
    )  # made there: no copy to wait for
    pair[1, 1].neg_()
    return torch.kron(torch.kron(pair, pair), pair).to(reference.dtype)


def _haar_forward(x: Tensor) -> Tensor:
    n, c, d, h, w = x.shape
    if c == 1 and x.device.type == "cpu":  # on CUDA a convolution would round to TF32
        return _haar_forward_of_image(x)
    blocks = x.permute(0, 2, 3, 4, 1).reshape(n, d // 2, 2, h // 2, 2, w // 2, 2, c)
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, BANDS, c)
    bands = torch.matmul(_haar_matrix(x), blocks)
    return bands.reshape(n, d // 2, h // 2, w // 2, BANDS * c).permute(0, 4, 1, 2, 3)


def _haar_forward_of_image(x: Tensor) -> Tensor:
    """Transform an image of one channel. A matrix product would be too small to be fast, so up to eight neighbours
    along the width are viewed as channels, and a 2 x 2 x 1 convolution gives the bands (benchmarks/wavelets.py)."""
    n, _, d, h, w = x.shape
    run = next(length for length in (8, 4, 2) if w % length == 0)
    blocks = torch.eye(run // 2, dtype=x.dtype, device=x.device)
    bands = _haar_matrix(x).view(BANDS, 2, 2, 2).permute(0, 3, 1, 2)  # the block's width goes to the channels
    kernel = (blocks[:, None, :, None, None, None] * bands[None, :, None]).reshape(-1, run, 2, 2, 1)
    out = F.conv3d(x.reshape(n, d, h, w // run, run).permute(0, 4, 1, 2, 3), kernel, stride=(2, 2, 1))
    return out.permute(0, 2, 3, 4, 1).reshape(n, d // 2, h // 2, w // 2, BANDS).permute(0, 4, 1, 2, 3)


def _haar_inverse(bands: Tensor) -> Tensor:
    n, c, d, h, w = bands.shape
    c //= BANDS
    bands = bands.permute(0, 2, 3, 4, 1)
    if c == 1:  # one product for all blocks; a batch of matrix-vector products is several times slower
        blocks = bands.reshape(-1, BANDS) @ _haar_matrix(bands)  # the matrix is symmetric
    else:
        blocks = torch.matmul(_haar_matrix(bands).T, bands.reshape(-1, BANDS, c))
    blocks = blocks.reshape(n, d, h, w, 2, 2, 2, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return blocks.reshape(n, 2 * d, 2 * h, 2 * w, c).permute(0, 4, 1, 2, 3)


class _Haar(torch.autograd.Function):
    """Haar transform of even sizes. The transform is orthogonal, so the gradient of each direction is the other one;
    this saves the copies that autograd would make for every slice and permutation."""

    @staticmethod
    def forward(ctx, x: Tensor, inverse: bool) -> Tensor:
        ctx.inverse = inverse
        return _haar_inverse(x) if inverse else _haar_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.autocast(grad.device.type, enabled=False):
            return (_haar_forward(grad) if ctx.inverse else _haar_inverse(grad)), None


def _haar(x: Tensor, inverse: bool) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Haar.apply(x, inverse)
    return _haar_inverse(x) if inverse else _haar_forward(x)


class WaveletTransform3d(nn.Module):
    """One level of a separable 3D wavelet transform, (N, C, D, H, W) to (N, 8 C, ...), and its inverse.

    Haar multiplies 2 x 2 x 2 blocks by one orthogonal 8 x 8 matrix. Every other orthogonal or biorthogonal wavelet uses
    the filter banks of ``pytorch_wavelets`` along the three axes.

    Args:
        wavelet: one of PyWavelets' names (``pywt.wavelist(kind="discrete")``).

    Raises:
        ValueError: for a name that PyWavelets does not know.
    """

    def __init__(self, wavelet: str = "haar") -> None:
        super().__init__()
        self.wavelet = wavelet
        if wavelet in ("haar", "db1"):
            self.filters = nn.ParameterList()
            return
        import pywt
        from pytorch_wavelets.dwt.lowlevel import prep_filt_afb1d, prep_filt_sfb1d

        if wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(f"unknown wavelet '{wavelet}': use one of pywt.wavelist(kind='discrete')")
        w = pywt.Wavelet(wavelet)
        taps = [*prep_filt_afb1d(w.dec_lo, w.dec_hi), *prep_filt_sfb1d(w.rec_lo, w.rec_hi)]
        self.filters = nn.ParameterList(nn.Parameter(t.flatten(), requires_grad=False) for t in taps)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, D, H, W) to (N, 8 C, ...), in the precision of ``x``: autocast would round the image."""
        with torch.autocast(x.device.type, enabled=False):
            return self._filter_forward(x) if self.filters else self._pad_and_transform(x)

    def inverse(self, bands: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """Transform (N, 8 C, ...) back to (N, C, *size). ``size`` is the spatial size that was transformed."""
        with torch.autocast(bands.device.type, enabled=False):
            x = self._filter_inverse(bands, size) if self.filters else _haar(bands, inverse=True)
            return x[:, :, : size[0], : size[1], : size[2]]

    @staticmethod
    def _pad_and_transform(x: Tensor) -> Tensor:
        odd = [size % 2 for size in x.shape[2:]]
        if any(odd):  # one more sample at the end equals the half-sample symmetric extension
            x = F.pad(x, (0, odd[2], 0, odd[1], 0, odd[0]), mode="replicate")
        return _haar(x, inverse=False)

    def _filter_forward(self, x: Tensor) -> Tensor:
        from pytorch_wavelets.dwt.lowlevel import afb1d

        channels = x.shape[1]
        for axis in (2, 3, 4):  # each pass appends its letter to the band's name, so depth is the slowest
            lines, back = _as_images(x, axis)
            bands = afb1d(lines, *(f.to(x).view(1, 1, -1, 1) for f in self.filters[:2]), mode="symmetric", dim=2)
            x = back(bands.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))
        return x.unflatten(1, (2, 2, 2, channels)).permute(0, 3, 2, 1, 4, 5, 6, 7).flatten(1, 4)

    def _filter_inverse(self, bands: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        from pytorch_wavelets.dwt.lowlevel import sfb1d

        filters = [f.to(bands).view(1, 1, -1, 1) for f in self.filters[2:]]
        x = bands.unflatten(1, (2, 2, 2, -1)).permute(0, 3, 2, 1, 4, 5, 6, 7).flatten(1, 4)
        for axis, length in zip((4, 3, 2), reversed(size)):
            low, high = x.chunk(2, dim=1)
            (low, back), (high, _) = _as_images(low, axis), _as_images(high, axis)
            x = back(sfb1d(low, high, *filters, mode="symmetric", dim=2)[:, :, :length])
        return x


def _as_images(x: Tensor, axis: int):
    """Move ``axis`` to the front and flatten the other two, for a 1D filter bank that works on images. Return these
    images and the function that undoes it."""
    rest = [a for a in (2, 3, 4) if a != axis]
    order = (0, 1, axis, *rest)
    sizes = [x.shape[a] for a in rest]
    images = x.permute(order).flatten(3)

    def back(y: Tensor) -> Tensor:
        y = y.unflatten(3, sizes)
        return y.permute([order.index(a) for a in range(5)])

    return images, back
