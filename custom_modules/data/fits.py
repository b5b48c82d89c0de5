"""Whether a volume fits into main memory, by its header."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from custom_modules.data.volumes import name_of, read_grid
from custom_modules.errors import InputError
from custom_modules.memory import GIB, free_memory, needed_memory


class CheckMemoryd(MapTransform):
    """Refuse a volume that cannot fit into main memory by its header, before it is read.

    Args:
        keys: paths of volumes, or volumes in memory.
        spacing: of the networks' grid, mm.
        limit: GiB that the process may hold; what the machine has free when None, or when the limit is that of another
            ``device``.

    Raises:
        InputError: with what is needed and what there is.
    """

    def __init__(
        self, keys: KeysCollection, spacing: Sequence[float], limit: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(keys)
        self.spacing, self.limit = spacing, limit if torch.device(device).type == "cpu" else None

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            grid = read_grid(data[key])
            if grid is None:  # whoever reads it says what is wrong with it
                continue
            shape, spacing = grid
            need = needed_memory(shape, spacing, self.spacing)
            free = free_memory(torch.device("cpu"), self.limit)
            if need > free:
                size, steps = (" x ".join(f"{value:g}" for value in values) for values in (shape, spacing))
                raise InputError(
                    f"{name_of(data[key])}: {size} voxels of {steps} mm need about {need / GIB:.1f} GiB of memory, "
                    f"{max(free, 0) / GIB:.1f} GiB may be taken; crop or resample it, free memory, or raise "
                    "--memory_limit"
                )
        return data
