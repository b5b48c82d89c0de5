"""Synthetic CT in Python, ``from bundle import synthesize``, and the commands: ``python -m bundle COMMAND``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom_modules.inference.in_memory import SyntheticCT, synthesize

__all__ = ["SyntheticCT", "synthesize"]


def __getattr__(name: str) -> Any:
    """Import what ``__all__`` names when it is asked for, because help on the commands must not import PyTorch."""
    if name in __all__:
        from custom_modules.inference import in_memory

        return getattr(in_memory, name)
    raise AttributeError(f"module 'bundle' has no attribute '{name}'")
