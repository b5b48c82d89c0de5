"""The Haar transform of the network against ``ptwt``, ``pytorch_wavelets`` lifted to 3D and a plain copy.

    pip install ptwt
    python benchmarks/wavelets.py [--repeats 5]

Times are ratios to ours (of the copy: ours to it), in one process, medians of interleaved repeats.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from pathlib import Path

import fire
import numpy as np
import ptwt
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from custom_modules.wavelets import WaveletTransform3d  # noqa: E402

CASES = [(64, 1), (64, 32), (64, 64), (128, 1), (128, 32)]


def lifted() -> WaveletTransform3d:
    """Haar by the filter banks of pytorch_wavelets along three axes, the road of every other wavelet."""
    import pywt
    from pytorch_wavelets.dwt.lowlevel import prep_filt_afb1d, prep_filt_sfb1d
    from torch import nn

    transform, w = WaveletTransform3d("haar"), pywt.Wavelet("haar")
    taps = [*prep_filt_afb1d(w.dec_lo, w.dec_hi), *prep_filt_sfb1d(w.rec_lo, w.rec_hi)]
    transform.filters = nn.ParameterList(nn.Parameter(t.flatten(), requires_grad=False) for t in taps)
    return transform


def transforms() -> dict:
    """Name to (forward, inverse); forward takes (N, C, D, H, W) and inverse what forward gave."""
    ours, banks = WaveletTransform3d("haar"), lifted()
    return {
        "ours": (ours, lambda y, x: ours.inverse(y, x.shape[2:])),
        "ptwt": (lambda x: ptwt.wavedec3(x, "haar", level=1, mode="symmetric"), lambda y, x: ptwt.waverec3(y, "haar")),
        "pytorch_wavelets": (banks, lambda y, x: banks.inverse(y, x.shape[2:])),
    }


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(x: Tensor, repeats: int) -> list[dict]:
    """Median milliseconds of every transform on ``x``; ``None`` where it fails."""
    times: dict[tuple[str, str], list[float]] = {}
    failed: dict[str, str] = {}
    for repeat in range(repeats + 1):  # the first warms up
        runs = {("copy", "forward"): lambda: x.clone(memory_format=torch.preserve_format)}
        for name, (forward, inverse) in transforms().items():
            if name in failed:
                continue

            def train(forward=forward, inverse=inverse):
                leaf = x.detach().requires_grad_()
                inverse(forward(leaf), leaf).square().sum().backward()

            try:
                bands = forward(x)
                runs[name, "forward"] = lambda f=forward: f(x)
                runs[name, "inverse"] = lambda i=inverse, b=bands: i(b, x)
                runs[name, "training"] = train
            except (RuntimeError, TypeError, ValueError) as error:
                failed[name] = str(error).splitlines()[0]
        for key, work in runs.items():
            try:
                times.setdefault(key, []).append(seconds(work))
            except (RuntimeError, TypeError, ValueError) as error:
                failed[key[0]] = str(error).splitlines()[0]
    rows = [
        {"transform": name, "work": work, "ms": 1000 * float(np.median(values[1:]))}
        for (name, work), values in times.items()
        if name not in failed
    ]
    return rows + [{"transform": name, "work": "failed", "error": error} for name, error in failed.items()]


def main(repeats: int = 5) -> None:
    torch.manual_seed(0)
    rows = []
    for size, channels in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, channels, size, size, size).to(dtype).contiguous(memory_format=torch.channels_last_3d)
            case = {"size": size, "channels": channels, "dtype": str(dtype).removeprefix("torch.")}
            found = measure(x, repeats)
            rows += [case | row for row in found]
            ms = {(row["transform"], row["work"]): row["ms"] for row in found if "ms" in row}
            line = f"{size:>4}³ x {channels:<3} {case['dtype']:<9}"
            line += f" forward {ms['ours', 'forward'] / ms['copy', 'forward']:5.1f} x copy;"
            for other in ("ptwt", "pytorch_wavelets"):
                ratios = [ms[other, w] / ms["ours", w] for w in ("forward", "inverse", "training") if (other, w) in ms]
                line += f"  {other} " + (" / ".join(f"{r:.1f}" for r in ratios) or "failed")
            print(line, flush=True)
    results = {"date": str(datetime.date.today()), "machine": platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "rows": rows}  # fmt: skip
    (ROOT / "runs").mkdir(exist_ok=True)
    (ROOT / "runs" / "bench_wavelets.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
