"""The moving average of the weights that is validated and saved."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.swa_utils import get_ema_multi_avg_fn


def moving_average(decay: float) -> Callable[..., None]:
    """Return the ``multi_avg_fn`` of ``torch.optim.swa_utils.AveragedModel`` for an exponential moving average.

    The decay rises with the steps t, min(``decay``, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage:
    the average then spans about the last tenth of a short training, where a constant 0.998 would still hold much of
    the untrained weights.
    """

    def update(averaged: list, current: list, steps: int) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(steps)) / (10 + int(steps))))(averaged, current, steps)

    return update
