"""Weights on disk: state dicts only, loaded strictly, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from custom_modules.errors import InputError, stop
from custom_modules.files import atomic_write, sha256

Network = TypeVar("Network", bound=nn.Module)


def load_weights(network: Network, path: str | Path) -> Network:
    """Load a state dict strictly, ``weights_only=True``; half precision on disk becomes the network's own.

    Raises:
        InputError: when the file is missing or damaged, does not fit the network, or was trained with another HU
            window than the network is set to.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such weights; train them (docs/training.md) or give --checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not readable as weights ({type(error).__name__}); fetch or train it again") from error
    window, trained = getattr(network, "hu_window", None), state.get("hu_window") if isinstance(state, dict) else None
    if window is not None and trained is not None and not torch.allclose(window.cpu(), trained.to(window.dtype)):
        raise InputError(f"{path}: trained with hu_window {trained.tolist()}, the config says {window.tolist()}")
    try:
        network.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights of another network than the config describes ({reason})") from error
    return network


def load_weights_or_stop(network: Network, path: str | Path, compile: bool = False) -> Network:
    """:func:`load_weights` for configs: an :class:`InputError` ends the program with its one line. With ``compile`` the
    network is compiled afterwards (``torch.compile``)."""
    try:
        load_weights(network, path)
        if compile:
            network.compile()
        return network
    except InputError as error:
        stop(str(error))


def save_weights(network: nn.Module, path: str | Path, dtype: torch.dtype = torch.float16) -> str:
    """Write the network's state dict, floating point as ``dtype``, and return the file's SHA-256."""
    state = {k: v.detach().cpu().to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return sha256(path)


