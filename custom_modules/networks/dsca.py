"""Dual Skip Connection Attention (section III.C, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.blocks import ChannelRMSNorm


def split_windows(x: Tensor, window: int) -> Tensor:
    """Cut (N, C, D, H, W) into windows that share no voxel, (N * windows, C, *sides), with ``window`` voxels per side,
    or fewer where ``x`` has fewer. The last windows are filled up by repeating the edge."""
    # MONAI's window_partition and window_reverse (SwinUNETR) do the same, but programs exported with them (or with
    # len(x)) refuse a batch of one
    n, channels, *size = x.shape
    (a, b, c), (i, j, k) = _grid(size, window)
    missing = [side * count - length for side, count, length in zip((a, b, c), (i, j, k), size)]
    if any(missing):
        x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
    cut = x.permute(0, 2, 3, 4, 1).reshape(n, i, a, j, b, k, c, channels)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(n * i * j * k, a, b, c, channels).permute(0, 4, 1, 2, 3)


def join_windows(windows: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """Put together what :func:`split_windows` cut into ``windows``, of ``shape`` (N, C, D, H, W)."""
    n, channels, *size = shape
    (a, b, c), (i, j, k) = _grid(size, window)
    cut = windows.permute(0, 2, 3, 4, 1).reshape(n, i, j, k, a, b, c, channels)
    whole = cut.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, i * a, j * b, k * c, channels)
    return whole.permute(0, 4, 1, 2, 3)[..., : size[0], : size[1], : size[2]]


def _grid(size: Sequence[int], window: int) -> tuple[list[int], list[int]]:
    """Return the sides of a window, and how many windows there are along each axis."""
    sides = [min(window, length) for length in size]
    return sides, [-(-length // side) for length, side in zip(size, sides)]


class _CrossAttention(nn.Module):
    """Single-head attention: query from skip features, key and value from one half of the MR latent. Every window of
    ``window`` voxels per side attends to its own keys."""

    def __init__(self, channels: int, context_channels: int, attention_channels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = ChannelRMSNorm(channels)
        self.query = nn.Conv3d(channels, attention_channels, 1)
        self.key = nn.Conv3d(context_channels, attention_channels, 1)
        self.value = nn.Conv3d(context_channels, attention_channels, 1)
        self.out = nn.Conv3d(attention_channels, channels, 1)
        nn.init.zeros_(self.out.weight)  # an untrained module is a plain skip connection
        nn.init.zeros_(self.out.bias)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V, each (windows, d h w, attention_channels), of windows (windows, c / 2, d, h, w) of one half
        of the MR latent."""
        return _tokens(self.key(context)), _tokens(self.value(context))

    def attend(self, features: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query and softmax(Q K^T / sqrt(d)) V, both (N, attention_channels, D, H, W)."""
        query = self.query(self.norm(features))
        windows = split_windows(query, self.window)
        q, k, v = (x[:, None] for x in (_tokens(windows), key, value))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return query, join_windows(attended.unflatten(2, windows.shape[2:]), query.shape, self.window)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class StructureEmphasis(_CrossAttention):
    """SEM: A_stru = softmax(Q_s K_s^T / sqrt(d_K1)) V_s, keys and values from S_MR (Eq. 9), then a projection."""

    def forward(self, features: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.out(self.attend(features, key, value)[1])


class ModalityFiltering(_CrossAttention):
    """MFM: A_modal = Q_m - softmax(Q_m K_m^T / sqrt(d_K2)) V_m, keys and values from M_MR (Eq. 10), then a
    projection."""

    def forward(self, features: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, attended = self.attend(features, key, value)
        return self.out(query - attended)


class DualSkipConnectionAttention(nn.Module):
    """E_i + SEM(E_i, S_MR) + MFM(E_i, M_MR), concatenated with D_i (Fig. 4).

    Args:
        channels: of E_i.
        latent_channels: c of Z_MR, whose halves are S_MR and M_MR.
        attention_channels: d_K of both attentions.
        window: voxels of E_i along each side of a window; the windows of Z_MR lie at the same places.
    """

    def __init__(self, channels: int, latent_channels: int, attention_channels: int, window: int) -> None:
        super().__init__()
        half = latent_channels // 2
        self.structure_emphasis = StructureEmphasis(channels, half, attention_channels, window)
        self.modality_filtering = ModalityFiltering(channels, half, attention_channels, window)

    def keys_and_values(self, z_mr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return K and V of S_MR, then of M_MR, for windows (windows, c, d, h, w) of Z_MR, pooled or not."""
        structure, modality = WaveletAutoencoderKL.split(z_mr)
        return (
            *self.structure_emphasis.keys_and_values(structure),
            *self.modality_filtering.keys_and_values(modality),
        )

    def forward(self, encoder_features: Tensor, decoder_features: Tensor, *keys_and_values: Tensor) -> Tensor:
        """Map E_i (N, C, D, H, W), D_i (N, C', D, H, W) and :meth:`keys_and_values` to (N, C + C', D, H, W)."""
        structure, modality = keys_and_values[:2], keys_and_values[2:]
        skip = encoder_features + self.structure_emphasis(encoder_features, *structure)
        skip = skip + self.modality_filtering(encoder_features, *modality)
        return torch.cat([skip, decoder_features], dim=1)
