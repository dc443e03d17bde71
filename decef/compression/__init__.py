"""Shrink a trained network, from a budget to a small network that is fine-tuned, fast, exported and reported on."""

from decef.extras import need

need("results", "pandas", "jinja2", "tabulate")

from decef.compression.budgets import Memory, Milliseconds, Size  # noqa: E402
from decef.compression.pipeline import Compressed, Compression, compress  # noqa: E402

__all__ = ["Compressed", "Compression", "Memory", "Milliseconds", "Size", "compress"]
