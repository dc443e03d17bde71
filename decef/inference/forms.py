"""The forms in which a trained low-rank layer can run, each as plain convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from decef.conversion import check_factors
from decef.copies import copied, copied_with
from decef.inference.folding import fold_batch_norms
from decef.layers import FactorizedConv2d

FORMS = ("reconstructed", "factorized", "branches", "wide", "aligned")


def to_convolutions(model: nn.Module, form: str | Mapping[str, str] = "factorized") -> nn.Module:
    """A copy of `model` for export and inference: batch norms folded, factorised layers as plain convolutions.

    Args:
        model: any network.
        form: one of `FORMS` for all factorised layers, or one for some by name; see `forms_of`. A layer type that does
            not have the form runs "factorized" instead. Layers that are not named stay as they are.

    Raises:
        ValueError: an unknown form or layer.
    """
    model, layers = fold_batch_norms(copied(model).eval())
    forms = dict.fromkeys(layers, form) if isinstance(form, str) else form
    missing = set(forms) - set(layers)
    if missing:
        raise ValueError(f"the network has no low-rank layer {', '.join(map(repr, sorted(missing)))}")
    wrong = set(forms.values()) - set(FORMS)
    if wrong:
        raise ValueError(f"there is no form {', '.join(map(repr, wrong))}; there are {', '.join(FORMS)}")
    return arranged(model, layers, forms)


def forms_of(layer: FactorizedConv2d) -> dict[str, nn.Module]:
    """The layer as plain convolutions in every form that it has, by name."""
    forms = {"reconstructed": _dense(layer)}
    return forms | {name: _summed(layer, chains) for name, chains in layer.as_convolutions().items()}


def _dense(layer: FactorizedConv2d) -> nn.Module:
    return _summed(layer, [nn.Sequential(layer.to_conv2d())])


def _summed(layer: FactorizedConv2d, chains: Sequence[nn.Sequential]) -> nn.Module:
    """The sum of a layer's chains as one module, without wrappers that would only cost calls in torch."""
    if len(chains) == len(chains[0]) == 1:
        return chains[0][0].eval().requires_grad_(False)
    found = _Sum(chains) if len(chains) > 1 else _Chain(*chains[0])
    found._layer = (layer,)
    return found.eval().requires_grad_(False)


class _InPlaceOf(nn.Module):
    """Convolutions in place of a low-rank layer, for networks that ask it for more than its output.

    They have all that the layer has, from `kernel_size` on; `weight` is the composed kernel.
    """

    _layer: tuple[FactorizedConv2d, ...] = ()  # in a tuple, as it is no part of these convolutions
    _kernel: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        if self._kernel is not None:
            return self._kernel
        (layer,) = self._layer
        kernel = layer.compose().detach()
        if type(kernel) is Tensor:  # not one that only stands for values, in an export
            self._kernel = kernel
        return kernel

    @property
    def bias(self) -> Tensor | None:
        (layer,) = self._layer
        bias = layer.compose_bias()
        return None if bias is None else bias.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._kernel = None
        for layer in self._layer:  # to the same device and precision
            layer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self._layer:
                raise
            return getattr(self._layer[0], name)


class _Chain(_InPlaceOf, nn.Sequential):
    """Convolutions one after the other."""


class _Sum(_InPlaceOf):
    """The sum of several chains of convolutions."""

    def __init__(self, chains: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)

    def forward(self, input: Tensor) -> Tensor:
        y = self.chains[0](input)
        for chain in self.chains[1:]:
            y = y + chain(input)
        return y


def arranged(
    model: nn.Module,
    layers: Mapping[str, FactorizedConv2d],
    forms: Mapping[str, str],
) -> nn.Module:
    """A copy of the network with its `layers` in the requested `forms`."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, form in forms.items():
        layer = layers[name]
        check_factors(layer)
        if form == "reconstructed":
            replaced[layer] = _dense(layer)
        else:
            chains = layer.as_convolutions()
            replaced[layer] = _summed(layer, chains.get(form, chains["factorized"]))
    return copied_with(model, replaced).requires_grad_(False)
