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
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from decef.conversion import replace_modules
from decef.files import replace_file
from decef.inference.engines import Runner, available, check_engine, check_equal, check_precision, load, load_all
from decef.inference.timing import inference_call, interleaved_times
from decef.layers import FactorizedConv2d
from decef.progress import bar

log = logging.getLogger(__name__)

CLOSE = 1.15  # what takes up to this times as long as the fastest is timed again, for longer
HOPELESS = 1.5  # a form in which the layers, timed alone, take this times as long in all is not tried in the network
GAIN = 0.98  # a low-rank form is chosen if it takes at most this share of the dense one's time: less is noise
CHOICE = ("engine", "arrangement", "forms", "times", "precision")  # what Deployed.save keeps
FORMS = ("reconstructed", "factorized", "branches", "wide", "aligned")
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
        layers = _fold_batch_norms(model)
        if set(choice["forms"]) != set(layers):
            raise ValueError(f"{path} is for a network with other low-rank layers")
        check_engine(choice["engine"], example_input, choice["precision"])
        arranged = _arranged(model, layers, choice["forms"])
        network = load(choice["engine"], arranged, example_input, choice["precision"], calibration)
        return cls(network, **choice, error=_error(network(example_input), expected))


@torch.no_grad()
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
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration would do nothing in {precision}: it is for int8")
    if any(batch.shape != example_input.shape for batch in calibration or ()):
        raise ValueError(f"every input for calibration must have the example's shape, {tuple(example_input.shape)}")
    check_precision(precision)
    if engines is None:
        engines = available(example_input.device, precision)
    engines = [check_engine(engine, example_input, precision) for engine in engines]
    model = copy.deepcopy(model).eval()
    expected = model(example_input)
    if not isinstance(expected, Tensor):
        raise ValueError(f"the network must give one tensor to be deployed, not a {type(expected).__name__}")
    layers = _fold_batch_norms(model)
    seen = layer_inputs(model, example_input, layers)
    alone: dict[str, _Alone] = {}
    errors: dict[tuple[str, str], float] = {}
    networks: dict[tuple[str, str], Runner] = {}
    chosen: dict[tuple[str, str], Mapping[str, str]] = {}
    for engine in engines:
        by = "eager" if engine == "compile" else engine  # compiling every layer in every form would take minutes
        try:
            alone[by] = alone.get(by) or _time_alone(by, layers, seen, precision, progress)
            candidates = _candidates(engine, layers, alone[by])
            for name, forms in bar(list(candidates.items()), f"{engine}: networks", progress):
                network = load(engine, _arranged(model, layers, forms), example_input, precision, calibration)
                output = network(example_input)
                if precision == "fp32":
                    check_equal(output, expected)
                errors[engine, name] = _error(output, expected)
                networks[engine, name], chosen[engine, name] = network, forms
        except Exception as error:  # an engine may fail in any way, and is then left out
            log.warning("engine %s is left out: %s", engine, str(error).partition("\n")[0] or type(error).__name__)
    if not networks:
        raise ValueError(f"none of {', '.join(engines)} could run the network and give the same output")
    steps = {key: inference_call(network, example_input) for key, network in networks.items()}
    best, seconds = _fastest(steps, dense=[key for key in steps if key[1] == "reconstructed"])
    times = [{"engine": engine, "arrangement": name, "seconds": seconds[engine, name]} for engine, name in networks]
    return Deployed(networks[best], *best, chosen[best], times, precision, errors[best])


