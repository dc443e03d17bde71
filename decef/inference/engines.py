"""Engines that run a network for inference on this machine: torch, compiled or not, and ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from decef.copies import copied
from decef.inference.memory import stored_bytes
from decef.inference.quantize import quantize
from decef.inputs import takes_channels_last

if TYPE_CHECKING:
    import onnx
    import onnxruntime

ENGINES = ("eager", "compile", "onnxruntime")
#: The precisions that each engine runs in.
PRECISIONS = {"fp32": ENGINES, "bf16": ("eager", "compile"), "int8": ("onnxruntime",)}


def available(device: torch.device, precision: str = "fp32") -> list[str]:
    """The engines that are installed and run on `device` in one of `PRECISIONS`."""
    found = ["eager", "compile"]
    if device.type == "cpu" and all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime")):
        found.append("onnxruntime")
    return [engine for engine in found if engine in PRECISIONS[precision]]


def need_engines(device: torch.device, precision: str) -> list[str]:
    """`available`, if there is any.

    Raises:
        ValueError: there is none, or no such precision.
    """
    check_precision(precision)
    found = available(device, precision)
    if not found:
        raise ValueError(f"no engine here runs in {precision}: that needs a CPU, and pip install 'decef[deploy]'")
    return found


def check_engine(engine: str, example_input: Tensor, precision: str = "fp32") -> str:
    """Return `engine` if it is installed and runs on the device of the example, in this precision.

    Raises:
        ValueError: it is unknown or not available.
    """
    check_precision(precision)
    if engine not in ENGINES:
        raise ValueError(f"there is no engine '{engine}'; there are {', '.join(ENGINES)}")
    if engine not in available(example_input.device):
        raise ValueError(f"engine '{engine}' needs a CPU, and pip install 'decef[deploy]'")
    if engine not in PRECISIONS[precision]:
        raise ValueError(f"engine '{engine}' does not run in {precision}: {', '.join(PRECISIONS[precision])} can")
    return engine


def check_precision(precision: str) -> None:
    """Raise ValueError if there is no such precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"there is no precision '{precision}'; there are {', '.join(PRECISIONS)}")


@dataclass(eq=False)
class Loadable:
    """A network for engines to load, in one precision or in several: it is exported to ONNX at most once.

    Attributes:
        module: in evaluation mode; loading does not change it.
        example: an input `(B, C, H, W)`.
    """

    module: nn.Module
    example: Tensor
    _proto: onnx.ModelProto | None = field(init=False, default=None)


def load(
    engine: str, network: Loadable, precision: str = "fp32", calibration: Sequence[Tensor] | None = None
) -> Runner:
    """A network as a module that the engine runs, for inputs of its example's shape.

    Args:
        engine: one of `ENGINES`.
        network: what to load; load the same one again for other precisions.
        precision: of the computation, one of `PRECISIONS`; inputs and outputs stay in fp32.
        calibration: for int8, inputs of the example's shape; None is the example alone.

    Raises:
        ValueError: the engine is unknown, not installed or doesn't run on the input's device, or the network cannot be
            exported to ONNX for it.
    """
    x = network.example
    check_engine(engine, x, precision)
    if engine == "onnxruntime":
        (proto,) = protos([network])
        if precision == "int8":
            proto = quantize(proto, [x] if calibration is None else calibration)
        return OnnxRuntime(proto, x)
    module, dtype = copied(network.module), torch.bfloat16 if precision == "bf16" else None
    layout = torch.channels_last if takes_channels_last(module, x) else torch.contiguous_format
    return (_Compiled if engine == "compile" else _Eager)(module, layout, dtype)


def load_all(engine: str, networks: Sequence[Loadable], precision: str = "fp32") -> list[Runner]:
    """Each network by `load`; those that are still to be exported, side by side."""
    if engine == "onnxruntime":
        protos(networks)
    return [load(engine, network, precision) for network in networks]


def to_onnx(model: nn.Module, example_input: Tensor, *, dynamic_batch: bool = False) -> onnx.ModelProto:
    """The network as ONNX, with an input named "input" and an output named "output".

    Args:
        model: takes one tensor and returns one; it is set to evaluation mode.
        example_input: `(B, ...)`; the ONNX network only takes this shape.
        dynamic_batch: allow any B.

    Raises:
        ValueError: the network cannot be exported.
    """
    free = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    return _export(model, (example_input,), ["input"], ["output"], free)


