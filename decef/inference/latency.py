"""Times of a network's layers on this machine, dense and at several ranks, for `decef.ranks.Latency`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from decef.copies import copied
from decef.costs import shared_weights
from decef.files import write_json
from decef.inference.deploy import layer_inputs
from decef.inference.engines import Loadable, available, check_engine, load_all
from decef.inference.forms import forms_of, to_convolutions
from decef.inference.timing import inference_call, interleaved_times
from decef.layers import FactorizedConv2d
from decef.machine import cpu_name
from decef.plans import AUTO, AUTO_TYPES, layer_type, plan
from decef.progress import bar
from decef.ranks import Share
from decef.ranks.latency import LayerTimes, Times
from decef.ranks.steps import spaced

log = logging.getLogger(__name__)

ROUNDS = 5
DENSE, WHOLE = "dense", "the whole network"


@torch.no_grad()
def measure_times(
    model: nn.Module,
    layer: str,
    example_input: Tensor,
    *,
    engine: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = False,
) -> Times:
    """Measure a network and each of its convolutions, dense and as a layer type at a few ranks.

    A rank's time is that of the layer's fastest form, see `decef.deploy`. Equal layers with equal inputs are measured
    once. The cache, `cache_file()`, has times over the dense layer's, by machine, engine, number of threads and layer:
    these are not measured again, but the dense layers are, together with the network, as the machine may be busier or
    less so.
    Convolutions that share a weight have one rank: their times are added up under the first one's name.

    Args:
        model: a dense network that takes one tensor; it stays as it is.
        layer: a layer type, a key of `decef.layers.LAYERS`.
        example_input: `(B, C, H, W)`, of the batch size to be fast at, on the device to be fast on.
        engine: of `decef.inference.engines.ENGINES`; None is onnxruntime on a CPU that has it, else eager.
        include, exclude: names of convolutions, see `decef.plan`.
        progress: show a bar.

    Raises:
        ValueError: an unknown layer type or engine, or a network that doesn't run on the example.
    """
    if layer == AUTO:
        raise ValueError(f"times are of one layer type: measure {', '.join(AUTO_TYPES)}, and give all to Latency")
    there = available(example_input.device)
    engine = check_engine(engine or ("onnxruntime" if "onnxruntime" in there else "eager"), example_input)
    model = copied(model).eval()
    sites = plan(model, layer, rank=Share(1.0), include=include, exclude=exclude, input_size=example_input.shape[1:])
    inputs = layer_inputs(model, example_input, list(sites.ranks))
    known = _Cache(cache_file(), _where(engine, example_input))
    modules = dict(model.named_modules())
    dense = {_call(modules[n], x): Loadable(nn.Sequential(modules[n]), x) for n, xs in inputs.items() for x in xs}
    dense[WHOLE] = Loadable(to_convolutions(model), example_input)
    loaded = zip(dense, load_all(engine, list(dense.values())), strict=True)
    seconds = interleaved_times({key: inference_call(run, dense[key].example) for key, run in loaded}, ROUNDS, min)
    layers: dict[str, LayerTimes] = {}
    sharing = shared_weights(model)
    rows = {row.name: row for row in sites.rows if row.name in inputs}
    for name in bar(rows, f"{engine}: times", progress):
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        first = rows[next(other for other in sharing.get(name, [name]) if other in rows)]
        assert first.max_rank is not None
        most = min(first.max_rank, max(1, first.params_before * first.max_rank // max(1, first.params_after)))
        layer_class = layer_type(layer)
        assert issubclass(layer_class, FactorizedConv2d)
        block = layer_class.block
        ranks = sorted({rank // block * block if rank > block else rank for rank in spaced(most)})
        made = {rank: layer_class.like(conv, rank).eval() for rank in ranks}
        for x in inputs[name]:  # one for each call
            over_dense, at_dense = _over_dense(conv, made, x, engine, known), seconds[_call(conv, x)]
            times = LayerTimes(at_dense, {rank: at_dense * over_dense[rank] for rank in ranks}, block)
            layers[first.name] = layers[first.name] + times if first.name in layers else times
    measured = layer_type(layer)
    return Times(seconds[WHOLE], layers, measured if issubclass(measured, FactorizedConv2d) else None)


def _call(conv: nn.Module, x: Tensor) -> str:
    return f"{conv!r} on {tuple(x.shape)}"


def cache_file() -> Path:
    """Where times are kept: `$DECEF_CACHE/times.json`, else `~/.cache/decef/times.json`."""
    folder = os.environ.get("DECEF_CACHE") or Path.home() / ".cache" / "decef"
    return Path(folder) / "times.json"


def _over_dense(
    conv: nn.Conv2d, made: Mapping[int, FactorizedConv2d], x: Tensor, engine: str, known: _Cache
) -> dict[int, float]:
    """By rank, the time of a layer's fastest form over that of the dense layer."""
    forms = {rank: {f: m for f, m in forms_of(one).items() if f != "reconstructed"} for rank, one in made.items()}
    names = {rank: f"{one!r} as {', '.join(forms[rank])} on {tuple(x.shape)}" for rank, one in made.items()}
    missing = {
        (rank, form): Loadable(module, x)
        for rank, there in forms.items()
        if names[rank] not in known
        for form, module in there.items()
    }
    if missing:
        networks: dict[Any, Loadable] = {DENSE: Loadable(nn.Sequential(conv), x), **missing}
        loaded = zip(networks, load_all(engine, list(networks.values())), strict=True)
        seconds = interleaved_times({key: inference_call(run, x) for key, run in loaded}, ROUNDS, min)
        best = {rank: min(seconds[r, form] for r, form in missing if r == rank) for rank, _ in missing}
        known.add({names[rank]: value / seconds[DENSE] for rank, value in best.items()})
    return {rank: known[name] for rank, name in names.items()}


class _Cache(dict[str, float]):
    """Times over the dense layer's, by layer and input, in a file that several processes may share."""

    def __init__(self, path: Path, where: str) -> None:
        super().__init__()
        self._path, self._where = path, where
        self.update(self._stored().get(where, {}))

    def add(self, found: Mapping[str, float]) -> None:
        self.update(found)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                stored = self._stored()
                stored.setdefault(self._where, {}).update(found)
                write_json(self._path, stored)
        except OSError as error:
            log.warning("times are not kept for later: %s can't be written (%s)", self._path, error)

    def _stored(self) -> dict[str, dict[str, float]]:
        try:
            return dict(json.loads(self._path.read_text()))
        except (OSError, TypeError, ValueError):
            return {}


def _where(engine: str, x: Tensor) -> str:
    """Machine, engine and threads: what times over the dense layer's hold for."""
    package = "onnxruntime" if engine == "onnxruntime" else "torch"
    try:
        number = version(package)
    except PackageNotFoundError:
        number = "unknown"
    device = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads()
    return f"{device}, {threads} threads, {engine} ({package} {number}), {x.dtype}, over dense"
