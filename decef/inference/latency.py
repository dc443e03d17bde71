"""Times of a network's layers on this machine, dense and at several ranks, for `decef.ranks.Latency`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decef.files import replace_file
from decef.inference.deploy import layer_inputs
from decef.inference.engines import Loadable, available, check_engine, load, load_all
from decef.inference.forms import forms_of, to_convolutions
from decef.inference.timing import inference_call, interleaved_times
from decef.layers import FactorizedConv2d
from decef.machine import cpu_name
from decef.plans import layer_type, plan
from decef.progress import bar
from decef.ranks import Share
from decef.ranks.latency import LayerTimes, Times
from decef.ranks.steps import spaced

ROUNDS = 5
DENSE = "dense"


@torch.no_grad()
def measure_times(
    model: nn.Module,
    layer: str,
    example_input: Tensor,
    *,
    engine: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    cache: Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Times:
    """Measure a network and each of its convolutions, dense and as a layer type at a few ranks.

    A rank's time is that of the layer's fastest form, see `decef.deploy`. Equal layers with equal inputs are measured
    once, and what is in the cache, by machine, engine, number of threads and layer, is not measured again.

    Args:
        model: a dense network that takes one tensor; it stays as it is.
        layer: a layer type, a key of `decef.layers.LAYERS`.
        example_input: `(B, C, H, W)`, of the batch size to be fast at, on the device to be fast on.
        engine: of `decef.inference.engines.ENGINES`; None is onnxruntime on a CPU that has it, else eager.
        include, exclude: names of convolutions, see `decef.plan`.
        cache: file of times that were measured before; None is `cache_file()`.
        progress: show a bar.
        **options: of the layer type.

    Raises:
        ValueError: an unknown layer type or engine, or a network that doesn't run on the example.
    """
    there = available(example_input.device)
    engine = check_engine(engine or ("onnxruntime" if "onnxruntime" in there else "eager"), example_input)
    model = copy.deepcopy(model).eval()
    sites = plan(model, layer, rank=Share(1.0), include=include, exclude=exclude, input_size=example_input.shape[1:])
    inputs = layer_inputs(model, example_input, list(sites.ranks))
    known = _Cache(cache or cache_file(), _where(engine, example_input))
    modules = dict(model.named_modules())
    layers: dict[str, LayerTimes] = {}
    for row in bar([row for row in sites.rows if row.name in inputs], f"{engine}: times", progress):
        conv = modules[row.name]
        assert isinstance(conv, nn.Conv2d)
        assert row.max_rank is not None
        most = min(row.max_rank, max(1, row.params_before * row.max_rank // max(1, row.params_after)))
        layers[row.name] = _layer_times(conv, layer, spaced(most), inputs[row.name], engine, known, options)
    dense = load(engine, Loadable(to_convolutions(model), example_input))
    total = interleaved_times({DENSE: inference_call(dense, example_input)}, ROUNDS, min)[DENSE]
    return Times(total, layers)


def cache_file() -> Path:
    """Where times are kept: `$DECEF_CACHE/times.json`, else `~/.cache/decef/times.json`."""
    folder = os.environ.get("DECEF_CACHE") or Path.home() / ".cache" / "decef"
    return Path(folder) / "times.json"


def _layer_times(
    conv: nn.Conv2d,
    layer: str,
    ranks: Sequence[int],
    x: Tensor,
    engine: str,
    known: _Cache,
    options: Mapping[str, Any],
) -> LayerTimes:
    layer_class = layer_type(layer)
    assert issubclass(layer_class, FactorizedConv2d)
    block = layer_class.block
    ranks = sorted({rank // block * block if rank > block else rank for rank in ranks})
    variants: dict[str, dict[str, nn.Module]] = {repr(conv): {DENSE: nn.Sequential(conv)}}
    names: dict[int, str] = {}
    for rank in ranks:
        made = layer_class.like(conv, rank, **options).eval()
        made.reset_parameters()
        forms = {form: m for form, m in forms_of(made).items() if form != "reconstructed"}
        names[rank] = f"{made!r} as {', '.join(forms)}"
        variants[names[rank]] = forms
    missing = {
        (name, form): Loadable(module, x)
        for name, forms in variants.items()
        if known.get(name, x) is None
        for form, module in forms.items()
    }
    if missing:
        loaded = dict(zip(missing, load_all(engine, list(missing.values())), strict=True))
        seconds = interleaved_times({key: inference_call(module, x) for key, module in loaded.items()}, ROUNDS, min)
        for name in dict.fromkeys(name for name, _ in missing):
            known.put(name, x, min(value for (n, _), value in seconds.items() if n == name))
    found = {name: known.get(name, x) for name in variants}
    assert all(value is not None for value in found.values())
    return LayerTimes(found[repr(conv)] or 0.0, {rank: found[name] or 0.0 for rank, name in names.items()}, block)


@dataclass
class _Cache:
    """Seconds by layer and input shape, in a file that is written whole after every layer."""

    path: Path
    where: str
    seconds: dict[str, dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.seconds = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.seconds = {}

    def get(self, layer: str, x: Tensor) -> float | None:
        return self.seconds.get(self.where, {}).get(f"{layer} on {tuple(x.shape)}")

    def put(self, layer: str, x: Tensor, seconds: float) -> None:
        self.seconds.setdefault(self.where, {})[f"{layer} on {tuple(x.shape)}"] = seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(self.seconds, indent=1) + "\n").encode())


def _where(engine: str, x: Tensor) -> str:
    """Machine, engine and threads: what times hold for."""
    package = "onnxruntime" if engine == "onnxruntime" else "torch"
    try:
        number = version(package)
    except PackageNotFoundError:
        number = "unknown"
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else cpu_name()
    return f"{device}, {torch.get_num_threads()} threads, {engine} ({package} {number}), {x.dtype}"
