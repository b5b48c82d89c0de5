"""The window batch follows the free memory of the device."""

import types

import pytest
import torch

from custom_modules import memory


def test_cpu_takes_a_fixed_batch():
    assert memory.window_batch(torch.device("cpu"), 4096, 64) == memory.CPU_BATCH


@pytest.mark.parametrize("free, expected", [(0, 1), (2**24, 2), (2**40, memory.LARGEST_BATCH)])
def test_cuda_batch_fits_in_half_of_the_free_memory(monkeypatch, free, expected):
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: free)
    batch = memory.window_batch(torch.device("cuda"), 4096, 16)
    assert batch == expected
    if 1 < batch < memory.LARGEST_BATCH:
        assert batch * 4096 * 16 * memory.COPIES * 4 <= free / 2


def test_without_nvml_the_cuda_runtime_is_asked(monkeypatch):
    def refuse():
        raise memory.pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(memory.pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert memory.free_gpu_memory(torch.device("cuda")) == 123


def test_nvml_is_asked_for_the_very_device(monkeypatch):
    asked = []
    nvml = memory.pynvml
    monkeypatch.setattr(nvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(nvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lambda handle: types.SimpleNamespace(free=77))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    assert memory.free_gpu_memory(torch.device("cuda")) == 77 and asked == ["GPU-abc"]
