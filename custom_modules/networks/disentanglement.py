"""Latent Structure-Modality Disentanglement (section III.B, Fig. 3): the loss on pairs of patients."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from custom_modules.networks.autoencoder import WaveletAutoencoderKL


class Cosines(NamedTuple):
    """Cosines of structure within a pair (Eq. 3) and between patients (Eq. 4), and of modality within a pair (Eq. 5)
    and between patients (Eq. 6). Each is a sum of two cosines in [-2, 2], averaged over the batch."""

    structure_pair: Tensor
    structure_unpaired: Tensor
    modality_pair: Tensor
    modality_unpaired: Tensor


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def latent_cosines(z_mr: Tensor, z_ct: Tensor, pooled: bool = False) -> Cosines:
    """Compute the cosines between the halves of the latents of several patients (Eqs. 3 to 6).

    Args:
        z_mr: (N, c, d, h, w), one patient per row.
        z_ct: CT latents of the same patients. The other patient of row n is row n + 1, cyclically.
        pooled: take the mean of M over space first. Eq. 6 wants M of different patients to be the same in every voxel,
            which leaves it nothing of the image but a constant; pooled, only that constant is asked for.

    Raises:
        ValueError: for fewer than two patients, because unpaired cosines are not defined then.
    """
    if len(z_mr) < 2:
        raise ValueError("disentanglement needs at least two different patients in a batch, got one")
    s_mr, m_mr = WaveletAutoencoderKL.split(z_mr)
    s_ct, m_ct = WaveletAutoencoderKL.split(z_ct)
    if pooled:
        m_mr, m_ct = (m.mean(dim=(2, 3, 4)) for m in (m_mr, m_ct))

    def pair(ct: Tensor, mr: Tensor) -> Tensor:
        return 2 * _cosine(ct, mr).mean()

    def unpaired(ct: Tensor, mr: Tensor) -> Tensor:
        return (_cosine(ct, ct.roll(-1, 0)) + _cosine(mr, mr.roll(-1, 0))).mean()

    return Cosines(pair(s_ct, s_mr), unpaired(s_ct, s_mr), pair(m_ct, m_mr), unpaired(m_ct, m_mr))


def disentanglement_loss(cosines: Cosines) -> Tensor:
    """L_D = L_stru + L_modal (Eqs. 1, 2 and 7), in [-8, 8]."""
    structure = -cosines.structure_pair + cosines.structure_unpaired
    modality = cosines.modality_pair - cosines.modality_unpaired
    return structure + modality
