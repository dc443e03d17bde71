"""Find the fastest network on this machine that computes the same as a trained one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from decef.copies import copied
from decef.files import write_json
from decef.inference.engines import (
    Loadable,
    Runner,
    check_engine,
    check_equal,
    check_precision,
    load,
    load_all,
    need_engines,
)
from decef.inference.folding import fold_batch_norms
from decef.inference.forms import FORMS, arranged, forms_of
from decef.inference.quantize import calibration_inputs
from decef.inference.timing import inference_call, interleaved_times
from decef.inputs import inputs_seen
from decef.layers import FactorizedConv2d
from decef.progress import bar

log = logging.getLogger(__name__)

CLOSE = 1.15  # what takes up to this times as long as the fastest is timed again, for longer, and with it the dense one
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
        self.bytes = network.bytes
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is: what is deployed doesn't train."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.network(x)

    @property
    def choice(self) -> dict[str, Any]:
        """What was chosen, for `Deployer.apply` and `save`. The weights are not in it."""
        return {key: getattr(self, key) for key in CHOICE}

    def save(self, path: str | Path) -> None:
        """Write what was chosen as JSON, so that `load` need not measure again."""
        write_json(Path(path), self.choice)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        example_input: Tensor,
        calibration: Tensor | Iterable[object] | None = None,
    ) -> Deployed:
        """Make again, without measuring, what was chosen for a network of these layers.

        Args:
            path: a file of `save`.
            model, example_input: see `deploy`.
            calibration: for int8, the inputs given to `deploy`, which the file doesn't hold.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or for another network, its engine is not available here, or what is given
                for calibration doesn't fit.
        """
        try:
            saved = json.loads(Path(path).read_text())
            choice = {key: saved[key] for key in CHOICE}
            unknown = set(choice["forms"].values()) - set(FORMS)
            if unknown:
                raise ValueError(f"there is no form {', '.join(map(repr, unknown))}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no file of Deployed.save: {error}") from error
        try:
            return Deployer(model, example_input).apply(choice, calibration)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def deploy(
    model: nn.Module,
    example_input: Tensor,
    *,
    engines: Sequence[str] | None = None,
    precision: str = "fp32",
    calibration: Tensor | Iterable[object] | None = None,
    progress: bool = False,
) -> Deployed:
    """The fastest of several networks that compute what `model` does in evaluation mode, by measurement.

    Batch norms are folded into the convolutions before them. Each factorised layer is then timed as one dense
    convolution and in the arrangements that it has (`FactorizedConv2d.as_convolutions`), on the input that it gets when
    the example runs through the network. Finally whole networks are timed: all layers dense, all in another form that
    was not far slower alone, and each in its fastest form. What is nearly as fast as the fastest is timed again beside
    the dense network, for longer, and nothing is taken that did not come out faster than that by 2 %: the result is
    slower than the dense network only by what the measurement gets wrong.

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
        calibration: for int8, a hundred training images or so, as one tensor or in batches as a DataLoader yields them.
            They run in batches of the example's size, without what is left over. None is the example alone.
        progress: show progress bars.

    Returns:
        What is called like the original. Its outputs are of `torch.inference_mode`: to train on them, as with a
        teacher's, clone them first.

    Raises:
        ValueError: the network does not return one tensor or is on another device than the example, an engine is
            unknown or not available, or no candidate gives the original's output up to rounding.
    """
    engines, inputs = _checked(example_input, engines, precision, calibration)  # before anything takes time
    if precision == "int8" and inputs is None:
        log.warning("8 bits are calibrated on the example alone: give calibration= a hundred training images")
    return Deployer(model, example_input, progress=progress).deploy(engines, precision, inputs)


class Deployer:
    """Deploys a network in several precisions, as `deploy` does in one: to ONNX it is exported once for all of them.

    Args:
        model, example_input, progress: see `deploy`.

    Raises:
        ValueError: the network does not return one tensor, or is on another device than the example.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example_input: Tensor, *, progress: bool = False) -> None:
        if (there := next(model.parameters(), example_input).device) != example_input.device:
            raise ValueError(f"the network is on {there}, example_input on {example_input.device}: move one of them")
        self._x, self._progress = example_input.clone(), progress  # a network may change its input in place
        self._model = copied(model).eval()
        self._expected = self._model(self._x.clone())
        if not isinstance(self._expected, Tensor):
            got = type(self._expected).__name__
            raise ValueError(f"the network must give one tensor to be deployed, not a {got}")
        self._model, self._layers = fold_batch_norms(self._model)
        self._networks: dict[tuple[tuple[str, str], ...], Loadable] = {}

    @torch.no_grad()
    def deploy(
        self,
        engines: Sequence[str] | None = None,
        precision: str = "fp32",
        calibration: Tensor | Iterable[object] | None = None,
    ) -> Deployed:
        """See `deploy`."""
        x, timer = self._x, self._timer
        engines, inputs = _checked(x, engines, precision, calibration)
        alone: dict[str, _FormTimes] = {}
        errors: dict[tuple[str, str], float] = {}
        networks: dict[tuple[str, str], Runner] = {}
        chosen: dict[tuple[str, str], Mapping[str, str]] = {}
        for engine in engines:
            by = "eager" if engine == "compile" else engine  # compiling every layer in every form would take minutes
            try:
                alone[by] = alone.get(by) or timer.time(by, precision, self._progress)
            except Exception as error:  # an engine may fail in any way
                _left_out(engine, error)
                continue
            candidates = timer.candidates(alone[by], uniform=engine != "compile")
            for name, forms in bar(list(candidates.items()), f"{engine}: networks", self._progress):
                try:
                    network = load(engine, self._arranged(forms), precision, inputs)
                    output = inference_call(network, x.clone())()
                    if precision == "fp32":
                        check_equal(output, self._expected)
                except Exception as error:
                    _left_out(f"{engine} ({name})", error)
                    continue
                errors[engine, name] = relative_error(output, self._expected)
                networks[engine, name], chosen[engine, name] = network, forms
        if not networks:
            raise ValueError(f"none of {', '.join(engines)} could run the network and give the same output")
        steps = {key: inference_call(network, x.clone()) for key, network in networks.items()}
        best, seconds = _fastest(steps, dense=[key for key in steps if key[1] == "reconstructed"])
        times = [{"engine": engine, "arrangement": name, "seconds": seconds[engine, name]} for engine, name in networks]
        return Deployed(networks[best], *best, chosen[best], times, precision, errors[best])

    @torch.no_grad()
    def apply(self, choice: Mapping[str, Any], calibration: Tensor | Iterable[object] | None = None) -> Deployed:
        """Deploy, without measuring, as was chosen for a network of the same layers.

        Args:
            choice: `Deployed.choice`.
            calibration: see `deploy`; for int8 it has to be given, as it is not in the choice.

        Raises:
            ValueError: the choice is for other low-rank layers, its engine is not available, or what is given for
                calibration doesn't fit.
        """
        if choice["precision"] == "int8" and calibration is None:
            raise ValueError("int8 needs the inputs that it was calibrated on again: give calibration=")
        if set(choice["forms"]) != set(self._layers):
            raise ValueError("this was chosen for a network with other low-rank layers")
        (engine,), inputs = _checked(self._x, [choice["engine"]], choice["precision"], calibration)
        network = load(engine, self._arranged(choice["forms"]), choice["precision"], inputs)
        error = relative_error(inference_call(network, self._x.clone())(), self._expected)
        return Deployed(network, **choice, error=error)

    def as_chains(self, engine: str) -> Deployed:
        """Deploy in fp32, without measuring, with every low-rank layer as its chain.

        Raises:
            ValueError: the engine is not available.
        """
        form = "factorized"
        forms = dict.fromkeys(self._layers, form)
        return self.apply({"engine": engine, "arrangement": form, "forms": forms, "times": [], "precision": "fp32"})

    @cached_property
    def _timer(self) -> _FormTimer:
        """Made when it is needed: what was chosen before is deployed without."""
        inputs = layer_inputs(self._model, self._x, self._layers)
        return _FormTimer(self._layers, {name: max(xs, key=Tensor.numel) for name, xs in inputs.items()})

    def _arranged(self, forms: Mapping[str, str]) -> Loadable:
        key = tuple(forms.items())
        if key not in self._networks:
            self._networks[key] = Loadable(arranged(self._model, self._layers, forms), self._x)
        return self._networks[key]


