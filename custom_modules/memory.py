"""How much memory there is, and what to do when there is less than was hoped for."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from monai.utils import optional_import

from custom_modules.errors import InputError

# missing only where nothing but PyTorch and MONAI is installed, to take the figures of a GPU
psutil, _ = optional_import("psutil")
resource, _ = optional_import("resource")  # missing on Windows, which psutil serves
pynvml, has_pynvml = optional_import("pynvml")

logger = logging.getLogger(__name__)

# Activations of a window at the denoiser's peak, in copies of the features of its finest scale in single precision: a
# cautious count of a residual block, its skip and the attention, not yet measured on a GPU.
COPIES = 16
CPU_BATCH = 4
LARGEST_BATCH = 32
GIB = 2**30
# Bytes of main memory at the peaks of the pipeline, by benchmarks/memory.py: for each voxel of the file, of the
# networks' grid and of the slab that is resampled at once; besides that the libraries, and the smallest tile with what
# the allocator keeps.
FIXED_BYTES = 400 * 2**20
READING = {"file": 17.5, "grid": 4, "slab": 45}
FINDING = {"file": 11, "grid": 21}  # the body, and on the way back the writing
SYNTHESIS = {"file": 13, "grid": 20, "tile": 420}
SLAB, TILE = 2**22, 2**21  # voxels of a slab, and of the smallest tile

Result = TypeVar("Result")


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that no process has taken on a CUDA device, by NVML; by the CUDA runtime where NVML is not to be had."""
    if not has_pynvml:
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return int(torch.cuda.mem_get_info(device)[0])


def free_memory(device: torch.device, limit: float | None = None) -> int:
    """Bytes that may still be taken on ``device``: what is free there, and no more than is left of ``limit``.

    Args:
        limit: GiB that this process may hold in all, on CPU of main memory, on CUDA of the device's.
    """
    if device.type == "cuda":
        free, held = free_gpu_memory(device), torch.cuda.memory_reserved(device)
        free += held - torch.cuda.memory_allocated(device)  # reserved by PyTorch, and not in use
    else:
        free, held = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    return int(free if limit is None else min(free, limit * GIB - held))


def window_batch(device: torch.device, latent_voxels: int, channels: int, limit: float | None = None) -> int:
    """Windows of ``latent_voxels`` that are denoised at once: on CPU a fixed few, on CUDA as many as fit in half of the
    free memory."""
    if device.type != "cuda":
        return CPU_BATCH
    window = latent_voxels * channels * COPIES * torch.float32.itemsize
    return max(1, min(LARGEST_BATCH, free_memory(device, limit) // 2 // window))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on CUDA or on CPU (which has no exception of its own for it)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halve_when_out_of_memory(work: Callable[[int], Result], amount: int, least: int, unit: str) -> Result:
    """``work(amount)``; each time memory runs out, again with half of ``amount``, and the log says so.

    Raises:
        InputError: when ``least``, or an ``amount`` below it, is too much as well.
    """
    while True:
        try:
            return work(amount)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler, whose traceback would hold on to the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if amount <= least:
            raise InputError(f"out of memory even with {amount} {unit} at once; free some, or take another --device")
        amount = max(amount // 2, least)
        logger.warning("out of memory: going on with %d %s at once", amount, unit)


def needed_memory(shape: Sequence[int], spacing: Sequence[float], grid_spacing: Sequence[float]) -> int:
    """Bytes of main memory that the pipeline takes for a volume at its peak, by its header: voxels and their spacing in
    mm, and the spacing of the networks' grid."""
    grid = math.prod(max(1.0, n * s / t) for n, s, t in zip(shape, spacing, grid_spacing))
    amounts = {"file": math.prod(shape), "grid": grid, "slab": min(grid, SLAB), "tile": min(grid, TILE)}
    peaks = (sum(of[name] * amounts[name] for name in of) for of in (READING, FINDING, SYNTHESIS))
    return int(FIXED_BYTES + max(peaks))


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory that this process has held so far: on the GPU where that is the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux
