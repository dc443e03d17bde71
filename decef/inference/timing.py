"""Measure times side by side, the roofline that bounds them, and peak memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import Timer
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")
ROUNDS = 5
ROUND_SECONDS = 0.02  # about how long one variant runs in a round
SETTLE = 0.005  # seconds until the threads that the last variant left spinning are asleep
SLOW = 0.5  # seconds a call above which two rounds are enough


def interleaved_times(
    steps: Mapping[Any, Callable[[], object]],
    rounds: int = ROUNDS,
    reduce: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[Any, float]:
    """Seconds a call of each step. Every round runs all steps in turn, so that all meet the same noise.

    Args:
        steps: what to time, by name.
        rounds: number of rounds; at most two if a call of any step takes more than half a second.
        reduce: makes one number of a step's times in all rounds: the median, or `min` to choose among many by.
    """
    return {name: reduce(values) for name, values in _rounds(steps, rounds).items()}


def times_beside(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds a call of one step, and how many times as long a call of the other takes.

    The second is the median over the rounds of the ratio in each: what slows down a round slows both.
    """
    times = _rounds({"one": one, "other": other}, rounds)
    ratios = (second / first for first, second in zip(times["one"], times["other"], strict=True))
    return statistics.median(times["one"]), statistics.median(ratios)


def _rounds(steps: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """By step the seconds a call in every round."""
    from torch.utils.benchmark import timer as clock  # takes a quarter of a second to import, by setuptools

    timers = {name: Timer(step, timer=clock) for name, step in steps.items()}
    numbers = {}
    for name, timer in timers.items():
        if torch.cuda.is_available():
            timer.timeit(1)  # of a CUDA graph, the second call records, and only the third is fast
        seconds = _warm_mean(timer, 1)
        if seconds > SLOW:
            rounds = min(rounds, 2)
        numbers[name] = max(1, round(ROUND_SECONDS / max(seconds, 1e-7)))
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, timer in timers.items():
            time.sleep(SETTLE)
            times[name].append(_warm_mean(timer, numbers[name]))
    return times


def _warm_mean(timer: Timer, calls: int) -> float:
    timer.timeit(1)  # what ran before has its own data in the caches
    return timer.timeit(calls) / calls


def inference_call(network: Callable[[Tensor], T], x: Tensor) -> Callable[[], T]:
    """One inference of a network on a fixed input, to be timed."""

    def call() -> T:
        with torch.inference_mode():
            return network(x)

    return call


@dataclass(frozen=True)
class Roofline:
    """The best arithmetic and memory throughput of a machine, as measured on it.

    Attributes:
        flops: floating-point operations a second, in a large matrix product.
        bandwidth: bytes a second, in a copy that is too large for any cache.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> Roofline:
        """Measure this machine, in under a second; `dtype` is that of the matrix product."""
        n, count = 1024, 2**25
        a = torch.randn(n, n, device=device).to(dtype)
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        seconds = interleaved_times({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, reduce=min)
        return cls(2 * n**3 / seconds["product"], 2 * 4 * count / seconds["copy"])

    def seconds(self, step: Callable[[], object]) -> float:
        """Lower bound, in seconds, on the convolutions and matrix products of a step, if each reads and writes memory.

        Each takes the longer of its arithmetic at full speed and its traffic at full bandwidth, where the traffic is
        input, weight and output once (Williams, Waterman, Patterson 2009). Data that stay in a cache can beat it.
        """
        with _Counting(self) as counting:
            step()
        return counting.seconds


class _Counting(TorchDispatchMode):
    def __init__(self, roofline: Roofline) -> None:
        super().__init__()
        self.roofline, self.seconds = roofline, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # in inference mode an operator may get here before it is decomposed
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        backward = func is torch.ops.aten.convolution_backward.default
        flops = _backward_flops(*args) if backward else count(*args, **kwargs, out_val=out)
        moved = sum(t.numel() * t.element_size() for t in tree_leaves((args, out)) if isinstance(t, Tensor))
        self.seconds += max(flops / self.roofline.flops, moved / self.roofline.bandwidth)
        return out


def _backward_flops(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    extra: Any,
    groups: int,
    wanted: Sequence[bool],
) -> int:
    """FLOPs of aten.convolution_backward: each gradient takes as many as the output did.

    torch counts the weight's gradient in a grouped convolution as if it were not grouped (2.13).
    """
    positions = len(x) * (x if transposed else grad).shape[2:].numel()
    return 2 * weight.numel() * positions * sum(wanted[:2])


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a step allocates, on top of what was allocated before it.

    On a CPU, what the step frees of that counts as still there.
    """
    step()  # allocates what is allocated only once and stays
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    for _ in range(3):  # now and then the profiler misses a short step
        peak = _profiled_peak(step)
        if peak:
            break
    return peak


def _profiled_peak(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    here = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        here += event["args"]["Bytes"]
        peak = max(peak, here)
    return peak
