"""Optional dependencies. The library needs only torch, numpy and filelock; some parts need an extra of the package."""

from __future__ import annotations

import importlib.util


def need(extra: str, *modules: str) -> None:
    """Check that optional packages are installed, before importing them; the error says how to install them.

    Args:
        extra: the extra that installs them, as in `pip install 'decef[extra]'`.
        modules: the packages, by the names under which they are imported.

    Raises:
        ImportError: at least one of them is missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{', '.join(missing)} {verb} not installed: pip install 'decef[{extra}]'")
