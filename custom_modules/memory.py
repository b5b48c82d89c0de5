"""How much memory there is for a batch of windows."""

from __future__ import annotations

import pynvml
import torch

# Activations of a window at the denoiser's peak, in copies of the features of its finest scale in single precision: a
# cautious count of a residual block, its skip and the attention, not yet measured on a GPU.
COPIES = 16
CPU_BATCH = 4
LARGEST_BATCH = 32


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that no process has taken on a CUDA device, by NVML; by the CUDA runtime where NVML is not to be had."""
    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).free)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return int(torch.cuda.mem_get_info(device)[0])


def window_batch(device: torch.device, latent_voxels: int, channels: int) -> int:
    """Windows of ``latent_voxels`` that are denoised at once: a fixed few on CPU, on CUDA what fits in half of the
    free memory."""
    if device.type != "cuda":
        return CPU_BATCH
    window = latent_voxels * channels * COPIES * torch.float32.itemsize
    return max(1, min(LARGEST_BATCH, free_gpu_memory(device) // 2 // window))
