"""The losses of the training stages: Eq. 8 with its adversarial term, Eq. 12, and the error of the decoded estimate."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from custom_modules.data.hu import BONE_HU
from custom_modules.networks.disentanglement import disentanglement_loss, latent_cosines
from custom_modules.training.adversary import Adversary


class AutoencoderLoss(nn.Module):
    """L_pre (Eq. 8): L2 reconstruction + alpha KL + beta L_D + gamma adversarial.

    KL is averaged over latent elements, so that alpha does not depend on the crop size. ``terms`` holds the value of
    every term at the last call, and the cosines of Eqs. 3 to 6.

    Args:
        kl_weight: alpha.
        disentanglement_weight: beta; 0 disables disentanglement (the paper's ablation).
        adversary: the adversarial term, which includes gamma; no such term when None.
        perceptual: optional further term that maps (reconstruction, target) to a scalar, such as MONAI's
            ``PerceptualLoss``.
        perceptual_weight: factor on that term.
        pooled_modality: ``pooled`` of :func:`~custom_modules.networks.disentanglement.latent_cosines`.
    """

    def __init__(
        self,
        kl_weight: float = 2e-5,
        disentanglement_weight: float = 3e-3,
        adversary: Adversary | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: float = 1e-3,
        pooled_modality: bool = True,
    ) -> None:
        super().__init__()
        self.kl_weight, self.disentanglement_weight = kl_weight, disentanglement_weight
        self.pooled_modality = pooled_modality
        self.adversary, self.perceptual, self.perceptual_weight = adversary, perceptual, perceptual_weight
        self.terms: dict[str, float] = {}

    def forward(self, output: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, latent, mean, log_variance = output
        recon_mr, recon_ct = F.mse_loss(reconstruction.float(), target, reduction="none").chunk(2)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        z_mr, z_ct = latent.chunk(2)
        cosines = latent_cosines(z_mr, z_ct, self.pooled_modality)
        terms = {
            "reconstruction_mr": recon_mr.mean(),
            "reconstruction_ct": recon_ct.mean(),
            "kl": kl,
            "disentanglement": disentanglement_loss(cosines),
        }
        loss = 0.5 * (terms["reconstruction_mr"] + terms["reconstruction_ct"]) + self.kl_weight * kl
        if self.disentanglement_weight:
            loss = loss + self.disentanglement_weight * terms["disentanglement"]
        if self.adversary is not None:
            terms["adversarial"] = self.adversary(reconstruction)
            loss = loss + terms["adversarial"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction.float(), target)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        terms |= {"loss": loss, **{f"cosine_{name}": value for name, value in cosines._asdict().items()}}
        self.terms = {name: float(value.detach()) for name, value in terms.items()}
        return loss


def valid_voxels(mr: Tensor, ct: Tensor) -> Tensor:
    """Return the mask of valid voxels of a pair. Voxels where the MR shows tissue and the CT air are not valid: there
    the body extends beyond the field of view of the CT.

    Both are in [-1, 1]. Tissue is MR above 8 % of its window, air is CT in the lowest 23 % of its window (below -400
    HU).
    """
    return ~((mr > -0.84) & (ct < -0.54))


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1)


class ValidL1Loss(nn.Module):
    """L1 between an image and the CT, both (N, 1, D, H, W) in [-1, 1], over valid voxels (:func:`valid_voxels`).

    L1 alone leads to the median: where bone is less likely than not, there is none. Bone that counts more than once
    appears earlier.

    Two samples of the same CTs, stacked to (2N, 1, D, H, W), are compared by the continuous ranked probability score
    instead, E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007), for each voxel: the L1 that is left when the samples
    are as far from each other as from the CT. It is smallest where their distribution is that of the CT.

    Args:
        bone_weight: weight of voxels whose CT is bone; all others have 1.
        hu_window: HU at -1 and at 1.
    """

    def __init__(self, bone_weight: float = 1.0, hu_window: tuple[float, float] = (-1000.0, 1600.0)) -> None:
        super().__init__()
        low, high = hu_window
        self.bone_weight, self.bone = bone_weight, 2 * (BONE_HU - low) / (high - low) - 1

    def forward(self, image: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        ct, valid = target
        images = image.float().split(len(ct))
        error = sum((image - ct).abs() for image in images) / len(images)
        if len(images) == 2:
            error = error - (images[0] - images[1]).abs() / 2
        return _weighted_mean(error, valid * (1 + (self.bone_weight - 1) * (ct > self.bone)))


class LatentDiffusionLoss(nn.Module):
    """The latent diffusion loss (Eq. 12): L2 between the denoiser's output and the target of the schedule, over latent
    voxels in which at most one image voxel in twenty is invalid.

    ``prediction`` is (N, c, d, h, w); ``target`` is (the schedule's target, valid (N, 1, D, H, W)).
    """

    def forward(self, prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        clean, valid = target
        whole = F.adaptive_avg_pool3d(valid, prediction.shape[2:]) > 0.95
        return _weighted_mean((prediction.float() - clean).square().mean(dim=1, keepdim=True), whole)


class EstimateLoss(nn.Module):
    """``image_weight`` times the L1 between decoded estimate and CT, plus ``latent_weight`` times the latent diffusion
    loss (Eq. 12), both over valid voxels. Without the first term (a weight of 0) the estimate may be None. Two samples
    of each of the first crops add the score of :class:`ValidL1Loss` to the first term.

    ``bone_weight`` and ``hu_window`` are those of :class:`ValidL1Loss`.
    """

    def __init__(
        self,
        image_weight: float = 1.0,
        latent_weight: float = 0.02,
        bone_weight: float = 1.0,
        hu_window: tuple[float, float] = (-1000.0, 1600.0),
    ) -> None:
        super().__init__()
        self.image_weight, self.latent_weight = image_weight, latent_weight
        self.image_loss, self.latent_loss = ValidL1Loss(bone_weight, hu_window), LatentDiffusionLoss()

    def forward(self, output: tuple[Tensor, Tensor | None], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (prediction, image), (clean, valid, ct) = output, target
        loss = self.latent_weight * self.latent_loss(prediction, (clean, valid))
        if image is None:
            return loss
        loss = loss + self.image_weight * self.image_loss(image[: len(ct)], (ct, valid))
        if pairs := (len(image) - len(ct)) // 2:
            loss = loss + self.image_weight * self.image_loss(image[len(ct) :], (ct[:pairs], valid[:pairs]))
        return loss
