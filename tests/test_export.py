"""Exports against PyTorch, in the runtimes that they are for, and the overlay for TensorRT."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, TINY, files_in, ramp, save, tiny_network
from monai.bundle import ConfigWorkflow
from monai.networks.trt_compiler import TrtCompiler
from monai.networks.utils import convert_to_onnx

from bundle.release import export as export_module
from bundle.release.export import TOLERANCE, export
from custom_modules.errors import InputError
from custom_modules.inference import tensorrt
from custom_modules.networks.autoencoder import WaveletAutoencoderKL
from custom_modules.networks.denoiser import LatentDenoiser
from custom_modules.networks.skip import MRSkip
from custom_modules.networks.synthesizer import Synthesizer
from custom_modules.networks.weights import save_weights

# one resolution: the graphs are small enough to be exported in seconds, and hold every kind of block
AUTOENCODER = {"latent_channels": 4, "channels": [8], "num_blocks": [1]}
DENOISER = {"latent_channels": 4, "channels": [8, 16, 16], "num_blocks": 1, "attention_channels": 8, "window": 8}
SETTINGS = {
    "network_def#autoencoder": {**TINY["network_def#autoencoder"], **AUTOENCODER},
    "network_def#denoiser": {**TINY["network_def#denoiser"], **DENOISER},
}


@pytest.fixture(scope="module")
def network() -> Synthesizer:
    network = tiny_network()
    network.autoencoder, network.denoiser = WaveletAutoencoderKL(**AUTOENCODER), LatentDenoiser(**DENOISER)
    network.mr_skip = MRSkip(network.autoencoder)
    for dsca in network.denoiser.skip:  # silent in a fresh network
        torch.nn.init.normal_(dsca.structure_emphasis.out.weight)
    torch.nn.init.normal_(network.mr_skip.layers[-1].weight)
    for modality in ("MR", "CT"):
        network.set_latent_scale(modality, [torch.randn(4, 9, 9, 9)])
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export_weights") / "model.pt"
    save_weights(network, path, torch.float32)
    return path


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    mr = save(tmp_path_factory.mktemp("export_mr") / "mr.nii.gz", ramp((40, 40, 40), np.diag([2.0, 2, 2, 1])))
    export(str(folder), str(mr), checkpoint=str(weights), **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def programs(exported) -> dict[str, torch.export.ExportedProgram]:
    return {part: torch.export.load(exported / f"{part}.pt2") for part in export_module.PARTS}


def run(folder: Path, part: str, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / f"{part}.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: np.ascontiguousarray(x) for n, x in zip(names, inputs)})[0])


def test_all_parts_are_there_and_the_record_says_what_they_are(exported, weights):
    parts = [f"{part}.{kind}" for part in ("decoder", "denoiser", "encoder") for kind in ("onnx", "pt2")]
    assert files_in(exported) == sorted([*parts, "export.json"])
    record = json.loads((exported / "export.json").read_text())
    assert record["model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["hu_window"] == [-1000, 1600] and record["size_unit"] == 8
    assert record["parts"]["denoiser"]["inputs"]["x"]["shape"][1] == 8  # c = 4, twice


@pytest.mark.parametrize("shape", [(1, 16, 16, 16), (3, 48, 16, 40)])
def test_encoder_and_decoder_take_any_batch_and_size(exported, programs, network, shape):
    batch, *size = shape
    image = torch.rand(batch, 1, *size) * 2 - 1
    latent = network.encode(image, "MR")
    torch.testing.assert_close(run(exported, "encoder", image), latent, atol=TOLERANCE, rtol=0)
    ct = network.decode(latent, detail=network.detail(image))
    assert not torch.allclose(ct, network.decode(latent))
    torch.testing.assert_close(run(exported, "decoder", latent, image), ct, atol=TOLERANCE, rtol=0)
    for part, inputs, expected in (("encoder", (image,), latent), ("decoder", (latent, image), ct)):
        torch.testing.assert_close(programs[part].module()(*inputs), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("timesteps, size", [([999], (16, 16, 16)), ([0, 500, 7], (24, 16, 32))])
def test_the_denoiser_takes_any_batch_and_number_of_windows(exported, programs, network, timesteps, size):
    x, t = torch.randn(len(timesteps), 8, *size), torch.tensor(timesteps)
    torch.testing.assert_close(run(exported, "denoiser", x, t), network.denoiser(x, t), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(programs["denoiser"].module()(x, t), network.denoiser(x, t), atol=TOLERANCE, rtol=0)


def test_the_parts_and_the_record_are_enough_to_synthesise(exported, network):
    """One DDIM step by the numbers of export.json, without anything of the bundle."""
    record = json.loads((exported / "export.json").read_text())
    betas = np.linspace(*(record["linear_betas"][key] for key in ("first", "last", "timesteps")))
    signal = math.prod(1 - betas)
    mr, noise = torch.rand(1, 1, 32, 32, 32) * 2 - 1, torch.randn(1, 4, 16, 16, 16)
    v = run(exported, "denoiser", torch.cat([noise, run(exported, "encoder", mr)], dim=1), torch.tensor([999]))
    assert record["prediction"] == "v"
    ct = run(exported, "decoder", signal**0.5 * noise - (1 - signal) ** 0.5 * v, mr)
    torch.testing.assert_close(ct, network(mr, noise), atol=TOLERANCE, rtol=0)


def test_an_export_that_differs_is_refused_and_leaves_nothing(programs, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "export_part", lambda part, *_: programs[part])  # exporting takes seconds
    monkeypatch.setattr(export_module.torch.onnx, "export", lambda *_, **__: None)
    monkeypatch.setattr(export_module, "difference", lambda *_: float("nan"))
    with pytest.raises(InputError, match="encoder.onnx differs from PyTorch by nan; nothing was written"):
        export(str(tmp_path / "out"), checkpoint=str(weights), **SETTINGS)
    assert files_in(tmp_path / "out") == []


def test_the_difference_is_seen(exported, network):
    window = torch.rand(1, 1, 32, 32, 32) * 2 - 1
    other = copy.deepcopy(network)
    other.autoencoder.encoder[-1].bias += 0.01
    for compared, close in ((network, True), (other, False)):
        batches = export_module.inputs_from(window, "encoder", compared)
        assert (export_module.difference("encoder", exported / "encoder.onnx", compared, batches) < TOLERANCE) == close


def test_a_regression_network_has_no_parts_to_export(tmp_path):
    with pytest.raises(InputError, match="only 3D-WLDM has an encoder"):
        export(str(tmp_path), config=str(ROOT / "configs/baselines/unet.yaml"))


def test_without_onnx_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime is not installed; pip install"):
        export(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("mr", ["torso_mr/abdomen_t2.nii.gz", "sts/STS_048/mr.nii.gz"])
def test_the_shipped_weights_on_real_windows(real_data, tmp_path, mr):
    export(str(tmp_path), mr=str(real_data / mr))
    record = json.loads((tmp_path / "export.json").read_text())
    assert all(part["largest_difference"] < TOLERANCE for part in record["parts"].values())


def test_tensorrt_on_the_cpu_is_refused_in_one_line(checkpoint, tmp_path):
    mr = save(tmp_path / "mr.nii.gz", ramp((20, 20, 20), np.diag([2.0, 2, 2, 1])))
    workflow = ConfigWorkflow(
        [str(ROOT / "configs/inference.yaml"), str(ROOT / "configs/inference_trt.yaml")], workflow_type="infer",
        logging_file=False, dataset_dir=str(mr), output_dir=str(tmp_path / "out"), checkpoint=str(checkpoint),
        device="$torch.device('cpu')", **TINY,
    )  # fmt: skip
    workflow.initialize()
    with pytest.raises(SystemExit, match="^error: TensorRT runs on CUDA and the device is 'cpu'; leave .* out$"):
        workflow.run()
    assert not list((tmp_path / "out").glob("*"))


def on_cuda() -> SimpleNamespace:
    return SimpleNamespace(hu_window=SimpleNamespace(device=torch.device("cuda")))


def test_tensorrt_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None if name == "polygraphy" else name)
    with pytest.raises(SystemExit, match="TensorRT needs pip install polygraphy; leave"):
        tensorrt.trt_compile_or_stop(on_cuda(), "model.pt", 4)


@pytest.mark.slow
def test_what_tensorrt_is_built_from_can_be_made_here(monkeypatch, tmp_path):
    """MONAI's compiler takes the arguments, and its ONNX of the denoiser, the half that needs no GPU, is right for any
    batch."""
    asked, compiled = {}, []

    def trt_compile(network, path, args, submodule):
        asked.update(args)
        compiled.append(submodule)
        return network

    monkeypatch.setattr(tensorrt, "find_spec", lambda name: name)
    monkeypatch.setattr(tensorrt, "trt_compile", trt_compile)
    tensorrt.trt_compile_or_stop(on_cuda(), "model.pt", 4)
    assert compiled == ["denoiser"]
    denoiser = tiny_network().eval().denoiser
    compiler = TrtCompiler(denoiser, str(tmp_path / "plan"), **asked)
    example = {**compiler.defaults, "x": torch.randn(4, 8, 8, 8, 8), "timesteps": torch.full((4,), 999)}
    with torch.inference_mode():  # as the inferer calls it
        axes = {"dynamic_axes": {"x": [0], "timesteps": [0]}}
        names = {"input_names": ["x", "timesteps"], "output_names": []}
        path = str(tmp_path / "denoiser.onnx")
        convert_to_onnx(denoiser, example, filename=path, **names, **axes, **asked["export_args"])
        x, t = torch.randn(2, 8, 8, 8, 8), torch.tensor([3, 400])
        expected = denoiser(x, t)
    torch.testing.assert_close(run(tmp_path, "denoiser", x, t), expected, atol=TOLERANCE, rtol=0)
