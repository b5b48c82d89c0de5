"""Devices and the processes of ``torchrun``, for configs."""

from __future__ import annotations

import os

import torch
from torch import nn


def rank() -> int:
    """Return the number of this process among those that ``torchrun`` started; 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_device() -> torch.device:
    """Return the GPU of this process, otherwise the CPU."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def wrap(network: nn.Module) -> nn.Module:
    """Wrap ``network`` for distributed data parallel training, on the GPU of this process if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def unwrapped(network: nn.Module) -> nn.Module:
    """Return ``network`` unchanged, for training in one process."""
    return network
