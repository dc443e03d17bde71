"""What holds for every test."""

import os

# Before torch is imported: several workers of pytest-xdist would else use every core each, and so would their children.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
