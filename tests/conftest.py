"""What the tests share: synthetic volumes whose values are known, a tiny network, and the inference pipeline."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.inferers import Inferer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bundle.phantom.command import torso_phantom  # noqa: E402
from custom_modules.networks.autoencoder import WaveletAutoencoderKL  # noqa: E402
from custom_modules.networks.denoiser import LatentDenoiser  # noqa: E402
from custom_modules.networks.synthesizer import Synthesizer  # noqa: E402
from custom_modules.networks.weights import save_weights  # noqa: E402

INFERENCE = ROOT / "configs" / "inference.yaml"
AIR = -1000
AUTOENCODER = {"latent_channels": 4, "channels": [8, 16], "num_blocks": [1, 1]}
DENOISER = {"latent_channels": 4, "channels": [8, 16, 16], "num_blocks": 1, "attention_channels": 8}
TINY = {
    "network_def#autoencoder": {"_target_": "custom_modules.networks.autoencoder.WaveletAutoencoderKL", **AUTOENCODER},
    "network_def#denoiser": {"_target_": "custom_modules.networks.denoiser.LatentDenoiser", **DENOISER},
}
# a training that takes seconds; single precision, for at these sizes (2 voxels at the coarsest scale) the bfloat16
# gradient of oneDNN convolutions can be NaN on CPUs with AMX
TRAINING = {
    "roi_size": [32, 32, 32], "amp": False, "batch_size": 2, "steps_per_epoch": 3, "max_epochs": 1,
    "val_interval": 1, "log_interval": 1, "correct_bias": False,  # N4 would take most of the time
    "latent_channels": 4, "autoencoder_channels": [8, 16], "autoencoder_blocks": [1, 1],
    "device": "$torch.device('cpu')",
}  # fmt: skip
TRAINING_DENOISER = {"denoiser_channels": [8, 16, 16], "denoiser#num_blocks": 1, "denoiser#attention_channels": 8}


class LinearInferer(Inferer):
    """Replaces the sampler: the result is ``sign`` times the normalised MR."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def __call__(self, inputs: torch.Tensor, network: Synthesizer, body: torch.Tensor | None = None) -> torch.Tensor:
        return self.sign * inputs