def _checked(
    x: Tensor, engines: Sequence[str] | None, precision: str, calibration: Tensor | Iterable[object] | None
) -> tuple[list[str], list[Tensor] | None]:
    """The engines to try, and what to calibrate on, in inputs of the example's shape.

    Raises:
        ValueError: an argument of `deploy` can't be used.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"example_input must be a tensor, such as images[:1], not {type(x).__name__}")
    check_precision(precision)
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration would do nothing in {precision}: it is for int8")
    if engines is None:
        engines = need_engines(x.device, precision)
    elif isinstance(engines, str):
        raise ValueError(f"engines={engines!r} must be a list: give [{engines!r}]")
    elif not engines:
        raise ValueError("engines=[] leaves none to run the network: leave it out for all that are available")
    engines = [check_engine(engine, x, precision) for engine in engines]
    if calibration is None:
        return engines, None
    return engines, calibration_inputs(calibration, x)


def _left_out(what: str, error: Exception) -> None:
    log.warning("engine %s is left out: %s", what, str(error).partition("\n")[0] or type(error).__name__)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The norm of what an output is off by, over that of the one expected; infinities count only where they differ."""
    same, dtype = output == expected, torch.promote_types(expected.dtype, torch.float32)
    off = (output.to(dtype) - expected.to(dtype)).masked_fill(same, 0).norm()
    return (off / expected.to(dtype).masked_fill(expected.isinf(), 0).norm()).item() if off else 0.0


