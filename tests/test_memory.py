"""The window batch follows the free memory of the device."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from monai.data import MetaTensor

from custom_modules import memory
from custom_modules.data.fits import CheckMemoryd
from custom_modules.data.volumes import read_grid, write_volume
from custom_modules.errors import InputError


def test_cpu_takes_a_fixed_batch():
    assert memory.window_batch(torch.device("cpu"), 4096, 64) == memory.CPU_BATCH


@pytest.mark.parametrize("free, expected", [(0, 1), (2**24, 2), (2**40, memory.LARGEST_BATCH)])
def test_cuda_batch_fits_in_half_of_the_free_memory(monkeypatch, free, expected):
    monkeypatch.setattr(memory, "free_gpu_memory", lambda device: free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    batch = memory.window_batch(torch.device("cuda"), 4096, 16)
    assert batch == expected
    if 1 < batch < memory.LARGEST_BATCH:
        assert batch * 4096 * 16 * memory.COPIES * 4 <= free / 2


def test_a_limit_counts_what_the_process_holds_already():
    cpu = torch.device("cpu")
    held = memory.psutil.Process().memory_info().rss
    assert abs(memory.free_memory(cpu, limit=(held + 2**26) / 2**30) - 2**26) < 2**25
    assert memory.free_memory(cpu, limit=held / 2**31) < 0
    assert 0 < memory.free_memory(cpu) <= memory.psutil.virtual_memory().total


def test_memory_that_runs_out_halves_the_work_down_to_the_least():
    tried = []

    def work(amount):
        tried.append(amount)
        if amount > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return amount

    assert memory.halve_when_out_of_memory(work, 16, 3, "windows") == 3 and tried == [16, 8, 4, 3]
    with pytest.raises(InputError, match="even with 5 windows"):
        memory.halve_when_out_of_memory(work, 16, 5, "windows")


def test_the_allocator_of_the_cpu_is_understood():
    with pytest.raises(InputError, match="out of memory"):
        memory.halve_when_out_of_memory(lambda amount: torch.empty(2**60), 1, 1, "windows")


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


@pytest.mark.integration
@pytest.mark.parametrize("name", ("big.nii.gz", "big.nrrd", "big.mha"))
def test_a_volume_that_cannot_fit_is_refused_by_its_header(tmp_path, name):
    path = tmp_path / name
    write_volume(MetaTensor(torch.ones(1, 60, 50, 40, dtype=torch.int16), affine=torch.eye(4)), path)
    assert read_grid(path) == ((60, 50, 40), (1, 1, 1))
    held = memory.psutil.Process().memory_info().rss / memory.GIB
    fits, short = (CheckMemoryd("image", (2, 2, 2), held + extra) for extra in (1.0, 0.1))
    assert fits({"image": str(path)}) == {"image": str(path)}
    with pytest.raises(
        InputError,
        match=f"{name}: 60 x 50 x 40 voxels of 1 x 1 x 1 mm need about 0.. GiB of memory, 0.1 GiB may be taken",
    ):
        short({"image": str(path)})
    fine = CheckMemoryd("image", (0.1, 0.1, 0.1), held + 1)  # a thousand voxels of the grid for each of the file
    with pytest.raises(InputError, match="GiB"):
        fine({"image": str(path)})


def test_what_has_no_header_is_left_to_the_reader(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    for path in (tmp_path / "broken.nii.gz", tmp_path / "missing.mha", tmp_path):
        CheckMemoryd("image", (2, 2, 2), limit=0)({"image": str(path)})


@pytest.mark.integration
def test_the_figures_of_a_gpu_need_nothing_but_pytorch_and_monai():
    blocked = [
        "itk",
        "nibabel",
        "pydicom",
        "psutil",
        "pynvml",
        "skimage",
        "ignite",
        "pywt",
        "pytorch_wavelets",
        "matplotlib",
        "yaml",
    ]
    program = (
        f"import sys; sys.path.insert(0, 'benchmarks'); sys.modules.update(dict.fromkeys({blocked!r})); import pipeline"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_estimate_counts_the_voxels_of_the_networks_grid():
    """A coarse file over 1.6 m is small, and its grid is not."""
    coarse = memory.needed_memory((54, 54, 54), (30, 30, 30), (2, 2, 2))
    assert coarse > memory.FINDING["grid"] * 800**3
    assert memory.needed_memory((54, 54, 54), (2, 2, 2), (2, 2, 2)) < 2 * memory.FIXED_BYTES


@pytest.mark.integration
def test_a_coarse_volume_is_refused_with_numbers_and_the_other_files_are_made(tmp_path, infer, caplog):
    body = torch.zeros(1, 54, 54, 54, dtype=torch.int16)
    body[:, 10:44, 10:44, 10:44] = torch.randint(500, 1000, (34, 34, 34))
    for name, spacing in (("coarse.nii", 30.0), ("good.nii", 2.0)):
        write_volume(MetaTensor(body, affine=torch.diag(torch.tensor([spacing] * 3 + [1.0]))), tmp_path / "in" / name)
    held = memory.psutil.Process().memory_info().rss / memory.GIB
    with pytest.raises(SystemExit):
        infer(tmp_path / "in", tmp_path / "out", memory_limit=held + 4)
    assert [path.name for path in (tmp_path / "out").glob("*.nii")] == ["good_sct.nii"]
    assert "coarse.nii: 54 x 54 x 54 voxels of 30 x 30 x 30 mm need about" in caplog.text
