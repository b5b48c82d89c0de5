"""The denoiser as a TensorRT engine on CUDA (``configs/inference_trt.yaml``)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from monai.networks import trt_compile
from torch import Tensor

from custom_modules.errors import stop
from custom_modules.networks.synthesizer import Synthesizer

PACKAGES = ("tensorrt", "polygraphy")
# for torch.onnx.export: MONAI's own for a dynamic batch leave out the unused argument
EXPORT_ARGS = {"dynamic_shapes": {"x": {0: "batch"}, "timesteps": {0: "batch"}, "context": None}}


def trt_compile_or_stop(
    network: Synthesizer, path: str | Path, sw_batch_size: int, precision: str = "fp16"
) -> Synthesizer:
    """Compile the denoiser for windows of one size by MONAI's ``trt_compile``. Ends the program with one line where
    MONAI would warn and continue in PyTorch.

    Args:
        network: on a CUDA device.
        path: of the weights; the engine is saved as ``<path>.denoiser.plan`` and rebuilt when the weights are newer.
        sw_batch_size: largest number of windows per batch.
        precision: ``fp16``, ``bf16``, ``tf32`` or ``fp32``.
    """
    device = network.hu_window.device.type
    if device != "cuda":
        stop(f"TensorRT runs on CUDA and the device is '{device}'; leave inference_trt.yaml out")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        stop(f"TensorRT needs pip install {' '.join(missing)}; leave inference_trt.yaml out")
    args = {
        "precision": precision, "dynamic_batchsize": [1, sw_batch_size, sw_batch_size], "export_args": EXPORT_ARGS,
    }  # fmt: skip
    return through_forward(trt_compile(network, str(path), args=args, submodule="denoiser"))


def through_forward(network: Synthesizer) -> Synthesizer:
    """Make ``network`` call its denoiser's ``forward``, which is what TensorRT compiles, instead of the two halves that
    inference calls otherwise."""

    def predict(z: Tensor, t: int, condition: Sequence[Tensor]) -> Tensor:
        return network.denoiser(torch.cat([z, *condition], dim=1), torch.full((len(z),), t, device=z.device))

    network.condition, network.predict = lambda z_mr: (z_mr,), predict  # type: ignore[method-assign]
    return network
