"""The library needs torch and numpy alone; what else a part of it needs comes with an extra of the package."""

from __future__ import annotations

import importlib.util


def need(extra: str, *modules: str) -> None:
    """Say in one sentence which packages are missing, before something is imported that fails without them.

    Args:
        extra: of this package, as in `pip install 'decef[extra]'`.
        modules: what must be there, by the names that they are imported by.

    Raises:
        ImportError: one of them isn't.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{', '.join(missing)} {verb} not installed: pip install 'decef[{extra}]'")
