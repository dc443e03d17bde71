"""Checks that the groups of settings share."""

from __future__ import annotations

from typing import Any


def check_whole(key: str, value: Any) -> None:
    """Raise ValueError for what is neither None nor a whole number, 0 or more; `key` is the setting's name."""
    if value is not None and not (is_whole(value) and value >= 0):
        raise ValueError(f"{key}={value!r} must be a whole number, 0 or more")


def check_flag(key: str, value: Any) -> None:
    """Raise ValueError for what is neither true nor false; `key` is the setting's name."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")


def is_whole(value: Any) -> bool:
    """Whether it is an int that isn't a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
