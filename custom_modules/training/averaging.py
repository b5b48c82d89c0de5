"""The moving average of the weights that is validated and saved."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """Exponential moving average of the weights of ``model``; its buffers are copied.

    The decay rises with the steps t, min(``decay``, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage:
    the average then spans about the last tenth of a short training, where a constant 0.998 would still hold much of
    the untrained weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of ``model``. PyTorch's own method copies the number of steps to the device, so that
        every step on a GPU waits for the one before."""
        steps = int(self.n_averaged)
        decay = min(self.decay, (1 + steps) / (10 + steps)) if steps else 0.0
        get_ema_multi_avg_fn(decay)(list(self.module.parameters()), list(model.parameters()), steps)
        for averaged, current in zip(self.module.buffers(), model.buffers()):
            averaged.copy_(current)
        self.n_averaged += 1
