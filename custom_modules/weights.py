"""Weights on disk: state dicts only, loaded strictly, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from custom_modules.errors import InputError, stop

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
    save_atomically(state, path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def save_atomically(content: Any, path: str | Path) -> None:
    """``torch.save`` under another name and then a rename: ``path`` holds all of it or what it held before. What dead
    processes left half-written is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name.split('_')[0]}*.partial"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
