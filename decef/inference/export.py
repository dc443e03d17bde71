"""Write networks to files for other engines, and check what the files compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decef.extras import need
from decef.inference.deploy import deploy, relative_error
from decef.inference.engines import OnnxRuntime, available, check_equal, to_onnx
from decef.inference.forms import FORMS, to_convolutions
from decef.inference.quantize import calibration_inputs, quantize
from decef.inference.timing import inference_call, interleaved_times


def export(
    model: nn.Module,
    path: str | Path,
    input_shape: Sequence[int],
    *,
    form: str | Mapping[str, str] = "fastest",
    calibration: Tensor | Iterable[object] | None = None,
    dynamic_batch: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write `model` to a file, load it again, compare it with the original and time it.

    Args:
        model: on the CPU, takes one tensor and returns one; it is set to evaluation mode.
        path: file to write: ONNX if it ends in .onnx, a `torch.export` program if it ends in .pt2.
        input_shape: `(B, C, H, W)`.
        form: one of `FORMS` for all factorised layers, or one for each by name; or "fastest": the forms that `deploy`
            finds fastest, in ONNX Runtime for an ONNX file if that is installed, else in torch.
        calibration: write an ONNX file that computes in 8 bits, with activations quantised by their range on these
            inputs: a hundred training images or so, see `decef.deploy`. None: in fp32.
        dynamic_batch: allow any B.
        progress: show progress bars.

    Returns:
        Lines that say what was done.

    Raises:
        ValueError: an unknown form or file suffix, a network that does not run on this shape or cannot be exported, or
            a file whose output differs from the original's. No file is then left behind. Or `calibration` is given for
            another kind of file, or doesn't fit.
        ImportError: an ONNX file needs onnx and onnxscript, 8 bits ONNX Runtime too, and one of them is not installed.
    """
    path = Path(path)
    check_export(path, input_shape, form, calibration)
    model = model.eval()
    x, inputs = torch.randn(*input_shape), None
    if calibration is not None:
        inputs = calibration_inputs(calibration, x)
        x = inputs[0]  # the range of other inputs is not known
    try:
        with torch.inference_mode():
            expected = model(x.clone())  # a network may change its input in place
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the network doesn't run on an input of {tuple(input_shape)}: {error}") from error
    if not isinstance(expected, Tensor):
        raise ValueError(f"the network returns {type(expected).__name__}, not a tensor: wrap it in one that does")
    engine = "onnxruntime" if path.suffix == ".onnx" and "onnxruntime" in available(x.device) else "eager"
    network = to_convolutions(model, _fastest(model, x, engine, inputs, progress) if form == "fastest" else form)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        runners = KINDS[path.suffix](network, x, partial, dynamic_batch, inputs)
        for runner in runners.values() if inputs is None else ():
            check_equal(runner(x.clone()), expected)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if inputs is not None:
        off = relative_error(runners["onnxruntime"](x.clone()), expected)
        checked = f"in 8 bits: its output for an input of calibration is {off:.2g} of its norm off the original's"
    elif runners:
        checked = f"equal to the original in {', '.join(runners)}"
    else:
        checked = "not checked: ONNX Runtime is not installed"
    lines = [f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB), {checked}"]

    everything: dict[str, Callable[[Tensor], Tensor]] = {"torch, the original": model, **runners}
    seconds = interleaved_times({name: inference_call(runner, x.clone()) for name, runner in everything.items()})
    torch_seconds = seconds["torch, the original"]
    return lines + [
        f"{name}: {value * 1e3:.3g} ms a batch of {len(x)}, {value / torch_seconds:.2f} of torch"
        for name, value in seconds.items()
    ]


def check_export(path: Path, input_shape: Sequence[int], form: str | Mapping[str, str], calibration: object) -> None:
    """Refuse what `export` would, of what can be said without the network; for the arguments see there.

    Raises:
        ValueError, ImportError: as `export` does.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"{path} must end in {' or '.join(KINDS)}")
    if any(length < 1 for length in input_shape):
        raise ValueError(f"an input of {tuple(input_shape)} is empty: every number must be at least 1")
    if isinstance(form, str) and form not in ("fastest", *FORMS):
        raise ValueError(f"there is no form '{form}'; there are fastest, {', '.join(FORMS)}")
    if calibration is not None and path.suffix != ".onnx":
        raise ValueError(f"8 bits are for .onnx files, not {path}: leave calibration out")
    if path.suffix == ".onnx":
        need("deploy", "onnx", "onnxscript", *(["onnxruntime"] if calibration is not None else []))


def _fastest(
    model: nn.Module, x: Tensor, engine: str, inputs: list[Tensor] | None, progress: bool
) -> Mapping[str, str]:
    precision = "fp32" if inputs is None else "int8"
    return deploy(model, x, engines=[engine], precision=precision, calibration=inputs, progress=progress).forms


def _onnx(
    network: nn.Module, x: Tensor, path: Path, dynamic_batch: bool, inputs: list[Tensor] | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    import onnx

    proto = to_onnx(network, x, dynamic_batch=dynamic_batch)
    onnx.save_model(proto if inputs is None else quantize(proto, inputs), path)
    return {"onnxruntime": OnnxRuntime(onnx.load_model(path), x)} if "onnxruntime" in available(x.device) else {}


def _program(
    network: nn.Module, x: Tensor, path: Path, dynamic_batch: bool, inputs: list[Tensor] | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    free = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    traced = torch.cat([x, x]) if dynamic_batch and len(x) == 1 else x  # a batch of one would be taken as fixed
    try:
        program = torch.export.export(network, (traced,), dynamic_shapes=free)
    except RuntimeError as error:
        raise ValueError(f"the network cannot be exported by torch.export: {str(error).splitlines()[0]}") from error
    torch.export.save(program, path)
    return {"torch.export": torch.export.load(path).module()}


KINDS: dict[str, Callable[..., dict[str, Callable[[Tensor], Tensor]]]] = {".onnx": _onnx, ".pt2": _program}
