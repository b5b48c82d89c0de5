"""Weights on disk: state dicts only, loaded strictly, written completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from custom_modules.errors import InputError, stop
from custom_modules.files import atomic_write, sha256, to_plain

TRAINED_WITH = "trained_with"  # key in a weights file, in addition to those of the tensors

Network = TypeVar("Network", bound=nn.Module)


def load_weights(network: Network, path: str | Path, trained_with: Mapping[str, Any] | None = None) -> Network:
    """Load a state dict strictly; half precision on disk is converted to the precision of the network.

    Args:
        trained_with: values in the config that the weights depend on, such as the spacing; None checks nothing.

    Raises:
        InputError: when the file is missing or damaged, does not fit the network, or was trained with other values than
            those of ``trained_with`` or the network's HU window.
    """
    state, stored = read_weights(path)
    check_trained_with(path, stored, trained_with or {})
    window, trained = getattr(network, "hu_window", None), state.get("hu_window")
    if window is not None and trained is not None and not torch.allclose(window.cpu(), trained.to(window.dtype)):
        raise InputError(f"{path}: trained with hu_window {trained.tolist()}, the config says {window.tolist()}")
    try:
        network.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights of another network than the config describes ({reason})") from error
    return network


def read_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dict in a file, and the values that it was trained with (empty where the file does not say).
    Nothing in the file is executed (``weights_only=True``).

    Raises:
        InputError: when the file is missing or damaged, or holds no state dict.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such weights; train them (docs/training.md) or give the path of others")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path}: not readable as weights ({type(error).__name__}); fetch or train it again"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: weights of another network than the config describes (no state dict)")
    stored = state.pop(TRAINED_WITH, {})
    return state, stored


def check_trained_with(path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError with every value in which ``stored`` and ``wanted`` differ, unless they agree."""
    pairs = {name: (stored[name], value) for name, value in to_plain(wanted).items() if name in stored}
    wrong = [
        f"{name} {a}, not {b}" for name, (a, b) in pairs.items() if not np.array_equal(np.asarray(a), np.asarray(b))
    ]
    if wrong:
        raise InputError(f"{path}: trained with {'; '.join(wrong)}; keep these settings, or train with them")


def load_weights_or_stop(
    network: Network, path: str | Path, trained_with: Mapping[str, Any] | None = None, compile: bool = False
) -> Network:
    """Load weights as :func:`load_weights` does, for configs: an :class:`InputError` ends the program with its one
    line. With ``compile`` the network is compiled afterwards (``torch.compile``)."""
    try:
        load_weights(network, path, trained_with)
        if compile:
            network.compile()
        return network
    except InputError as error:
        stop(str(error))


def load_autoencoder_or_stop(
    network: Network, path: str | Path, trained_with: Mapping[str, Any] | None = None
) -> Network:
    """Load the weights of stage 1 into ``network.autoencoder``, as :func:`load_weights_or_stop` does."""
    load_weights_or_stop(network.autoencoder, path, trained_with)  # type: ignore[arg-type]
    return network


def save_weights(
    network: nn.Module | Mapping[str, Any], path: str | Path, dtype: torch.dtype = torch.float16,
    trained_with: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Write a state dict, or that of a network, with floating point numbers as ``dtype``, together with the values that
    it was ``trained_with``. Return the SHA-256 of the file."""
    state = network.state_dict() if isinstance(network, nn.Module) else network
    state = {k: v.detach().cpu().to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    if trained_with:
        state[TRAINED_WITH] = to_plain(trained_with)
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return sha256(path)
