"""``python -m bundle export OUT``: encoder, denoiser and decoder as ONNX and ``torch.export`` programs."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config

from bundle.phantom.command import torso_phantom
from bundle.workflow import inference_workflow
from custom_modules.errors import InputError
from custom_modules.files import sha256, writable_or_stop
from custom_modules.networks.synthesizer import MODALITIES, Synthesizer
from custom_modules.tiling import pad_to_windows

TOLERANCE = 1e-3  # largest difference from PyTorch, of latents with standard deviation 1 and of images in [-1, 1]


class Encoder(nn.Module):
    """MR (N, 1, D, H, W) in [-1, 1] to the normalised mean of its posterior (N, c, D/f, H/f, W/f)."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        del self.network.denoiser, self.network.autoencoder.decoder  # a program contains every weight of its module

    def forward(self, image: Tensor) -> Tensor:
        return self.network.encode(image, "MR")


class Decoder(nn.Module):
    """Normalised CT latent (N, c, d, h, w), and the MR (N, 1, f d, f h, f w) where the network has a skip connection
    for it, to the synthetic CT of the MR's shape in [-1, 1]."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        del self.network.denoiser, self.network.autoencoder.encoder

    def forward(self, latent: Tensor, mr: Tensor | None = None) -> Tensor:
        return self.network.decode(latent, "CT", None if mr is None else self.network.detail(mr))


class Denoiser(nn.Module):
    """CT latent and MR latent, normalised (N, 2 c, d, h, w), and timesteps (N,) to the prediction (N, c, d, h, w)."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.denoiser = network.denoiser

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoiser(x, timesteps)


PARTS: dict[str, type[nn.Module]] = {"encoder": Encoder, "denoiser": Denoiser, "decoder": Decoder}
OUTPUTS = {"encoder": "latent", "denoiser": "prediction", "decoder": "ct"}


