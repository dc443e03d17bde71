"""The numeric precision of training, by device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from decef.machine import cpu_capabilities


def resolve_precision(device: torch.device, precision: str) -> str:
    """The precision to train in; "auto" is bf16 if the hardware of `device` has instructions for it, else fp32.

    On a CPU without bf16 instructions, bf16 is emulated, many times slower than fp32.
    """
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = cpu_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast_for(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context in which the network runs in a `precision` other than "auto": autocast, or nothing for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)