def _error(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


def to_convolutions(model: nn.Module, form: str | Mapping[str, str] = "factorized") -> nn.Module:
    """A copy of `model` for export and inference: batch norms folded, factorised layers as plain convolutions.

    Args:
        model: any network.
        form: one of `FORMS` for all factorised layers, or one for each by name; see `forms_of`. A layer type that does
            not have the form runs "factorized" instead.

    Raises:
        ValueError: an unknown form.
    """
    model = copy.deepcopy(model).eval()
    layers = _fold_batch_norms(model)
    forms = dict.fromkeys(layers, form) if isinstance(form, str) else form
    wrong = set(forms.values()) - set(FORMS)
    if wrong:
        raise ValueError(f"there is no form {', '.join(map(repr, wrong))}; there are {', '.join(FORMS)}")
    return _arranged(model, layers, forms)


def forms_of(layer: FactorizedConv2d) -> dict[str, nn.Module]:
    """The layer as plain convolutions in every form that it has, by name."""
    arrangements = {"reconstructed": [nn.Sequential(layer.to_conv2d())], **layer.as_convolutions()}
    return {name: _summed(chains) for name, chains in arrangements.items()}


def _summed(chains: Sequence[nn.Sequential]) -> nn.Module:
    """The sum of chains as one module, without wrappers that would only cost calls in torch."""
    if len(chains) > 1:
        return _Sum(chains)
    (chain,) = chains
    return (chain[0] if len(chain) == 1 else chain).eval().requires_grad_(False)


class _Sum(nn.Module):
    """The sum of several chains of convolutions, in evaluation mode."""

    def __init__(self, chains: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.chains[0](x)
        for chain in self.chains[1:]:
            y = y + chain(x)
        return y


def _fold_into(conv: nn.Conv2d | FactorizedConv2d, norm: nn.BatchNorm2d) -> None:
    """Fold the batch norm after `conv` into it; factors and weights that it shares stay as they are for the others."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    name = conv.scale_factor if isinstance(conv, FactorizedConv2d) else "weight"  # its first dimension is the output
    weight, conv.bias = fuse_conv_bn_weights(
        getattr(conv, name), conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    setattr(conv, name, weight)


def _fold_batch_norms(model: nn.Module) -> dict[str, FactorizedConv2d]:
    """Fold batch norms into the convolutions before them, in place; return the factorised layers by name."""
    modules = dict(model.named_modules())
    for name, norm_name in _convolutions_before_norms(model):
        conv, norm = modules[name], modules[norm_name]
        assert isinstance(conv, (nn.Conv2d, FactorizedConv2d))
        assert isinstance(norm, nn.BatchNorm2d)
        _fold_into(conv, norm)
        rest = nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]
        replace_modules(model, {id(norm): rest})
    return {name: module for name, module in modules.items() if isinstance(module, FactorizedConv2d)}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, FactorizedConv2d) or _is_batch_norm(m)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it is torch's batch norm or timm's, which goes on with dropout (`drop`) and an activation (`act`)."""
    timms = isinstance(module, nn.BatchNorm2d) and type(module).__name__ == "BatchNormAct2d"
    return timms or type(module) is nn.BatchNorm2d


def _convolutions_before_norms(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and batch norms, where one feeds only the other and both are called exactly once."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            reason = str(error).partition("\n")[0]
            log.warning("batch norms are not folded, so it will be slower: the network can't be traced: %s", reason)
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    count: dict[int, int] = {}
    for node in calls:
        count[id(modules[node.target])] = count.get(id(modules[node.target]), 0) + 1
    found = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = modules[before.target], modules[node.target]
        once = count[id(conv)] == count[id(norm)] == 1
        foldable = _is_batch_norm(norm) and norm.track_running_stats and _is_unhooked(conv) and _is_unhooked(norm)
        if once and foldable:
            found.append((str(before.target), str(node.target)))
    return found


def _is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module only runs the forward of a known class, without hooks, pruning or the like."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    known = isinstance(module, FactorizedConv2d) or type(module) is nn.Conv2d or _is_batch_norm(module)
    return known and not hooks


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


def _time_alone(
    engine: str,
    layers: Mapping[str, FactorizedConv2d],
    seen: Mapping[str, Tensor],
    precision: str,
    progress: bool,
) -> _Alone:
    """Time each layer in each of its forms; equal layers with equal input shapes are timed once."""
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for name, layer in layers.items():
        if name in seen:
            same[name] = first.setdefault((repr(layer), seen[name].shape), name)
    if not first:
        return _Alone(dict.fromkeys(layers, "reconstructed"), {})
    variants = {
        (name, form): (module, seen[name]) for name in first.values() for form, module in forms_of(layers[name]).items()
    }
    loaded = dict(zip(variants, load_all(engine, list(variants.values()), precision), strict=True))
    fastest: dict[str, str] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name in bar(list(first.values()), f"{engine}: layers", progress):
        steps = {form: inference_call(module, seen[name]) for (n, form), module in loaded.items() if n == name}
        fastest[name], seconds[name] = _fastest(steps, dense=["reconstructed"])
    forms = dict.fromkeys(form for _, form in variants)
    totals = {form: sum(seconds[one].get(form, seconds[one]["factorized"]) for one in same.values()) for form in forms}
    return _Alone({name: fastest[same[name]] if name in same else "reconstructed" for name in layers}, totals)


def _fastest(steps: Mapping[K, Callable[[], object]], dense: Sequence[K]) -> tuple[K, dict[K, float]]:
    """The fastest step, and the seconds of all. One of `dense` wins unless another is faster by more than noise."""
    seconds = interleaved_times(steps, rounds=3, reduce=min)
    close = {key: step for key, step in steps.items() if seconds[key] <= CLOSE * min(seconds.values())}
    if len(close) > 1:
        seconds |= interleaved_times(close, rounds=6, reduce=min)
    best = min(steps, key=lambda key: seconds[key])
    best_dense = min(dense, key=lambda key: seconds[key], default=best)
    return best if seconds[best] <= GAIN * seconds[best_dense] else best_dense, seconds


def _arranged(
    model: nn.Module,
    layers: Mapping[str, FactorizedConv2d],
    forms: Mapping[str, str],
) -> nn.Module:
    """A copy of the network with every factorised layer in the requested form."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    replaced: dict[int, nn.Module] = {}
    for name, form in forms.items():
        there = forms_of(layers[name])
        replaced[id(modules[name])] = there.get(form, there["factorized"])
    return replace_modules(model, replaced).requires_grad_(False)
