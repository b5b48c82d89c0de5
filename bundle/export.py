"""``python -m bundle export OUT``: encoder, denoiser and decoder as ONNX and ``torch.export`` programs, for other runtimes."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bundle.workflow import inference_workflow
from custom_modules.synthesizer import MODALITIES, Synthesizer
from custom_modules.volumes import InputError, writable_or_stop

TOLERANCE = 1e-3  # largest difference from PyTorch, of latents with standard deviation 1 and of images in [-1, 1]


class Encoder(nn.Module):
    """MR (N, 1, D, H, W) in [-1, 1] to the normalised mean of its posterior (N, c, D/f, H/f, W/f)."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        del self.network.denoiser, self.network.autoencoder.decoder  # a program carries every weight of its module

    def forward(self, image: Tensor) -> Tensor:
        return self.network.encode(image, "MR")


class Decoder(nn.Module):
    """Normalised CT latent (N, c, d, h, w) to the synthetic CT (N, 1, f d, f h, f w) in [-1, 1]."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        del self.network.denoiser, self.network.autoencoder.encoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent, "CT")


class Denoiser(nn.Module):
    """CT latent and MR latent, normalised (N, 2 c, d, h, w), and timesteps (N,) to the prediction (N, c, d, h, w)."""

    def __init__(self, network: Synthesizer) -> None:
        super().__init__()
        self.denoiser = network.denoiser

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoiser(x, timesteps)


PARTS = {"encoder": Encoder, "denoiser": Denoiser, "decoder": Decoder}
OUTPUTS = {"encoder": "latent", "denoiser": "prediction", "decoder": "ct"}


def example(part: str, network: Synthesizer, roi_size: Sequence[int]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Random inputs of ``part`` and which of their axes may change.

    Batch and image sizes are free, the latter in multiples of ``network.downsampling``. The denoiser's window is not: DSCA
    chooses from its size how far keys are pooled (:func:`~custom_modules.dsca.pool_to_tokens`), and sampling has one window.
    """
    f, unit, c = network.autoencoder.downsampling, network.downsampling, network.autoencoder.latent_channels
    batch, latent = Dim("batch", min=1), [size // f for size in roi_size]
    axes = [Dim(axis, min=1) for axis in ("depth", "height", "width")]
    if part == "encoder":
        # unequal sizes, for an axis of the size of another, or of 1, would be taken for it
        return (torch.randn(2, 1, 3 * unit, 2 * unit, 4 * unit),), {"image": {0: batch, **_free(axes, unit)}}
    if part == "decoder":
        unit //= f
        return (torch.randn(2, c, 3 * unit, 2 * unit, 4 * unit),), {"latent": {0: batch, **_free(axes, unit)}}
    return (torch.randn(2, 2 * c, *latent), torch.tensor([0, 999])), {"x": {0: batch}, "timesteps": {0: batch}}


def _free(axes: Sequence[Dim], unit: int) -> dict[int, Any]:
    return {n: unit * axis for n, axis in enumerate(axes, start=2)}


@torch.no_grad()
def export_part(part: str, network: Synthesizer, roi_size: Sequence[int]) -> ExportedProgram:
    """``torch.export`` of a part in single precision."""
    inputs, dynamic = example(part, network, roi_size)
    return torch.export.export(PARTS[part](network).eval(), inputs, dynamic_shapes=dynamic)


def export(output: str, check: bool = True, config: str | Sequence[str] = (), **settings: Any) -> None:
    """Write ``encoder``, ``denoiser`` and ``decoder``, each as ``.onnx`` and ``.pt2``, and ``export.json``, which says what
    they were made from and what goes in and out.

    Args:
        output: folder; holds all of them or none.
        check: compare each with PyTorch in ONNX Runtime on random inputs of two sizes.
        config: overlay on configs/inference.yaml for another network.
        settings: of configs/inference.yaml, such as --checkpoint, or --roi_size for another window of the denoiser.

    Raises:
        InputError: when ONNX is not installed, or an export differs from PyTorch by more than 0.001.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install -r requirements.txt") from error
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    parser = inference_workflow(config, device="cpu", **settings).parser
    network = parser.get_parsed_content("network").float().eval().requires_grad_(False)
    if not isinstance(network, Synthesizer):
        raise InputError(f"{config}: only 3D-WLDM has an encoder, a denoiser and a decoder")
    roi_size, checkpoint = parser.get_parsed_content("roi_size"), Path(parser.get_parsed_content("checkpoint"))
    folder = Path(writable_or_stop(output))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as scratch:
        record = {"model_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), **describe(network)}
        for part in PARTS:
            print(f"{part}: exporting", flush=True)
            program = export_part(part, network, roi_size)
            path = Path(scratch, part)
            torch.export.save(program, path.with_suffix(".pt2"))
            torch.onnx.export(
                program, f=str(path.with_suffix(".onnx")), output_names=[OUTPUTS[part]], dynamo=True, verbose=False,
                external_data=False,
            )  # fmt: skip
            record["parts"][part] = signature(path.with_suffix(".onnx"))
            if check:
                error = difference(part, path.with_suffix(".onnx"), network, samples(part, network, roi_size))
                print(f"{part}: differs from PyTorch by {error:.1e} at most")
                if not error <= TOLERANCE:
                    raise InputError(f"{part}.onnx differs from PyTorch by {error:.2g}; nothing was written")
                record["parts"][part]["largest_difference"] = error
        Path(scratch, "export.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)
    print(f"{folder}: {', '.join(f'{part}.onnx, {part}.pt2' for part in PARTS)}, export.json")


def describe(network: Synthesizer) -> dict[str, Any]:
    """What a runtime has to know beside the graphs: HU window, the sampler's schedule, the latent scale they hold."""
    betas = network.schedule.betas
    return {
        "hu_window": network.hu_window.tolist(),
        "downsampling": network.autoencoder.downsampling,
        "size_unit": network.downsampling,
        "prediction": network.schedule.prediction,
        "linear_betas": {"first": float(betas[0]), "last": float(betas[-1]), "timesteps": len(betas)},
        # the encoder's answers are normalised by the first, the decoder takes latents normalised by the second
        "latent_mean": dict(zip(MODALITIES, network.latent_mean.tolist())),
        "latent_std": dict(zip(MODALITIES, network.latent_std.tolist())),
        "parts": {},
    }


def signature(path: Path) -> dict[str, Any]:
    """Names and shapes of an ONNX file's inputs and outputs; a free axis is a name or an expression."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {
        "inputs": {i.name: {"shape": i.shape, "type": i.type} for i in session.get_inputs()},
        "outputs": {o.name: {"shape": o.shape, "type": o.type} for o in session.get_outputs()},
    }


def samples(part: str, network: Synthesizer, roi_size: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The example and inputs of another batch and, where it is free, another size."""
    inputs, dynamic = example(part, network, roi_size)
    other = torch.cat([inputs[0][:1]] * 3)
    if len(next(iter(dynamic.values()))) > 1:
        other = other.transpose(2, 4)
    return [inputs, (other, *(torch.full((3,), 500) for _ in inputs[1:]))]


@torch.no_grad()
def difference(part: str, path: Path, network: Synthesizer, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest absolute difference between ONNX Runtime and PyTorch over ``batches``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, reference = [i.name for i in session.get_inputs()], PARTS[part](network)
    errors = []
    for inputs in batches:
        (answer,) = session.run(None, {name: x.contiguous().numpy() for name, x in zip(names, inputs)})
        errors.append(float((torch.from_numpy(answer) - reference(*inputs)).abs().max()))
    return max(errors)
