"""8-bit networks for ONNX Runtime: static quantisation, weights per channel, activations by calibration."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decef.extras import need
from decef.machine import int8_saturates

if TYPE_CHECKING:
    import onnx

MOST_IMAGES = 1024  # that are read of a loader


def quantize(proto: onnx.ModelProto, batches: Sequence[Tensor]) -> onnx.ModelProto:
    """An ONNX network that computes in 8 bits, as a network with quantise and dequantise nodes (QDQ).

    Weights have 7 bits where 8 would overflow, see `int8_saturates`.

    Args:
        proto: from `decef.inference.engines.to_onnx`, in fp32.
        batches: inputs of its shape; the range of every intermediate result is that of these.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: there is no batch.
    """
    need("deploy", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not batches:
        raise ValueError("8 bits need a batch to calibrate on")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, done = (str(Path(folder, name)) for name in ("given.onnx", "prepared.onnx", "done.onnx"))
        onnx.save_model(proto, given)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            done,
            _Calibration(proto.graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=int8_saturates(),
        )
        return onnx.load_model(done)


def calibration_inputs(calibration: Tensor | Iterable[object], example: Tensor) -> list[Tensor]:
    """What to calibrate on, in batches of the example's size; what is left over in the end is left out.

    Args:
        calibration: images `(B, C, H, W)`, or batches as a DataLoader yields them (labels are ignored), of which only
            as many are read as `MOST_IMAGES` take.
        example: an input of the network.

    Raises:
        ValueError: they are not like the example, or too few for one batch.
    """
    inputs: list[Tensor] = []
    rest = example[:0]
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.shape[1:] != example.shape[1:]:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"an input for calibration is {got}; it must be like the example, {tuple(example.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"an input for calibration is {images.dtype}: normalise as the network's training did")
        *whole, rest = torch.cat([rest, images.to(example)]).split(len(example))
        inputs += whole
        if len(rest) == len(example):
            inputs, rest = [*inputs, rest], rest[:0]
        if len(inputs) * len(example) >= MOST_IMAGES and not isinstance(calibration, Tensor):
            break
    if not inputs:
        raise ValueError(
            f"calibration has no {len(example)} inputs, which is the example's batch size: give more of them"
        )
    return inputs


class _Calibration:
    """Batches as ONNX Runtime's calibration reads them."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._left: Iterator[dict[str, Any]] = ({name: batch.numpy()} for batch in batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the quantiser says through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
