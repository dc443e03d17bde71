"""What the user is told in a sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used. The message says what is wrong and what to do."""


class BusyError(InputError):
    """Another process is at the run."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn `ValueError` and `FileNotFoundError` into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
