"""Find the fastest network on this machine that computes the same as a trained one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from decef.files import replace_file
from decef.inference.engines import (
    Loadable,
    Runner,
    available,
    check_engine,
    check_equal,
    check_precision,
    load,
    load_all,
)
from decef.inference.folding import fold_batch_norms
from decef.inference.forms import arranged, forms_of
from decef.inference.timing import inference_call, interleaved_times
from decef.layers import FactorizedConv2d
from decef.progress import bar

log = logging.getLogger(__name__)

CLOSE = 1.15  # what takes up to this times as long as the fastest is timed again, for longer
HOPELESS = 1.3  # a form in which the layers, timed alone, take this times as long in all is not tried in the network
GAIN = 0.98  # a low-rank form is chosen if it takes at most this share of the dense one's time: less is noise
CHOICE = ("engine", "arrangement", "forms", "times", "precision")  # what Deployed.save keeps
K = TypeVar("K")


class Deployed(nn.Module):
    """The network that `deploy` returns; call it like the original.

    Attributes:
        engine: the engine that runs it.
        arrangement: how factorised layers run: all in one of `FORMS`, or "measured", each in the form in which it ran
            fastest when timed alone.
        forms: the form of every layer by name.
        precision: in which it computes.
        error: of its output for the example, over the norm of the original's.
        bytes: its size in a file of the engine.
        quantized: in ONNX Runtime, how many operators of each kind run in 8 bits, and how many there are.
        times: a dict for each candidate with `engine`, `arrangement` and `seconds`, the time of a call.
    """

    def __init__(
        self,
        network: Runner,
        engine: str,
        arrangement: str,
        forms: Mapping[str, str],
        times: list[dict[str, Any]],
        precision: str = "fp32",
        error: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.engine, self.arrangement, self.forms, self.times = engine, arrangement, dict(forms), times
        self.precision, self.error = precision, error
        self.bytes, self.quantized = network.bytes, network.quantized

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.network(x)

    def save(self, path: str | Path) -> None:
        """Write what was chosen as JSON, so that `load` need not measure again. The weights are not in it."""
        choice = {key: getattr(self, key) for key in CHOICE}
        replace_file(Path(path), (json.dumps(choice, indent=1) + "\n").encode())

    @classmethod
    @torch.no_grad()
    def load(
        cls, path: str | Path, model: nn.Module, example_input: Tensor, calibration: Sequence[Tensor] | None = None
    ) -> Deployed:
        """Make again, without measuring, what was chosen for a network of these layers.

        Args:
            path: a file of `save`.
            model, example_input, calibration: see `deploy`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or for another network, or its engine is not available here.
        """
        try:
            saved = json.loads(Path(path).read_text())
            choice = {key: saved[key] for key in CHOICE}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no file of Deployed.save: {error}") from error
        model = copy.deepcopy(model).eval()
        expected = model(example_input)
        layers = fold_batch_norms(model)
        if set(choice["forms"]) != set(layers):
            raise ValueError(f"{path} is for a network with other low-rank layers")
        check_engine(choice["engine"], example_input, choice["precision"])
        network = arranged(model, layers, choice["forms"])
        network = load(choice["engine"], network, example_input, choice["precision"], calibration)
        return cls(network, **choice, error=_error(network(example_input), expected))


def deploy(
    model: nn.Module,
    example_input: Tensor,
    *,
    engines: Sequence[str] | None = None,
    precision: str = "fp32",
    calibration: Sequence[Tensor] | None = None,
    progress: bool = False,
) -> Deployed:
    """The fastest of several networks that compute what `model` does in evaluation mode, by measurement.

    Batch norms are folded into the convolutions before them. Each factorised layer is then timed as one dense
    convolution and in the arrangements that it has (`FactorizedConv2d.as_convolutions`), on the input that it gets when
    the example runs through the network. Finally whole networks are timed: all layers dense, all in another form that
    was not far slower alone, and each in its fastest form. What is nearly as fast as the fastest is timed again, for
    longer, and nothing is taken that did not come out faster than dense by 2 %: the result is slower than the dense
    network only by what the measurement gets wrong.

    All of this is done in the precision asked for. In fp32 every candidate must give the original's output up to
    rounding. In fewer bits it can't: how far off the result is, is its `error`; what that means must be measured by
    accuracy. In int8, weights are quantised per channel and activations by their range on `calibration`.

    All of this is done for every engine, except that "compile" reuses the layer times of "eager" and only tries two
    networks: all layers dense, and each in its fastest form.

    Args:
        model: any network that takes one tensor and returns one; it does not change.
        example_input: `(B, C, H, W)` with the batch size, and on the device, to optimise for. Other shapes still run if
            the engine is torch.
        engines: some of `decef.inference.engines.ENGINES`; None means all that are available in this precision.
        precision: one of `decef.inference.engines.PRECISIONS`.
        calibration: for int8, inputs of the example's shape, such as a hundred training images; None is the example.
        progress: show progress bars.

    Raises:
        ValueError: the network does not return one tensor, an engine is unknown or not available, or no candidate gives
            the original's output up to rounding.
    """
    return Deployer(model, example_input, progress=progress).deploy(engines, precision, calibration)


class Deployer:
    """Deploys a network in several precisions, as `deploy` does in one: to ONNX it is exported once for all of them.

    Args:
        model, example_input, progress: see `deploy`.

    Raises:
        ValueError: the network does not return one tensor.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example_input: Tensor, *, progress: bool = False) -> None:
        self._x, self._progress = example_input, progress
        self._model = copy.deepcopy(model).eval()
        self._expected = self._model(example_input)
        if not isinstance(self._expected, Tensor):
            got = type(self._expected).__name__
            raise ValueError(f"the network must give one tensor to be deployed, not a {got}")
        self._layers = fold_batch_norms(self._model)
        self._alone = _LayersAlone(self._layers, layer_inputs(self._model, example_input, self._layers))
        self._networks: dict[tuple[tuple[str, str], ...], Loadable] = {}

    @torch.no_grad()
    def deploy(
        self,
        engines: Sequence[str] | None = None,
        precision: str = "fp32",
        calibration: Sequence[Tensor] | None = None,
    ) -> Deployed:
        """See `deploy`."""
        x = self._x
        if calibration is not None and precision != "int8":
            raise ValueError(f"calibration would do nothing in {precision}: it is for int8")
        if any(batch.shape != x.shape for batch in calibration or ()):
            raise ValueError(f"every input for calibration must have the example's shape, {tuple(x.shape)}")
        check_precision(precision)
        if engines is None:
            engines = available(x.device, precision)
        engines = [check_engine(engine, x, precision) for engine in engines]
        alone: dict[str, _Alone] = {}
        errors: dict[tuple[str, str], float] = {}
        networks: dict[tuple[str, str], Runner] = {}
        chosen: dict[tuple[str, str], Mapping[str, str]] = {}
        for engine in engines:
            by = "eager" if engine == "compile" else engine  # compiling every layer in every form would take minutes
            try:
                alone[by] = alone.get(by) or self._alone.time(by, precision, self._progress)
                candidates = _candidates(engine, self._layers, alone[by])
                for name, forms in bar(list(candidates.items()), f"{engine}: networks", self._progress):
                    (network,) = load_all(engine, [self._arranged(forms)], precision, calibration)
                    output = network(x)
                    if precision == "fp32":
                        check_equal(output, self._expected)
                    errors[engine, name] = _error(output, self._expected)
                    networks[engine, name], chosen[engine, name] = network, forms
            except Exception as error:  # an engine may fail in any way, and is then left out
                log.warning("engine %s is left out: %s", engine, str(error).partition("\n")[0] or type(error).__name__)
        if not networks:
            raise ValueError(f"none of {', '.join(engines)} could run the network and give the same output")
        steps = {key: inference_call(network, x) for key, network in networks.items()}
        best, seconds = _fastest(steps, dense=[key for key in steps if key[1] == "reconstructed"])
        times = [{"engine": engine, "arrangement": name, "seconds": seconds[engine, name]} for engine, name in networks]
        return Deployed(networks[best], *best, chosen[best], times, precision, errors[best])

    def _arranged(self, forms: Mapping[str, str]) -> Loadable:
        key = tuple(forms.items())
        if key not in self._networks:
            self._networks[key] = Loadable(arranged(self._model, self._layers, forms), self._x)
        return self._networks[key]


