"""Write networks to files for other engines, and check what the files compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decef.inference.deploy import deploy
from decef.inference.engines import OnnxRuntime, available, check_equal, to_onnx
from decef.inference.forms import FORMS, to_convolutions
from decef.inference.timing import inference_call, interleaved_times


def export(
    model: nn.Module,
    path: str | Path,
    input_shape: Sequence[int],
    *,
    form: str | Mapping[str, str] = "fastest",
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
        dynamic_batch: allow any B.
        progress: show progress bars.

    Returns:
        Lines that say what was done.

    Raises:
        ValueError: an unknown form or file suffix, a network that does not run on this shape or cannot be exported, or
            a file whose output differs from the original's. No file is then left behind.
    """
    kinds: dict[str, Callable[..., dict[str, Callable[[Tensor], Tensor]]]] = {".onnx": _onnx, ".pt2": _program}
    path = Path(path)
    if path.suffix not in kinds:
        raise ValueError(f"{path} must end in {' or '.join(kinds)}")
    if isinstance(form, str) and form not in ("fastest", *FORMS):
        raise ValueError(f"there is no form '{form}'; there are fastest, {', '.join(FORMS)}")
    model = model.eval()
    x = torch.randn(*input_shape)
    try:
        with torch.inference_mode():
            expected = model(x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the network doesn't run on an input of {tuple(input_shape)}: {error}") from error
    engine = "onnxruntime" if path.suffix == ".onnx" and "onnxruntime" in available(x.device) else "eager"
    network = to_convolutions(
        model, deploy(model, x, engines=[engine], progress=progress).forms if form == "fastest" else form
    )
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        runners = kinds[path.suffix](network, x, partial, dynamic_batch)
        for runner in runners.values():
            check_equal(runner(x), expected)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    checked = (
        f"equal to the original in {', '.join(runners)}" if runners else "not checked: ONNX Runtime is not installed"
    )
    lines = [f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB), {checked}"]

    everything: dict[str, Callable[[Tensor], Tensor]] = {"torch, the original": model, **runners}
    seconds = interleaved_times({name: inference_call(runner, x) for name, runner in everything.items()})
    torch_seconds = seconds["torch, the original"]
    return lines + [
        f"{name}: {value * 1e3:.3g} ms a batch of {len(x)}, {value / torch_seconds:.2f} of torch"
        for name, value in seconds.items()
    ]


def _onnx(network: nn.Module, x: Tensor, path: Path, dynamic_batch: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    import onnx

    onnx.save_model(to_onnx(network, x, dynamic_batch=dynamic_batch), path)
    return {"onnxruntime": OnnxRuntime(onnx.load_model(path), x)} if "onnxruntime" in available(x.device) else {}


def _program(network: nn.Module, x: Tensor, path: Path, dynamic_batch: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    free = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    traced = torch.cat([x, x]) if dynamic_batch and len(x) == 1 else x  # a batch of one would be taken as fixed
    try:
        program = torch.export.export(network, (traced,), dynamic_shapes=free)
    except RuntimeError as error:
        raise ValueError(f"the network cannot be exported by torch.export: {str(error).splitlines()[0]}") from error
    torch.export.save(program, path)
    return {"torch.export": torch.export.load(path).module()}