def example(part: str, network: Synthesizer) -> tuple[tuple[Tensor, ...], dict[str, dict[int, Any]]]:
    """Return random inputs of ``part`` and their dynamic axes: batch and size. Sizes are multiples, by at least two, of
    what the part divides by. For the denoiser this is the window of its attention, because a graph has no windows that
    are cut off at the end of a volume."""
    f, unit, c = network.autoencoder.downsampling, network.downsampling, network.autoencoder.latent_channels
    unit = {"encoder": unit, "decoder": unit // f, "denoiser": network.denoiser.window}[part]
    channels = {"encoder": 1, "decoder": c, "denoiser": 2 * c}[part]
    batch = Dim("batch", min=1)
    # at least 2, because torch.export treats a size of one unit as a special case
    axes = {n: unit * Dim(axis, min=2) for n, axis in enumerate(("depth", "height", "width"), start=2)}
    x = torch.randn(2, channels, *[2 * unit] * 3)
    if part == "denoiser":
        return (x, torch.tensor([0, 999])), {"x": {0: batch, **axes}, "timesteps": {0: batch}}
    if part == "decoder" and network.mr_skip is not None:
        mr = torch.randn(2, 1, *[2 * unit * f] * 3)
        whole = {n: f * axis for n, axis in axes.items()}
        return (x, mr), {"latent": {0: batch, **axes}, "mr": {0: batch, **whole}}
    return (x,), {"image" if part == "encoder" else "latent": {0: batch, **axes}}


@torch.no_grad()
def export_part(part: str, network: Synthesizer) -> ExportedProgram:
    """Export a part with ``torch.export`` in single precision."""
    inputs, dynamic = example(part, network)
    with fx_config.patch(backed_size_oblivious=True):  # otherwise programs refuse a batch of 1, unlike the example's
        return torch.export.export(PARTS[part](network).eval(), inputs, dynamic_shapes=dynamic)


def export(output: str, mr: str | None = None, config: str | Sequence[str] = (), **settings: Any) -> None:
    """Write ``encoder``, ``denoiser`` and ``decoder``, each as ``.onnx`` and ``.pt2``, and ``export.json``, which
    describes their source, inputs and outputs. Each ONNX file is compared with PyTorch in ONNX Runtime: on the middle
    window of an MR as inference prepares it, on its latent and on the result, for batches of one and two and for two
    sizes.

    Args:
        output: folder; it receives all of the files or none.
        mr: the MR for the comparison; a phantom when None.
        config: overlay on configs/inference.yaml for another network.
        settings: of configs/inference.yaml, such as --checkpoint.

    Raises:
        InputError: when ONNX is not installed, or an export differs from PyTorch by more than 0.001.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -r requirements-dev.txt") from error
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)
    parser = inference_workflow(config, device="cpu", **settings).parser
    if not isinstance(parser.get_parsed_content("network_def"), Synthesizer):
        raise InputError(f"{config}: only 3D-WLDM has an encoder, a denoiser and a decoder")
    network = parser.get_parsed_content("network").float().eval().requires_grad_(False)
    checkpoint = Path(parser.get_parsed_content("checkpoint"))
    folder = Path(writable_or_stop(output))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as scratch:
        record = {"model_sha256": sha256(checkpoint), **describe(network)}
        image = parser.get_parsed_content("preprocessing")({"image": str(mr or phantom_mr(Path(scratch)))})["image"]
        window = middle_window(image, network)
        for part in PARTS:
            print(f"{part}: exporting", flush=True)
            program = export_part(part, network)
            path = Path(scratch, f"{part}.onnx")
            torch.export.save(program, path.with_suffix(".pt2"))
            names = {"output_names": [OUTPUTS[part]]}
            torch.onnx.export(program, f=str(path), dynamo=True, verbose=False, external_data=False, **names)
            largest = difference(part, path, network, inputs_from(window, part, network))
            if not largest <= TOLERANCE:
                raise InputError(f"{part}.onnx differs from PyTorch by {largest:.2g}; nothing was written")
            print(f"{part}: differs from PyTorch by {largest:.1e} at most")
            record["parts"][part] = {**signature(path), "largest_difference": largest}
        Path(scratch, "export.json").write_text(json.dumps(record, indent=1) + "\n")
        Path(scratch, "mr.nii.gz").unlink(missing_ok=True)
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)
    print(f"{folder}: {', '.join(f'{part}.onnx, {part}.pt2' for part in PARTS)}, export.json")


def phantom_mr(folder: Path) -> str:
    """Write the MR of a torso phantom to ``folder`` and return its path."""
    volume, _, affine = torso_phantom()
    nib.save(nib.Nifti1Image(volume, affine), folder / "mr.nii.gz")
    return str(folder / "mr.nii.gz")


def middle_window(image: Tensor, network: Synthesizer) -> Tensor:
    """Crop the middle of an MR (1, D, H, W) to (1, 1, d, h, w), two windows of the denoiser's attention per side."""
    size = 2 * network.denoiser.window * network.autoencoder.downsampling
    padded, _ = pad_to_windows(convert_to_tensor(image, track_meta=False)[None], [size] * 3, network.downsampling)
    starts = [(length - size) // 2 for length in padded.shape[2:]]
    return padded[(..., *(slice(start, start + size) for start in starts))].contiguous()


@torch.no_grad()
def inputs_from(window: Tensor, part: str, network: Synthesizer) -> list[tuple[Tensor, ...]]:
    """Return the inputs that a part gets in inference for an MR window: a batch of one, and two of twice the depth."""

    def batches(x: Tensor) -> tuple[Tensor, Tensor]:
        long = torch.cat([x, x.flip(2)], dim=2)
        return x, torch.cat([long, long.flip(3)])

    last = network.schedule.num_train_timesteps - 1
    z_mr = network.encode(window, "MR")
    noise = torch.randn(z_mr.shape, generator=torch.Generator().manual_seed(0))
    if part == "encoder":
        return [(x,) for x in batches(window)]
    if part == "denoiser":
        timesteps = [last], [last, last // 2]
        return [(x, torch.tensor(t)) for x, t in zip(batches(torch.cat([noise, z_mr], dim=1)), timesteps)]
    condition = network.condition(z_mr)
    latent = network.schedule.sample(lambda z, t: network.predict(z, t, condition), noise, 1)
    if network.mr_skip is None:
        return [(z,) for z in batches(latent)]
    return list(zip(batches(latent), batches(window)))


def describe(network: Synthesizer) -> dict[str, Any]:
    """Return what a runtime needs in addition to the graphs: HU window, the sampler's schedule and the latent scale."""
    betas = network.schedule.betas
    return {
        "hu_window": network.hu_window.tolist(),
        "downsampling": network.autoencoder.downsampling,
        "size_unit": network.downsampling,
        "prediction": network.schedule.prediction,
        "linear_betas": {"first": float(betas[0]), "last": float(betas[-1]), "timesteps": len(betas)},
        # the encoder's results are normalised by that of MR, the decoder's inputs by that of CT
        "latent_mean": dict(zip(MODALITIES, network.latent_mean.tolist())),
        "latent_std": dict(zip(MODALITIES, network.latent_std.tolist())),
        "parts": {},
    }


def signature(path: Path) -> dict[str, Any]:
    """Return the names and shapes of an ONNX file's inputs and outputs; a dynamic axis is a name or an expression."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {
        "inputs": {i.name: {"shape": i.shape, "type": i.type} for i in session.get_inputs()},
        "outputs": {o.name: {"shape": o.shape, "type": o.type} for o in session.get_outputs()},
    }


@torch.no_grad()
def difference(part: str, path: Path, network: Synthesizer, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the largest absolute difference between ONNX Runtime and PyTorch over ``batches``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, reference = [i.name for i in session.get_inputs()], PARTS[part](network)
    errors = []
    for inputs in batches:
        (output,) = session.run(None, {name: x.contiguous().numpy() for name, x in zip(names, inputs)})
        errors.append(float((torch.from_numpy(output) - reference(*inputs)).abs().max()))
    return max(errors)
