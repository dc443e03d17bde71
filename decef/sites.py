"""The convolutions of a network as a plan sees them: what they are, what they cost, what they may become."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from decef.copies import noted
from decef.costs import check_plain, input_shapes, layer_macs, module_flops, shared_weights
from decef.layers import FactorizedConv2d
from decef.ranks import Candidate, Totals

NAMED = 8  # convolutions that a message names


@dataclass
class Site:
    """One convolution of the network, and what planning finds out about it.

    Costs exclude the bias. MACs are for one input of the network. Convolutions that share a weight are several sites
    but one `Candidate`; the parameters that they share count for the first of them.

    Attributes:
        name: name of the convolution in the network.
        module: the convolution, or a layer that is already factorised.
        sharing: names of all modules with this weight, itself included, in the network's order.
        inputs: shape of its input at each call, with the batch dimension; None if no input size was given.
        macs: MACs before conversion; None if no input size was given or the convolution does not run.
        reason: why it is kept; empty if it can be converted.
        rank: the rank to convert it at; None if it is kept or the rank is not chosen yet.
        unit: the layer that it would become, at rank 1 on the meta device; None if it is kept whatever the ranks.
        macs_per_rank: MACs of `unit`; 0 if they are not known.
    """

    name: str
    module: nn.Conv2d | FactorizedConv2d
    sharing: Sequence[str]
    inputs: Sequence[tuple[int, ...]] | None
    macs: int | None
    reason: str = ""
    rank: int | None = None
    unit: FactorizedConv2d | None = None
    macs_per_rank: int = 0

    @property
    def first(self) -> str:
        """Name of the first module with this weight."""
        return self.sharing[0]

    @property
    def params(self) -> int:
        """Parameters before conversion; 0 if an earlier module has the same weight."""
        if self.first != self.name:
            return 0
        if isinstance(self.module, FactorizedConv2d):
            return count_parameters(self.module)
        # Not `weight.numel()`: to ask for a weight with spectral norm is a step of its power iteration.
        conv = self.module
        return conv.out_channels * (conv.in_channels // conv.groups) * math.prod(conv.kernel_size)

    @property
    def params_per_rank(self) -> int:
        """Parameters of `unit`, without the factors if it shares them with an earlier layer."""
        return 0 if self.unit is None else count_parameters(self.unit, factors=self.first == self.name)


def find_sites(model: nn.Module, input_size: Sequence[int] | None) -> tuple[list[Site], Totals]:
    """All convolutions of a network, in the order of its modules, and what the whole network costs.

    Raises:
        ValueError: the network does not run on an input of this size; or see `check_convertible`.
    """
    check_convertible(model)
    shapes = None if input_size is None else input_shapes(model, input_size)
    flops = {} if input_size is None else module_flops(model, input_size)
    sharing = shared_weights(model)
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, FactorizedConv2d)):
            inputs = None if shapes is None else shapes.get(name, [])
            macs = flops[name] // 2 if inputs else None
            sites.append(Site(name, module, sharing.get(name, [name]), inputs, macs))
    return sites, Totals(sum(p.numel() for p in model.parameters()), sum(flops.values()) // 2)


def check_convertible(model: nn.Module) -> None:
    """Raise ValueError for a network whose convolutions can't be decomposed where they are; see also `check_plain`."""
    check_plain(model)
    if any(tensor.device.type == "mps" for tensor in model.parameters()):
        raise ValueError(
            "the network is on MPS, which has no float64, and kernels are decomposed in that: move it to the CPU "
            "(model.cpu()), and what comes of it back"
        )


def note_kept(
    sites: Sequence[Site],
    layer_class: type[nn.Module],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    min_kernel_size: int,
) -> None:
    """Set the `reason` of every site that is kept whatever the ranks. For the arguments see `decef.plan`.

    Raises:
        ValueError: a pattern that matches no convolution.
    """
    check_patterns(sites, [*(include or ()), *exclude])
    for site in sites:
        site.reason = _reason_to_keep(site, layer_class, include, exclude, min_kernel_size)
    # Convolutions that share a weight can share factors only if all of them are converted and have the same groups.
    groups = {site.name: site.module.groups for site in sites if not site.reason}
    for site in sites:
        different = [name for name in site.sharing if groups.get(name) != site.module.groups]
        if different and not site.reason:
            site.reason = f"shares its weight with '{different[-1]}', which is kept"


def listed(patterns: str | Iterable[str] | None) -> list[str] | None:
    """One pattern or several, as a list."""
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


def check_patterns(sites: Sequence[Site], patterns: Iterable[str]) -> None:
    """Raise ValueError for a pattern that matches no convolution."""
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            there = ", ".join([site.name for site in sites[:NAMED]] + ["..."] * (len(sites) > NAMED)) or "none"
            raise ValueError(f"the pattern '{pattern}' matches no convolution of the network; there are: {there}")


