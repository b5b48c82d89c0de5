"""Devices and processes: what a config needs to know of ``torchrun``."""

from __future__ import annotations

import datetime
import os

import torch
from torch import nn

TIMEOUT = datetime.timedelta(hours=2)  # one rank may encode or validate while the others wait


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


def start() -> None:
    """Join the processes that ``torchrun`` started: NCCL on GPUs, gloo on CPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def wrap(network: nn.Module) -> nn.Module:
    """``network`` for distributed data parallel training."""
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def unwrapped(network: nn.Module) -> nn.Module:
    """``network`` as it is, for training in one process."""
    return network
