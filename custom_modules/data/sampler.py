"""Random batches of patients, each a function of its position in the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

logger = logging.getLogger(__name__)


def seed_of(*numbers: int) -> int:
    """Return one seed of 32 bits for a tuple of counters, such as (seed, step, position). Every random draw is a
    function of its position in the run, so that a resumed run draws what the uninterrupted one would have drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededDataset(Dataset):
    """Items of another dataset, each drawn with its own seed: the key is (index, seed).

    Args:
        dataset: has a random ``transform``, or is itself :class:`~monai.transforms.Randomizable`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.random = dataset if isinstance(dataset, Randomizable) else dataset.transform

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sizes(self) -> list[int]:
        """Voxels of each item: the dataset's own ``sizes``, or those of the CTs that a ``CacheDataset`` holds."""
        return (
            self.dataset.sizes if hasattr(self.dataset, "sizes") else [i["label"].numel() for i in self.dataset._cache]
        )

    @property
    def unpaired(self) -> list[bool]:
        """Of each item whether there is no MR, so that it is simulated."""
        return ["image" not in entry for entry in self.dataset.data]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        self.random.set_random_state(seed)
        return self.dataset[index]


class PatientSampler(Sampler[list[tuple[int, int]]]):
    """Batches of different patients as (index, seed) keys of a :class:`SeededDataset`. Larger volumes are drawn more
    often, in proportion to the square root of their voxels; those without an MR make up ``unpaired_share`` of all.

    A batch is a function of its number in the run, so that a run can resume anywhere: set ``start``. Batches of one
    optimiser step (``accumulation`` per rank) share no patient if there are enough.

    Args:
        dataset: has the ``sizes`` of the patients' volumes in voxels, which are read when an epoch starts.
        batch_size: patients per batch, at least 2 with the disentanglement loss.
        batches: batches of this rank per epoch.
        accumulation: batches of a rank that make up one optimiser step.
        rank, world_size: of this process.
        unpaired_share: of the items drawn where the dataset has patients of both kinds.
        distinct: no patient twice in a batch. Without it the shares also hold in batches that are large for the number
            of patients.

    If there are fewer patients than ``batch_size``, batches hold all of them, and a warning is logged.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        batches: int,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        unpaired_share: float = 0.5,
        distinct: bool = True,
    ) -> None:
        self.unpaired_share, self.distinct = unpaired_share, distinct
        self.dataset, self.batch_size, self.batches, self.seed = dataset, batch_size, batches, seed
        self.rank, self.world_size, self.group, self.start = rank, world_size, world_size * accumulation, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        weights = self._weights()
        if len(weights) < self.batch_size and self.distinct:
            logger.warning("batches of %d patients instead of %d: there are no more", len(weights), self.batch_size)
            self.batch_size = len(weights)
        first, self.start = self.start, (self.start // self.batches + 1) * self.batches
        for iteration in range(first, self.start):
            yield self._batch(iteration * self.world_size + self.rank, weights)

    def _weights(self) -> torch.Tensor:
        """How often each patient is drawn."""
        weights = torch.tensor(self.dataset.sizes, dtype=torch.float64).sqrt()
        unpaired = torch.tensor(getattr(self.dataset, "unpaired", [False] * len(weights)))
        if unpaired.any() and not unpaired.all():
            for group, share in ((unpaired, self.unpaired_share), (~unpaired, 1 - self.unpaired_share)):
                weights[group] *= share / weights[group].sum()
        return weights

    def _batch(self, number: int, weights: torch.Tensor) -> list[tuple[int, int]]:
        step, part = divmod(number, self.group)
        size = self.batch_size
        if not self.distinct:
            generator = torch.Generator().manual_seed(seed_of(self.seed, number))
            patients = torch.multinomial(weights, size, replacement=True, generator=generator)
        elif size * self.group <= len(weights):
            generator = torch.Generator().manual_seed(seed_of(self.seed, step))
            patients = torch.multinomial(weights, size * self.group, generator=generator)[part * size :][:size]
        else:
            generator = torch.Generator().manual_seed(seed_of(self.seed, step, part))
            patients = torch.multinomial(weights, size, generator=generator)
        return [(int(patient), seed_of(self.seed, number, n)) for n, patient in enumerate(patients)]