def linear_hu(mr: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """The HU that :class:`LinearInferer` leads to: MR window [0, 1250], HU window [-1000, 1600]."""
    return 300 + sign * 1300 * (np.clip(mr, 0, 1250) / 625 - 1)


def stub(sign: float = 1.0) -> dict:
    """Overrides that put :class:`LinearInferer` in the sampler's place."""
    return {"inferer": {"_target_": "conftest.LinearInferer", "sign": sign}}


def tiny_network(**denoiser) -> Synthesizer:
    torch.manual_seed(0)
    return Synthesizer(WaveletAutoencoderKL(**AUTOENCODER), LatentDenoiser(**{**DENOISER, **denoiser}))


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World coordinates (3, D, H, W) of every voxel, relative to the middle of the volume."""
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.moveaxis(points - points.mean(axis=(0, 1, 2)), -1, 0)


def ramp(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A body that fills the field of view: linear in world coordinates, another slope on every axis, 450 to 1150."""
    points = world(shape, affine)
    extent = np.maximum(np.ptp(points, axis=(1, 2, 3)), 1)
    values = np.tensordot(np.array([0.5, 0.3, 0.2]) / extent, points, axes=1)
    return (800 + 700 * values / np.ptp(values)).astype(np.float32)


def ellipsoid(
    shape: tuple[int, ...], affine: np.ndarray, radii: tuple[float, float, float], shift: tuple = (0, 0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """An MR of a smooth ellipsoid (radii in mm, moved by ``shift`` mm) in noisy air, and the ellipsoid as a mask."""
    points = world(shape, affine) - np.reshape(shift, (3, 1, 1, 1))
    inside = ((points / np.reshape(radii, (3, 1, 1, 1))) ** 2).sum(0) <= 1
    values = 900 + 150 * np.cos(points / 30).mean(0)
    noise = np.random.default_rng(0).uniform(0, 20, shape)
    return np.where(inside, values, noise).astype(np.float32), inside


def head_and_shoulders() -> np.ndarray:
    """An MR in RAS order, 2 mm: trunk 36 voxels wide below slice 20, neck of 10 below 28, head of 18 below 40."""
    mr = np.zeros((44, 24, 44), dtype=np.float32)
    mr[4:40, 4:20, :20] = mr[17:27, 7:17, 20:28] = mr[13:31, 5:19, 28:40] = 1
    return mr * ramp(mr.shape, np.diag([2.0, 2, 2, 1]))


def small_torso(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MR, CT and affine of a torso of half the size, 4 mm: an eighth of the voxels at 2 mm, and of the time."""
    mr, ct, affine = torso_phantom(shape=shape, spacing=8.0, seed=seed)
    return mr, ct, np.diag([0.5, 0.5, 0.5, 1]) @ affine


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return path


def files_in(folder: Path) -> list[str]:
    """Every file below ``folder``, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: what a writer meets when the disk is full, whatever the writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def train_workflow(name: str, **overrides) -> ConfigWorkflow:
    """A training workflow, or a list of overlays joined by ``+``, initialised, with ``overrides``."""
    torch.manual_seed(0)  # a test that asks for the trainer makes the networks before the config seeds anything
    files = [str(ROOT / "configs" / f"{part}.yaml") for part in name.split("+")]
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", logging_file=False, **overrides)
    for key, value in (TRAINING_DENOISER if "train" in name.split("+") else {}).items():
        workflow.parser[key] = value
    workflow.initialize()
    return workflow


def train(name: str, **overrides) -> ConfigWorkflow:
    """:func:`train_workflow`, run."""
    workflow = train_workflow(name, **overrides)
    workflow.run()
    return workflow


# what takes seconds: whole modules, and tests that ask for a fixture that trains, samples or starts a process; others
# are marked where they stand. Modules start in the order of LONG_MODULES, the longest first
LONG_MODULES = (
    "test_runs",
    "test_prepare",
    "test_compare",
    "test_export",
    "test_package",
    "test_evaluate",
    "test_training",
)
INTEGRATION_MODULES = {
    "test_chain", "test_export", "test_inference", "test_label_app", "test_package", "test_report", "test_slicer",
}  # fmt: skip
INTEGRATION_FIXTURES = {"infer", "infer_command", "trained", "phantoms", "tiny", "inbox", "quick_maps", "real_data",
                        "watch", "chromium"}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.stem
        return LONG_MODULES.index(name) if name in LONG_MODULES else len(LONG_MODULES)

    items.sort(key=rank)
    for item in items:
        if item.path.stem in INTEGRATION_MODULES or INTEGRATION_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datalist of six phantoms, five to train and one to validate."""
    root = tmp_path_factory.mktemp("phantoms")
    entries = []
    for n in range(6):
        mr, ct, affine = small_torso((40, 30, 24), seed=n)
        save(root / f"p{n}/mr.nii.gz", mr, affine)
        save(root / f"p{n}/ct.nii.gz", ct, affine)
        entries.append({"image": f"p{n}/mr.nii.gz", "label": f"p{n}/ct.nii.gz"})
    (root / "datalist.json").write_text(json.dumps({"training": entries[:5], "validation": entries[5:]}))
    return root


@pytest.fixture(scope="session")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the three stages leave: ae, ldm and fine."""
    root = tmp_path_factory.mktemp("trained")
    settings = {**TRAINING, "dataset_dir": str(phantoms)}
    train("train+train_autoencoder", **settings, adversarial_warmup=1, output_dir=str(root / "ae"))
    train(
        "train",
        **settings,
        augmented_copies=1,
        autoencoder_checkpoint=str(root / "ae/autoencoder.pt"),
        output_dir=str(root / "ldm"),
    )
    train(
        "train+finetune",
        **settings,
        augmented_copies=1,
        sample_share=0.5,
        initial_checkpoint=str(root / "ldm/model.pt"),
        output_dir=str(root / "fine"),
    )
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(tiny_network(), path)
    return path


@pytest.fixture(scope="session")
def infer(checkpoint: Path) -> Callable[..., Path]:
    """Run configs/inference.yaml in this process: infer(dataset_dir, output_dir, **overrides) -> output_dir."""

    def run(dataset_dir: Path, output_dir: Path, **overrides) -> Path:
        # the values of made-up volumes are ramps, which N4 would take for shading
        settings = {"device": "$torch.device('cpu')", "checkpoint": str(checkpoint), "correct_bias": False, **TINY}
        settings |= overrides
        workflow = ConfigWorkflow(
            config_file=str(INFERENCE), workflow_type="infer", logging_file=False,
            dataset_dir=str(dataset_dir), output_dir=str(output_dir), **settings,
        )  # fmt: skip
        workflow.initialize()
        workflow.run()
        return Path(output_dir)

    return run


@pytest.fixture(scope="session")
def infer_command(checkpoint: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run it as users do, by ``python -m monai.bundle run`` from the folder ``cwd``."""

    def run(dataset_dir: Path, output_dir: Path, cwd: Path = ROOT, **overrides) -> subprocess.CompletedProcess:
        settings = {"dataset_dir": dataset_dir, "output_dir": output_dir, "checkpoint": checkpoint}
        settings |= {"correct_bias": False, **TINY, **overrides}
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(INFERENCE)]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Unless the block is done in time, print where every thread stands and kill the processes that this one started: a
    browser or a worker that does not answer must not hold up a run whose tests are done."""

    def kill() -> None:
        faulthandler.dump_traceback(all_threads=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish() -> Iterator[None]:
    with ends_within(60):
        return (yield)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Watched:
    """A page in headless Chromium, with what it asked for and what stands on its console; policy violations too."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.requests: list[str] = []
        self.console: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))

    def open(self, path: Path | str) -> Any:
        self.page.goto(path if isinstance(path, str) else path.as_uri())
        return self.page

    def open_viewer(self, root: str = ".viewer") -> Any:
        """Open a viewer of the page and return its element."""
        found = self.page.locator(root).first
        if found.get_attribute("data-state") is None:
            found.locator("[data-part=open]").click()
        self.page.wait_for_selector(f"{root}[data-state=open]", timeout=120_000)
        return found

    def outside(self) -> list[str]:
        """Requests for anything but the page itself and its own data."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", self.page.url.split("#")[0]))]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Callable[..., Any]]:
    """Start headless Chromium with WebGL in software: chromium(*flags) -> browser. Skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the path (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    playwright = sync_api.sync_playwright().start()
    gl = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    yield lambda *flags: playwright.chromium.launch(executable_path=CHROMIUM, args=[*gl, *flags])
    with ends_within(60):
        playwright.stop()


@pytest.fixture(scope="session")
def browser(chromium) -> Iterator[Any]:
    made = chromium()
    yield made
    with ends_within(60):
        made.close()


@pytest.fixture
def watch(browser) -> Iterator[Callable[..., Watched]]:
    """Make a page of its own: watch(width, **options of the context) -> Watched."""
    contexts = []

    def make(width: int = 1400, **options: Any) -> Watched:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        return Watched(contexts[-1])

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes beside the repository; tests that ask for it are skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "datalist.json").is_file():
        pytest.skip(f"needs the real data in {folder}")
    return folder