def _reason_to_keep(
    site: Site,
    layer_class: type[nn.Module],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    min_kernel_size: int,
) -> str:
    """Why a convolution is kept, regardless of those that share its weight; empty if it can be converted."""
    module = site.module
    if not issubclass(layer_class, FactorizedConv2d):
        return "conv2d keeps every convolution"
    if include is not None and not any(fnmatchcase(site.name, pattern) for pattern in include):
        return "not included"
    excluding = next((pattern for pattern in exclude if fnmatchcase(site.name, pattern)), None)
    if excluding is not None:
        return f"excluded by '{excluding}'"
    if max(module.kernel_size) < min_kernel_size:
        return f"kernel smaller than {min_kernel_size}"
    if reason := reason_against(module, layer_class):
        return reason
    return "is not called in evaluation mode" if site.inputs is not None and not site.inputs else ""


def reason_against(module: nn.Module, layer_class: type[FactorizedConv2d]) -> str:
    """Why a module can't become a layer of this type at any rank; empty if it can."""
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not a plain Conv2d"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed before each call (pruning, weight norm), not a parameter"
    if replaced_forward(module):
        return "its forward was replaced, so it computes something else"
    if more := {**module._parameters, **module._buffers, **module._modules}.keys() - {"weight", "bias"}:
        return f"it has more than a weight and a bias: {', '.join(sorted(more))}"
    try:
        layer_class.max_rank_for(*module.weight.shape, groups=module.groups)
    except ValueError as error:
        return str(error)
    if module.weight.is_complex():
        return "its weight is not of real numbers"
    if names := noted(module):
        own = set(dir(layer_class.like(module, 1, device="meta")))
        if taken := own.intersection(names):
            return f"it was given an attribute '{min(taken)}', and {layer_class.__name__} has one of that name"
    return ""


def replaced_forward(module: nn.Module) -> bool:
    """Whether this module, unlike others of its class, computes something else."""
    return not {"forward", "_conv_forward"}.isdisjoint(vars(module))


def add_units(sites: Sequence[Site], layer_class: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Set the `unit` and `macs_per_rank` of every site.

    Raises:
        ValueError: the layer type refuses the value of an option.
        TypeError: the layer type does not have an option.
    """
    # A layer's repr shows everything that its MACs depend on, so layers with the same repr are measured once.
    measured: dict[tuple[str, tuple[int, ...]], int] = {}
    for site in sites:
        assert isinstance(site.module, nn.Conv2d)
        assert issubclass(layer_class, FactorizedConv2d)
        site.unit = layer_class.like(site.module, 1, device="meta", **options)
        for shape in site.inputs or ():
            key = repr(site.unit), shape
            if key not in measured:
                measured[key] = layer_macs(site.unit, shape)
            site.macs_per_rank += measured[key]


def candidates_of(sites: Sequence[Site], moments: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates that a rule chooses ranks for: one for every weight of the sites.

    Args:
        sites: in the network's order, each with its `unit`.
        moments: from `decef.moments.input_moments`, for some or all of them by name.

    Raises:
        ValueError: a weight has NaN or infinite values, or moments are of another kernel.
    """
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.first, []).append(site)
    candidates = []
    for name, own in owners.items():
        conv, unit = own[0].module, own[0].unit
        assert unit is not None
        if not conv.weight.is_meta and not conv.weight.isfinite().all():
            raise ValueError(f"layer '{name}': its weight has NaN or infinite values")
        size = math.prod(conv.weight.shape[1:])
        if name in moments and moments[name].shape != (conv.groups, size, size):
            raise ValueError(
                f"layer '{name}': moments of shape {tuple(moments[name].shape)} are of another network, for here they "
                f"have {(conv.groups, size, size)}"
            )
        candidates.append(
            Candidate(
                name,
                layer=type(unit),
                weight=conv.weight.detach(),
                groups=conv.groups,
                max_rank=unit.max_rank,
                params=sum(site.params for site in own),
                params_per_rank=sum(site.params_per_rank for site in own),
                macs=sum(site.macs or 0 for site in own),
                macs_per_rank=sum(site.macs_per_rank for site in own),
                moments=moments.get(name),
            )
        )
    return candidates


def count_parameters(layer: FactorizedConv2d, *, factors: bool = True) -> int:
    """Number of parameters of a factorised layer without its bias; with `factors=False` also without its factors."""
    left_out = {"bias", *(() if factors else layer.factors())}
    return sum(p.numel() for name, p in layer.named_parameters() if name not in left_out)
