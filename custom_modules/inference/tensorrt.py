"""TensorRT in the denoiser's place on CUDA (``configs/inference_trt.yaml``)."""

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
# of torch.onnx.export; what MONAI makes of its dynamic batch does not know the unused argument
EXPORT_ARGS = {"dynamic_shapes": {"x": {0: "batch"}, "timesteps": {0: "batch"}, "context": None}}


def trt_compile_or_stop(
    network: Synthesizer, path: str | Path, sw_batch_size: int, precision: str = "fp16"
) -> Synthesizer:
    """MONAI's ``trt_compile`` for the denoiser, on windows of one size; ends the program with one line where
    MONAI would warn and go on in PyTorch.

    Args:
        network: on a CUDA device.
        path: the engine is kept as ``<path>.denoiser.plan`` and made again when ``path``, the weights, is newer.
        sw_batch_size: most windows a batch.
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
    """Let ``network`` ask its denoiser by ``forward``, which is what TensorRT compiles, in place of the two halves of it
    that the road asks for otherwise."""

    def predict(z: Tensor, t: int, condition: Sequence[Tensor]) -> Tensor:
        return network.denoiser(torch.cat([z, *condition], dim=1), torch.full((len(z),), t, device=z.device))

    network.condition, network.predict = lambda z_mr: (z_mr,), predict  # type: ignore[method-assign]
    return network
