"""What this machine is, for records and for what was measured on it; how its memory is used."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch


class Environment(TypedDict, total=False):
    """When, where and with what something was made."""

    git_commit: str | None
    git_dirty: bool | None
    started: str
    python: str
    packages: dict[str, str | None]
    device: str
    threads: int
    machine: str


def cores() -> int:
    """How many CPU cores this process may use, where the system tells it; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's model name where the system tells it, with the widest vector instructions that matter here."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown CPU"
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    known = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flags and f in flags.group(1).split()]
    return f"{model.group(1) if model else 'unknown CPU'} ({known[0] if known else 'no wide vectors'})"


def cpu_capabilities() -> Mapping[str, Any]:
    """What instructions this CPU has, by torch's names; empty if torch is too old to say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def int8_saturates() -> bool:
    """Whether sums of 8-bit products overflow on this CPU: without VNNI, x86 adds two of them in 16 bits.

    ONNX Runtime's guide to quantisation advises weights of 7 bits there.
    """
    capabilities = cpu_capabilities()
    there = any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"))
    return platform.machine() in ("x86_64", "AMD64") and not there


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, where the C library is glibc; say whether that worked.

    By default glibc maps every large block anew and gives it back when it is freed, so that each of a training step's
    intermediate results starts with page faults. Without them training on a CPU is faster.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names of malloc.h, without M_
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = {mmap_max: 0, trim_threshold: 2**31 - 1, top_pad: 2**26}
    done = [mallopt(what, value) for what, value in wanted.items()]
    return all(done)


def device_name(device: torch.device) -> str:
    """A device's name as records have it: "cpu", or the GPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(device: str) -> Environment:
    """What is made now is made with.

    Args:
        device: its name, as records have it.
    """
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "hydra-core", "wandb"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    # Changes in results/ don't count: runs make them, and no run depends on them.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cpu_name()}",
    }


def _git(*args: str) -> str | None:
    """What git says of this repository; None if it says nothing, or if the package is not in its repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed copy, perhaps within another repository
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
