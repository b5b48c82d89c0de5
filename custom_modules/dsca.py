"""Dual Skip Connection Attention (section III.C, Fig. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_modules.autoencoder import WaveletAutoencoderKL
from custom_modules.blocks import ChannelRMSNorm


def pool_to_tokens(z: Tensor, max_tokens: int) -> Tensor:
    """Average-pool (N, c, d, h, w) by the smallest power of two that leaves at most ``max_tokens`` voxels."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be 1 or more, got {max_tokens}")
    factor = 1
    while torch.Size(-(-size // factor) for size in z.shape[2:]).numel() > max_tokens:
        factor *= 2
    return F.avg_pool3d(z, [min(factor, size) for size in z.shape[2:]], ceil_mode=True)


class _CrossAttention(nn.Module):
    """Query from skip features, key and value from one half of the MR latent; single head."""

    def __init__(self, channels: int, context_channels: int, attention_channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels)
        self.query = nn.Conv3d(channels, attention_channels, 1)
        self.key = nn.Conv3d(context_channels, attention_channels, 1)
        self.value = nn.Conv3d(context_channels, attention_channels, 1)
        self.out = nn.Conv3d(attention_channels, channels, 1)
        nn.init.zeros_(self.out.weight)  # a fresh module is a plain skip connection
        nn.init.zeros_(self.out.bias)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a half of the (pooled) MR latent, each (N, tokens, attention_channels)."""
        return _tokens(self.key(context)), _tokens(self.value(context))

    def attend(self, features: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The query and softmax(Q K^T / sqrt(d)) V, both (N, attention_channels, D, H, W)."""
        query = self.query(self.norm(features))
        q, k, v = (x[:, None] for x in (_tokens(query), key, value))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return query, attended.unflatten(2, query.shape[2:])


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
    """

    def __init__(self, channels: int, latent_channels: int, attention_channels: int) -> None:
        super().__init__()
        self.structure_emphasis = StructureEmphasis(channels, latent_channels // 2, attention_channels)
        self.modality_filtering = ModalityFiltering(channels, latent_channels // 2, attention_channels)

    def keys_and_values(self, z_mr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What DSCA takes of Z_MR (N, c, d, h, w), pooled or not: K and V of S_MR, then those of M_MR."""
        structure, modality = WaveletAutoencoderKL.split(z_mr)
        return (
            *self.structure_emphasis.keys_and_values(structure),
            *self.modality_filtering.keys_and_values(modality),
        )

    def forward(self, encoder_features: Tensor, decoder_features: Tensor, *keys_and_values: Tensor) -> Tensor:
        """E_i (N, C, D, H, W), D_i (N, C', D, H, W) and :meth:`keys_and_values` to (N, C + C', D, H, W)."""
        structure, modality = keys_and_values[:2], keys_and_values[2:]
        skip = encoder_features + self.structure_emphasis(encoder_features, *structure)
        skip = skip + self.modality_filtering(encoder_features, *modality)
        return torch.cat([skip, decoder_features], dim=1)
