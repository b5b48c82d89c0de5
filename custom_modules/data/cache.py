"""Volumes that are read once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.data import CacheDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from custom_modules.errors import cause


class ProcessCacheDataset(CacheDataset):
    """MONAI's ``CacheDataset``, filled by ``num_workers`` processes. MONAI fills it by threads, which take turns in
    what is not compiled: 38 volumes took about two minutes on 16 cores, as long as on one."""

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list[Any]:
        wanted = list(range(self.cache_num) if indices is None else indices)
        workers = min(self.num_workers or 1, len(wanted))
        if workers < 2:
            return super()._fill_cache(wanted)
        loader = DataLoader(_Items(self), batch_size=None, sampler=wanted, num_workers=workers, collate_fn=_unchanged)
        return [_own(item) for item in tqdm(loader, desc="reading", unit="volume", disable=not self.progress)]


class _Items(Dataset):
    """What a cache is to hold, or the exception that reading it raised: a worker would change its message."""

    def __init__(self, cache: ProcessCacheDataset) -> None:
        self.cache = cache

    def __getitem__(self, index: int) -> Any:
        try:
            return self.cache._load_cache_item(index)
        except Exception as error:
            return cause(error)


def _unchanged(item: Any) -> Any:
    return item


def _own(item: Any) -> dict[str, Any]:
    """Copy the tensors of an item out of the memory that a worker shares, of which each holds an open file."""
    if isinstance(item, Exception):
        raise item
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}
