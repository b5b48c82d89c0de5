"""Latents of whole volumes, encoded once and cropped at random."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Randomizable
from torch import Tensor
from tqdm import tqdm

from custom_modules.data.cache import ProcessCacheDataset
from custom_modules.data.sampler import SeededDataset, seed_of
from custom_modules.memory import free_memory
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.tiling import pad_to_windows
from custom_modules.training.batches import _as_tensor
from custom_modules.training.losses import valid_voxels


class LatentDataset(Randomizable, Dataset):
    """MR and CT latents of whole volumes, encoded once by the frozen autoencoder; an item is a random crop of one.

    Every patient is encoded in ``copies`` augmented copies (posterior means, kept in half precision), so that stage 2
    spends its time on the denoiser. Latents come from whole volumes, as in sampling, so that a crop contains what the
    autoencoder saw around it. If the latent scale of the network is not set, it is set here, from the training latents.

    Items have ``image``, the CT latent, and ``z_mr``, both (c, *roi / f) and normalised; at the same place ``mr`` and
    ``label``, MR and CT (1, *roi) in [-1, 1], and ``valid`` (1, *roi), see :func:`valid_voxels`; and ``patient``.

    Args:
        data: datalist of ``image`` and ``label``.
        transform: deterministic transforms, then random ones; its results are images in [-1, 1].
        network: has the weights of the autoencoder.
        roi_size: of a crop, in image voxels.
        copies: augmented copies of each patient.
        workers: processes that read and augment. The copies do not depend on their number.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        transform: Callable,
        network: Synthesizer,
        roi_size: Sequence[int],
        copies: int = 16,
        amp: bool = True,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        super().__init__(data, transform)
        self.network, self.roi_size, self.copies, self.amp = network, roi_size, copies, amp
        self.seed, self.workers = seed, workers
        self.set_random_state(seed)
        self.latents: list[list[dict[str, Any]]] = []

    def encode(self) -> None:
        """Encode all patients; call it once, before the first item is read. The same seed gives the same copies."""
        count = len(self.data)
        keys = [(patient, seed_of(self.seed, copy, patient)) for copy in range(self.copies) for patient in range(count)]
        images = SeededDataset(ProcessCacheDataset(self.data, self.transform, num_workers=self.workers))
        loader = DataLoader(images, batch_size=1, sampler=keys, num_workers=self.workers)
        latents: list[list[dict[str, Any]]] = [[] for _ in self.data]
        for (patient, _), batch in zip(keys, tqdm(loader, desc="encoding", unit="volume")):
            latents[patient].append(self._encode(batch))
        if not self.network.has_latent_scale:
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                self.network.set_latent_scale(modality, [copies[0][key].float() for copies in latents])
        for item in itertools.chain(*latents):
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                item[key] = self.network.normalize(item[key][None].float(), modality)[0].half()
        self.latents = _on_device(latents, self.network.device)

    @property
    def sizes(self) -> list[int]:
        """Latent voxels of each patient."""
        return [copies[0]["image"][0].numel() for copies in self.latents]

    @torch.no_grad()
    def _encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        network, device = self.network, self.network.latent_mean.device
        mr, ct = (
            pad_to_windows(_as_tensor(batch, key, device, False), self.roi_size, network.downsampling)[0]
            for key in ("image", "label")
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            z_mr, z_ct = network.autoencoder.encode(torch.cat([mr, ct]))[0].cpu().half()
        return {
            "image": z_ct, "z_mr": z_mr, "valid": valid_voxels(mr, ct)[0].cpu(),
            "mr": mr[0].cpu().half(), "label": ct[0].cpu().half(), "patient": batch["patient"][0],
        }  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Any]:
        copy = self.latents[index][self.R.randint(len(self.latents[index]))]
        f = self.network.autoencoder.downsampling
        roi = [size // f for size in self.roi_size]
        start = [self.R.randint(size - r + 1) for size, r in zip(copy["image"].shape[1:], roi)]

        def crop(volume: Tensor, scale: int) -> Tensor:
            return volume[(..., *(slice(s * scale, (s + r) * scale) for s, r in zip(start, roi)))].float()

        scales = {"image": 1, "z_mr": 1, "valid": f, "mr": f, "label": f}
        return {key: crop(value, scales[key]) if key in scales else value for key, value in copy.items()}


def _on_device(latents: list[list[dict[str, Any]]], device: torch.device) -> list[list[dict[str, Any]]]:
    """Move what is cropped to the device, so that no step waits for copies, if it takes less than half of what is free
    there."""
    items = [item for copies in latents for item in copies]
    needed = sum(value.nbytes for item in items for value in item.values() if isinstance(value, Tensor))
    if device.type != "cpu" and 2 * needed < free_memory(device):
        for item in items:
            item.update({key: value.to(device) for key, value in item.items() if isinstance(value, Tensor)})
    return latents