def protos(networks: Sequence[Loadable]) -> list[onnx.ModelProto]:
    """The networks as ONNX; in one export, because one takes a second whatever its size.

    Raises:
        ValueError: a network cannot be exported.
    """
    missing = [network for network in networks if network._proto is None]
    if len(missing) == 1:
        missing[0]._proto = to_onnx(missing[0].module, missing[0].example)
    elif missing:
        from onnx.utils import Extractor

        names = [(f"input{i}", f"output{i}") for i in range(len(missing))]
        inputs, outputs = zip(*names, strict=True)
        side_by_side = _SideBySide([network.module for network in missing])
        distinct = tuple(network.example.clone() for network in missing)  # one tensor given twice would be one input
        extractor = Extractor(_export(side_by_side, distinct, list(inputs), list(outputs)))
        for network, (one, other) in zip(missing, names, strict=True):
            network._proto = extractor.extract_model([one], [other])
    return [network._proto for network in networks if network._proto is not None]


def check_equal(output: Tensor, expected: Tensor) -> None:
    """Check that an output equals the expected one up to rounding.

    Raises:
        ValueError: they differ at all where they are whole numbers or infinite, or else by more than the square root of
            the rounding error of one operation, relative to the largest. That is the dtype's `eps`, or 2^-10 on a GPU
            whose convolutions compute fp32 in TF32, as torch has them do by default.
    """
    if not expected.dtype.is_floating_point:
        if not torch.equal(output, expected):
            raise ValueError("the output, of whole numbers, differs from the original's")
        return
    same = output == expected  # infinities among them
    error = (output - expected).abs().masked_fill(same, 0).max().item()
    tf32 = output.is_cuda and expected.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    eps = 2**-10 if tf32 else torch.finfo(expected.dtype).eps
    largest = expected.abs().masked_fill(expected.isinf(), 0).max().item()
    if not error <= eps**0.5 * largest:
        raise ValueError(f"the output differs from the original's by {error:.2g}")


class Runner(nn.Module):
    """A network that an engine runs.

    Attributes:
        bytes: its size in a file of the engine.
    """

    bytes: int = 0


class _Eager(Runner):
    """A torch network with its input and the weights of its convolutions in one memory layout."""

    def __init__(self, model: nn.Module, layout: torch.memory_format, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self.model = nn.utils.convert_conv2d_weight_memory_format(model.to(dtype=dtype), layout)
        self.bytes = stored_bytes(self.model)

    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous(memory_format=self.layout) if x.dim() == 4 else x
        y = self._run(y if self.dtype is None else y.to(self.dtype))
        return y.to(x.dtype) if y.is_floating_point() else y

    def _run(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Compiled(_Eager):
    """The same, compiled; on a GPU as a CUDA graph, whose next call writes over the memory of its output."""

    def __init__(self, model: nn.Module, layout: torch.memory_format, dtype: torch.dtype | None) -> None:
        super().__init__(model, layout, dtype)
        self._graph = next((p.is_cuda for p in model.parameters()), False)
        self._compiled = torch.compile(_own_code(model), mode="reduce-overhead" if self._graph else None, dynamic=False)

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self._compiled(x)
        return y.clone() if self._graph else y


def _own_code(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that calls `model`, with code of its own.

    torch keeps compiled networks by the code of their forward, eight for each, and runs any more uncompiled.
    """

    def call(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y

    call.__code__ = call.__code__.replace()
    return call


class OnnxRuntime(Runner):
    """An ONNX network that ONNX Runtime runs, for inputs of the example's shape."""

    def __init__(self, proto: onnx.ModelProto, example: Tensor) -> None:
        import onnxruntime

        super().__init__()
        self.shape = example.shape
        stored = proto.SerializeToString()
        self.bytes = len(stored)
        self._session = onnxruntime.InferenceSession(stored, session_options(), providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self.shape:
            raise ValueError(f"this network was deployed for inputs of {tuple(self.shape)}, not {tuple(x.shape)}")
        return torch.from_numpy(self._session.run(None, {self._session.get_inputs()[0].name: x.numpy()})[0])


def session_options() -> onnxruntime.SessionOptions:
    """How ONNX Runtime runs here: with torch's number of threads, and silent."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Otherwise its threads keep spinning for milliseconds after a call, and whatever runs next lacks their cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class _SideBySide(nn.Module):
    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model, x in zip(self.models, inputs, strict=True))


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], input_names: list[str], output_names: list[str], free: Any = None
) -> onnx.ModelProto:
    with torch.no_grad(), _quiet(), _operators_listed_once():
        try:
            program = torch.onnx.export(
                model.eval(),
                inputs,
                dynamo=True,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=free,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ValueError(f"the network cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    assert program is not None
    return program.model_proto


_operators: dict[Any, Any] = {}


@contextlib.contextmanager
def _operators_listed_once() -> Iterator[None]:
    """torch lists ONNX's operators anew for every export, which takes half of its time; here it does so once."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # it is private and may move: exports then take longer
        yield
        return
    list_them = ONNXRegistry.from_torchlib

    def listed(*args: Any, **options: Any) -> Any:
        key = args, tuple(options.items())
        if key not in _operators:
            _operators[key] = list_them(*args, **options)
        return _operators[key]

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(listed)):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log messages, warnings and output."""
    import warnings

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
