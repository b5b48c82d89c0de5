"""The Haar transform of the network against ``ptwt``, ``pytorch_wavelets`` lifted to 3D and a plain copy.

    pip install ptwt
    python benchmarks/wavelets.py [--repeats 5]

Ratios of times: of the others to ours; of ours to a plain copy of the tensor, which caches may hold; and of ours to the
limit that memory sets, the tensor's bytes at the speed at which the largest tensor is copied, which no cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fire
import ptwt
import torch
from common import medians, publish
from torch import Tensor

from custom_modules.networks.wavelets import WaveletTransform3d

CASES = [(size, channels) for size in (64, 128) for channels in (1, 32, 64)]
WORKS = ("forward", "inverse", "training")


def lifted() -> WaveletTransform3d:
    """Haar by the filter banks of pytorch_wavelets along three axes, the way of every other wavelet."""
    import pywt
    from pytorch_wavelets.dwt.lowlevel import prep_filt_afb1d, prep_filt_sfb1d
    from torch import nn

    transform, w = WaveletTransform3d("haar"), pywt.Wavelet("haar")
    taps = [*prep_filt_afb1d(w.dec_lo, w.dec_hi), *prep_filt_sfb1d(w.rec_lo, w.rec_hi)]
    transform.filters = nn.ParameterList(nn.Parameter(t.flatten(), requires_grad=False) for t in taps)
    return transform


def works(x: Tensor, name: str, forward: Callable, inverse: Callable) -> dict[str, Callable[[], Any]]:
    """Forward, inverse, and forward + inverse + backward."""
    try:
        with torch.no_grad():
            bands = forward(x)
    except (RuntimeError, TypeError, ValueError):  # no bfloat16
        return {}

    def train() -> None:
        leaf = x.detach().requires_grad_()
        inverse(forward(leaf), leaf).square().sum().backward()

    def without_gradient(work: Callable) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            work()

        return run

    return {
        f"{name} forward": without_gradient(lambda: forward(x)),
        f"{name} inverse": without_gradient(lambda: inverse(bands, x)),
        f"{name} training": train,
    }


def main(repeats: int = 5) -> None:
    torch.manual_seed(0)
    ours, banks = WaveletTransform3d("haar"), lifted()
    rows: list[dict[str, Any]] = []
    for size, channels in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, channels, size, size, size).to(dtype).contiguous(memory_format=torch.channels_last_3d)
            seconds = medians(
                {
                    "copy": partial(x.clone, memory_format=torch.preserve_format),
                    **works(x, "ours", ours, lambda y, x: ours.inverse(y, x.shape[2:])),
                    **works(x, "ptwt", lambda x: ptwt.wavedec3(x, "haar", level=1, mode="symmetric"),
                            lambda y, x: ptwt.waverec3(y, "haar")),
                    **works(x, "pytorch_wavelets", banks, lambda y, x: banks.inverse(y, x.shape[2:])),
                },
                10 * repeats if x.nbytes < 2**24 else repeats if size * channels < 2048 else 3,
            )  # fmt: skip
            row: dict[str, Any] = {
                "tensor": f"{size}³ x {channels}",
                "type": str(dtype).removeprefix("torch."),
                "seconds": seconds,
            }
            row |= {"bytes": x.nbytes, "copy, ms": 1000 * seconds["copy"], "memory, ms": None}
            row |= {"ours forward / copy": seconds["ours forward"] / seconds["copy"], "ours forward / memory": None}
            for other in ("ptwt", "pytorch_wavelets"):
                found = [seconds[f"{other} {w}"] / seconds[f"ours {w}"] for w in WORKS if f"{other} {w}" in seconds]
                row[f"{other} / ours"] = ", ".join(f"{r:.1f}" for r in found) or "fails"
            rows.append(row)
            print({k: v for k, v in row.items() if k != "seconds"}, flush=True)
    largest = max(rows, key=lambda row: row["bytes"])
    for row in rows:
        row["memory, ms"] = largest["copy, ms"] * row["bytes"] / largest["bytes"]
        row["ours forward / memory"] = 1000 * row["seconds"]["ours forward"] / row["memory, ms"]
    publish("wavelets", rows, [c for c in rows[0] if c not in ("seconds", "bytes")])


if __name__ == "__main__":
    fire.Fire(main)