def _error(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def layer_inputs(model: nn.Module, example: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Inputs of the named layers when the example runs through the network; layers that don't run are left out."""
    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.update({name: args[0]})

    hooks = [modules[name].register_forward_pre_hook(remember(name)) for name in names]
    model(example)
    for hook in hooks:
        hook.remove()
    return seen


def _candidates(engine: str, layers: Mapping[str, FactorizedConv2d], alone: _Alone) -> dict[str, Mapping[str, str]]:
    """The whole networks worth timing: for each by name, the form of every layer."""
    if not layers:
        return {"reconstructed": {}}
    fastest = min(alone.totals.values(), default=0.0)
    forms = [form for form, total in alone.totals.items() if total <= HOPELESS * fastest and engine != "compile"]
    found: dict[str, Mapping[str, str]] = {
        form: dict.fromkeys(layers, form) for form in dict.fromkeys(["reconstructed", *forms])
    }
    return found if alone.forms in found.values() else {"measured": alone.forms, **found}


@dataclass(frozen=True)
class _Alone:
    """Layers timed alone: the fastest form of each, and for every form the seconds of all layers in it."""

    forms: dict[str, str]
    totals: dict[str, float]


class _LayersAlone:
    """The layers of a network in each of their forms; equal layers with equal input shapes are one."""

    def __init__(self, layers: Mapping[str, FactorizedConv2d], seen: Mapping[str, Tensor]) -> None:
        first: dict[tuple[Any, ...], str] = {}
        self._names = list(layers)
        self._same: dict[str, str] = {}
        for name, layer in layers.items():
            if name in seen:
                self._same[name] = first.setdefault((repr(layer), seen[name].shape), name)
        self._variants = {
            (name, form): Loadable(module, seen[name])
            for name in first.values()
            for form, module in forms_of(layers[name]).items()
        }

    def time(self, engine: str, precision: str, progress: bool) -> _Alone:
        if not self._variants:
            return _Alone(dict.fromkeys(self._names, "reconstructed"), {})
        loaded = dict(zip(self._variants, load_all(engine, list(self._variants.values()), precision), strict=True))
        steps: dict[str, dict[str, Callable[[], object]]] = {}
        for (name, form), runner in loaded.items():
            steps.setdefault(name, {})[form] = inference_call(runner, self._variants[name, form].example)
        fastest: dict[str, str] = {}
        seconds: dict[str, dict[str, float]] = {}
        for name in bar(list(steps), f"{engine}: layers", progress):
            fastest[name], seconds[name] = _fastest(steps[name], dense=["reconstructed"])
        forms = dict.fromkeys(form for _, form in self._variants)
        totals = {
            form: sum(seconds[one].get(form, seconds[one]["factorized"]) for one in self._same.values())
            for form in forms
        }
        same = self._same
        return _Alone({name: fastest[same[name]] if name in same else "reconstructed" for name in self._names}, totals)


def _fastest(steps: Mapping[K, Callable[[], object]], dense: Sequence[K]) -> tuple[K, dict[K, float]]:
    """The fastest step, and the seconds of all. One of `dense` wins unless another is faster by more than noise."""
    seconds = interleaved_times(steps, rounds=3, reduce=min)
    close = {key: step for key, step in steps.items() if seconds[key] <= CLOSE * min(seconds.values())}
    if len(close) > 1:
        seconds |= interleaved_times(close, rounds=6, reduce=min)
    best = min(steps, key=lambda key: seconds[key])
    best_dense = min(dense, key=lambda key: seconds[key], default=best)
    return best if seconds[best] <= GAIN * seconds[best_dense] else best_dense, seconds