def layer_inputs(model: nn.Module, example: Tensor, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """The named layers' inputs at each call as the example runs through the network, without layers that don't run."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {}
    with inputs_seen({name: modules[name] for name in names}, lambda name, x: seen.setdefault(name, []).append(x)):
        model(example.clone())  # which a network may change in place
    return seen


@dataclass(frozen=True)
class _FormTimes:
    """Of layers timed alone: the fastest form of each, and for every form the seconds of all layers in it."""

    fastest: dict[str, str]
    totals: dict[str, float]


class _FormTimer:
    """Times the layers of a network in each of their forms; equal layers with equal input shapes are one."""

    def __init__(self, layers: Mapping[str, FactorizedConv2d], seen: Mapping[str, Tensor]) -> None:
        first: dict[tuple[Any, ...], str] = {}
        self._names = list(layers)
        self._same: dict[str, str] = {}  # layers that don't run are not in it
        for name, layer in layers.items():
            if name in seen:
                self._same[name] = first.setdefault((repr(layer), seen[name].shape), name)
        self._variants = {
            (name, form): Loadable(module, seen[name])
            for name in first.values()
            for form, module in forms_of(layers[name]).items()
        }

    def time(self, engine: str, precision: str, progress: bool) -> _FormTimes:
        if not self._variants:
            return _FormTimes(self._all_in("reconstructed"), {})
        loaded = dict(zip(self._variants, load_all(engine, list(self._variants.values()), precision), strict=True))
        steps: dict[str, dict[str, Callable[[], object]]] = {}
        for (name, form), runner in loaded.items():
            steps.setdefault(name, {})[form] = inference_call(runner, self._variants[name, form].example)
        fastest: dict[str, str] = {}
        seconds: dict[tuple[str, str], float] = {}
        for name in bar(list(steps), f"{engine}: layers", progress):
            fastest[name], found = _fastest(steps[name], dense=["reconstructed"])
            seconds |= {(name, form): value for form, value in found.items()}
        totals: dict[str, float] = {}
        for form in dict.fromkeys(form for _, form in self._variants):
            everywhere = self._all_in(form)
            totals[form] = sum(seconds[one, everywhere[name]] for name, one in self._same.items())
        chosen = {name: fastest[one] for name, one in self._same.items()}
        return _FormTimes(self._all_in("reconstructed") | chosen, totals)

    def candidates(self, times: _FormTimes, *, uniform: bool) -> dict[str, Mapping[str, str]]:
        """The whole networks worth timing: for each by name, the form of every layer.

        Args:
            times: of the layers alone.
            uniform: those with all layers in one form among them, and not only the dense one.
        """
        least = min(times.totals.values(), default=0.0)
        forms = [form for form, total in times.totals.items() if total <= HOPELESS * least and uniform]
        found: dict[str, Mapping[str, str]] = {}
        for form in dict.fromkeys(["reconstructed", *forms]):
            everywhere = self._all_in(form)
            if everywhere not in found.values():
                found[form] = everywhere
        return found if times.fastest in found.values() else {"measured": times.fastest, **found}

    def _all_in(self, form: str) -> dict[str, str]:
        """All layers in one form, those that lack it as their chains; what doesn't run is dense."""
        there = {name: form if (one, form) in self._variants else "factorized" for name, one in self._same.items()}
        return {name: there.get(name, "reconstructed") for name in self._names}


def _fastest(steps: Mapping[K, Callable[[], object]], dense: Sequence[K]) -> tuple[K, dict[K, float]]:
    """The fastest step, and the seconds of all. One of `dense` wins unless another is faster by more than noise."""
    seconds = interleaved_times(steps, rounds=3, reduce=min)
    best = min(steps, key=lambda key: seconds[key])
    best_dense = min(dense, key=lambda key: seconds[key], default=best)
    close = {key: step for key, step in steps.items() if key == best_dense or seconds[key] <= CLOSE * seconds[best]}
    if len(close) > 1:  # only these have times of one moment
        again = interleaved_times(close, rounds=6, reduce=min)
        best = min(close, key=lambda key: again[key])
        best_dense = min((key for key in dense if key in close), key=lambda key: again[key], default=best)
        seconds |= again
    return best if seconds[best] <= GAIN * seconds[best_dense] else best_dense, seconds
