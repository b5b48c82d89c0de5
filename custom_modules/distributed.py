"""Devices and processes: what a config needs to know of ``torchrun``."""

from __future__ import annotations

import os

import torch
from torch import nn


def rank() -> int:
    """Number of this process among those that ``torchrun`` started, 0 without it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def wrap(network: nn.Module) -> nn.Module:
    """``network`` for distributed data parallel training, on the GPU of this process if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def unwrapped(network: nn.Module) -> nn.Module:
    """``network`` as it is, for training in one process."""
    return network
