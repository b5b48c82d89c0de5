"""Noise schedule and deterministic sampler (Eqs. 11, 13 and 14; DDIM with eta = 0, Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from monai.networks.schedulers import Scheduler
from torch import Tensor

# A step whose share of signal is below this is pure noise in single precision, so sampling starts after it. The default
# schedule keeps every step, the paper's (betas up to 0.2) a third of them.
MIN_ALPHA_BAR = 1e-5


class DDIMSchedule(Scheduler):
    """MONAI's noise schedule, whose ``add_noise`` is the forward process (Eq. 11), with the paper's sampler.

    MONAI's ``DDIMScheduler`` takes other steps than those it lists, clips samples to [-1, 1] by default, and returns
    NaN where alpha-bar underflows. Here each step goes from one listed timestep to the next, coefficients are in double
    precision, and latents are not clipped.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: of the linear schedule (the paper: 1e-4 to 0.2).
        prediction: what the network predicts, ``epsilon`` (Eq. 12) or ``v`` (Salimans and Ho 2022).

    Raises:
        ValueError: for another ``prediction``.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: str = "v",
    ) -> None:
        if prediction not in ("epsilon", "v"):
            raise ValueError(f"prediction must be 'epsilon' or 'v', got '{prediction}'")
        super().__init__(num_train_timesteps, "linear_beta", beta_start=beta_start, beta_end=beta_end)
        self.prediction = prediction
        self._alpha_bars = torch.cumprod(1 - self.betas.double(), dim=0)
        self._alpha_bar = self._alpha_bars.tolist()

    def alpha_bar(self, t: int) -> float:
        """Return the share of signal at timestep ``t`` (Eq. 11); 1 for t = -1, the clean latent."""
        return 1.0 if t < 0 else self._alpha_bar[t]

    def inference_timesteps(self, num_inference_steps: int, first: int | None = None) -> list[tuple[int, int]]:
        """Return the pairs (t, next t) of an evenly spaced descent that ends at the clean latent, t = -1.

        Args:
            first: timestep where it starts; the last one, pure noise, when None.

        Raises:
            ValueError: for fewer than 1 or more than T steps.
        """
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be in 1..{self.num_train_timesteps}, got {num_inference_steps}")
        usable = sum(a >= MIN_ALPHA_BAR for a in self._alpha_bar[: None if first is None else first + 1])
        count = min(num_inference_steps, usable)
        descent = [round(usable * (count - k) / count) - 1 for k in range(count + 1)]
        return list(zip(descent, descent[1:]))

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should predict in training (Eq. 12): the noise, or the velocity."""
        return noise if self.prediction == "epsilon" else self.get_velocity(clean, noise, timesteps)

    def output_for(self, clean: Tensor, z: Tensor, t: int) -> Tensor:
        """Return the network output at (z, t) that corresponds to the clean latent ``clean``."""
        signal, noise = self.alpha_bar(t) ** 0.5, (1 - self.alpha_bar(t)) ** 0.5
        return (z - signal * clean) / noise if self.prediction == "epsilon" else (signal * z - clean) / noise

    def estimate(self, output: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """Return the one-step estimate of the clean latents (Eq. 14) of a batch at ``timesteps`` (N,)."""
        self._alpha_bars = self._alpha_bars.to(z.device)
        share = self._alpha_bars[timesteps].view(-1, *[1] * (z.ndim - 1))
        signal, noise = share.sqrt().float(), (1 - share).sqrt().float()
        return self._clean(output, z, signal, noise)

    def _clean(self, output: Tensor, z: Tensor, signal: Any, noise: Any) -> Tensor:
        return (z - noise * output) / signal if self.prediction == "epsilon" else signal * z - noise * output

    def step(self, output: Tensor, t: int, next_t: int, z: Tensor) -> Tensor:  # type: ignore[override]
        """Step from Z^t to Z^next_t (Eq. 13) by the one-step estimate of the clean latent (Eq. 14)."""
        signal, noise = self.alpha_bar(t) ** 0.5, (1 - self.alpha_bar(t)) ** 0.5
        clean = self._clean(output, z, signal, noise)
        epsilon = output if self.prediction == "epsilon" else signal * output + noise * z
        return self.alpha_bar(next_t) ** 0.5 * clean + (1 - self.alpha_bar(next_t)) ** 0.5 * epsilon

    def sample(
        self,
        predict: Callable[[Tensor, int], Tensor],
        z: Tensor,
        num_inference_steps: int,
        progress: Callable[[Iterable], Iterable] = iter,
        first: int | None = None,
    ) -> Tensor:
        """Run the sampler from the noise ``z`` down to the clean latent.

        Args:
            predict: maps (z, t) to the output of the network.
            first: timestep of ``z``, see :meth:`inference_timesteps`.
            progress: wraps the list of steps, for example ``tqdm``.
        """
        for t, next_t in progress(self.inference_timesteps(num_inference_steps, first)):
            z = self.step(predict(z, t), t, next_t, z)
        return z
