"""Where a network's time goes in ONNX Runtime."""

from __future__ import annotations

import json
import math
import operator
import tempfile
from pathlib import Path
from typing import Any

import torch

from decef.inference.engines import Loadable, check_engine, protos, session_options
from decef.inference.quantize import quantize

CALLS = 20


@torch.no_grad()
def time_by_operator(network: Loadable, precision: str = "fp32") -> dict[tuple[int, ...] | str, float]:
    """Seconds that ONNX Runtime spends in each kind of operator during a call; of every operator its fastest call.

    Args:
        network: one of plain convolutions, see `decef.inference.forms.to_convolutions`, on the CPU.
        precision: "fp32" or "int8".

    Returns:
        Seconds by shape of kernel `(out_channels, in_channels // groups, kh, kw)` for convolutions, by ONNX's name of
        the operator for all else. In 8 bits that includes the conversions, "QuantizeLinear" and "DequantizeLinear".

    Raises:
        ValueError: ONNX Runtime is not installed, doesn't compute in this precision or on this device, or the network
            cannot be exported to it.
    """
    x = network.example
    check_engine("onnxruntime", x, precision)
    import onnxruntime

    (proto,) = protos([network])
    weights = {weight.name: tuple(weight.dims) for weight in proto.graph.initializer}
    kernels = {node.name: weights[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"}
    if precision == "int8":
        proto = quantize(proto, [x])
    options = session_options()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(CALLS):
            session.run(None, {proto.graph.input[0].name: x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[str, tuple[int, dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            before, _ = fastest.get(event["name"], (math.inf, event))
            fastest[event["name"]] = (min(event["dur"], before), event)
    spent: dict[tuple[int, ...] | str, float] = {}
    for microseconds, event in fastest.values():
        kind = _kernel(event, kernels) or event["args"]["op_name"]
        spent[kind] = spent.get(kind, 0.0) + microseconds * 1e-6
    return spent


def _kernel(event: dict[str, Any], kernels: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of the kernel of the convolution that an event of the profiler is of; None for other operators.

    In 8 bits a node keeps its name but for an ending. In fp32 it gets that of its output, and says its weight's shape,
    whose channels may have been padded.
    """
    name = event["name"].removesuffix("_kernel_time").partition("_token_")[0]
    if name in kernels:
        return kernels[name]
    if event["args"]["op_name"] not in ("Conv", "FusedConv"):
        return None
    _, weight, *_ = (tuple(shape) for of_one in event["args"]["input_type_shape"] for shape in of_one.values())
    same_size = [kernel for kernel in kernels.values() if kernel[2:] == weight[2:]]
    smaller = [kernel for kernel in same_size if all(map(operator.le, kernel, weight))]
    return max(smaller, key=math.prod, default=None)  # none: a batch norm, as which the engine runs it too
