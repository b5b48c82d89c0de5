"""Latents of whole volumes, encoded once and cropped at random."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
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
    """MR and CT latents of whole volumes, encoded before training; an item is a random crop of one.

    Every patient is encoded in ``copies`` augmented copies (posterior means, kept in half precision), so that stage 2
    spends its time on the denoiser. Latents come from whole volumes, as in sampling, so that a crop contains what the
    autoencoder saw around it. If the latent scale of the network is not set, it is set here, from the training latents.
    The encoder is the one that the network has here at first: training may change it for the MR
    (:class:`~custom_modules.training.batches.OneStepEstimate`), but what a CT latent is stays.

    Items have ``image``, the CT latent, and ``z_mr``, both (c, *roi / f) and normalised; at the same place ``mr`` and
    ``label``, MR and CT (1, *roi) in [-1, 1], and ``valid`` (1, *roi), see :func:`valid_voxels`; and ``patient``.

    Args:
        data: datalist of ``image`` and ``label``.
        transform: deterministic transforms, then random ones; its results are images in [-1, 1].
        network: has the weights of the autoencoder.
        roi_size: of a crop, in image voxels.
        copies: augmented copies of each patient.
        workers: processes that read and augment. The copies do not depend on their number.
        renewed: copies of each patient that new ones replace at the start of each epoch but the first, the oldest
            first. The workers prepare them while the network trains.
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
        renewed: int = 0,
    ) -> None:
        super().__init__(data, transform)
        self.network, self.roi_size, self.copies, self.amp = network, roi_size, copies, amp
        self.seed, self.workers, self.renewed = seed, workers, renewed
        self.autoencoder = copy.deepcopy(network.autoencoder)
        self.set_random_state(seed)
        self.latents: list[list[dict[str, Any]]] = []

    def encode(self, engine: Engine | None = None) -> None:
        """Encode the copies of all patients; call it once, before the first item is read. With an ``engine`` they are
        renewed in its later epochs. A copy is a function of the seed and its number, and the numbers in use are one of
        the epoch, so that a resumed run has the copies that the uninterrupted one would have."""
        first = self.renewed * (engine.state.epoch if engine else 0)
        images = SeededDataset(ProcessCacheDataset(self.data, self.transform, num_workers=self.workers))
        stream = self._stream(images, first)
        latents: list[list[dict[str, Any]]] = [[{}] * self.copies for _ in self.data]
        for _ in tqdm(range(self.copies * len(self.data)), desc="encoding", unit="volume"):
            number, patient, item = next(stream)
            latents[patient][number % self.copies] = item
        if not self.network.has_latent_scale:
            for modality, key in (("MR", "z_mr"), ("CT", "image")):
                self.network.set_latent_scale(modality, [copies[0][key].float() for copies in latents])
        for item in itertools.chain(*latents):
            self._normalize(item)
        self.network.set_air_latent(self.autoencoder)
        place = _place(latents, self.network.device)
        self.latents = [[_moved(item, place) for item in copies] for copies in latents]
        if engine and self.renewed:
            engine.add_event_handler(Events.EPOCH_STARTED, _Renewal(self, stream, first, place))
        else:
            stream.close()  # and with it the workers

    def _stream(self, images: Dataset, first: int) -> Generator[tuple[int, int, dict[str, Any]], None, None]:
        """Encode copy after copy of all patients from number ``first`` on, those that are in use at once or, where
        copies are renewed, without an end: (number, patient, latents)."""
        count = len(self.data)
        numbers = itertools.count(first) if self.renewed else range(first, first + self.copies)
        order, keys = itertools.tee((number, patient) for number in numbers for patient in range(count))
        ahead = max(2, -(-self.renewed * count // self.workers)) if self.workers else None  # of each worker
        loader = DataLoader(
            images, batch_size=1, sampler=((patient, seed_of(self.seed, number, patient)) for number, patient in keys),
            num_workers=self.workers, prefetch_factor=ahead,
        )  # fmt: skip
        for (number, patient), batch in zip(order, loader):
            yield number, patient, self._encode(batch)

    @property
    def sizes(self) -> list[int]:
        """Latent voxels of each patient."""
        return [copies[0]["image"][0].numel() for copies in self.latents]

    @torch.no_grad()
    def _encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.network.device
        mr, ct = (
            pad_to_windows(_as_tensor(batch, key, device, False), self.roi_size, self.network.downsampling)[0]
            for key in ("image", "label")
        )
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            z_mr, z_ct = self.autoencoder.encode(torch.cat([mr, ct]))[0].half()
        item = {"image": z_ct, "z_mr": z_mr, "valid": valid_voxels(mr, ct)[0], "mr": mr[0].half(),
                "label": ct[0].half()}  # fmt: skip
        return {**_moved(item, torch.device("cpu")), "patient": batch["patient"][0]}

    def _normalize(self, item: dict[str, Any]) -> dict[str, Any]:
        for modality, key in (("MR", "z_mr"), ("CT", "image")):
            item[key] = self.network.normalize(item[key][None].float(), modality)[0].half()
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        copy = self.latents[index][self.R.randint(len(self.latents[index]))]
        f = self.network.autoencoder.downsampling
        roi = [size // f for size in self.roi_size]
        start = [self.R.randint(size - r + 1) for size, r in zip(copy["image"].shape[1:], roi)]

        def crop(volume: Tensor, scale: int) -> Tensor:
            return volume[(..., *(slice(s * scale, (s + r) * scale) for s, r in zip(start, roi)))].float()

        scales = {"image": 1, "z_mr": 1, "valid": f, "mr": f, "label": f}
        return {key: crop(value, scales[key]) if key in scales else value for key, value in copy.items()}


class _Renewal:
    """Handler of the start of an epoch: the oldest copies make way for those that are due, from ``first`` on."""

    def __init__(self, dataset: LatentDataset, stream: Iterator, first: int, place: torch.device) -> None:
        self.dataset, self.stream, self.first, self.place = dataset, stream, first, place

    def __call__(self, engine: Engine) -> None:
        dataset = self.dataset
        due = dataset.renewed * (engine.state.epoch - 1)
        for _ in range((due - self.first) * len(dataset.data)):
            number, patient, item = next(self.stream)
            dataset.latents[patient][number % dataset.copies] = _moved(dataset._normalize(item), self.place)
        self.first = due


def _place(latents: list[list[dict[str, Any]]], device: torch.device) -> torch.device:
    """Return where what is cropped is kept: the device, so that no step waits for copies, if it takes less than half of
    what is free there; else the CPU."""
    needed = sum(value.nbytes for item in itertools.chain(*latents) for value in item.values() if _is_tensor(value))
    return device if device.type != "cpu" and 2 * needed < free_memory(device) else torch.device("cpu")


def _moved(item: dict[str, Any], place: torch.device) -> dict[str, Any]:
    return {key: value.to(place) if _is_tensor(value) else value for key, value in item.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
