"""What all low-rank convolutions share: Conv2d's arguments, two ways to run, decomposition, conversion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn.utils.parametrize import is_parametrized

from decef.layers.choice import factorized_is_faster
from decef.layers.metric import conditioned, squared_norm_on
from decef.layers.padding import PaddingMode, Size, padded, pair, zero_pads
from decef.layers.parts import conv2d_of, more_components

IMPLEMENTATIONS = ("auto", "factorized", "reconstructed")


class FactorizedConv2d(nn.Module):
    """A convolution whose dense kernel is confined to a low-rank set.

    A subclass sets `rank_meaning` and `scale_factor`, and implements the methods that raise NotImplementedError here.
    Above all these are the shapes of its factors (`factor_shapes`), the dense kernel that the factors stand for
    (`compose`), the nearest factors of a dense kernel (`_factorize`), and the forward pass as a chain of small
    convolutions (`forward_factorized`).

    The arguments are those of `torch.nn.Conv2d` in the same order, then by keyword:

    Args:
        rank: size of the low-rank set, from 1 to `max_rank`; `rank_meaning` says what it counts.
        implementation: "factorized" runs the chain, "reconstructed" composes the kernel and convolves once, "auto"
            takes the faster of the two, measured once for a shape (see `prefers_factorized`). Both compute the same
            function of input and factors, but not to the last bit: name one if a run has to repeat bit for bit.

    Shape: input `(B, in_channels, H, W)` or `(in_channels, H, W)`, output as for `torch.nn.Conv2d`.

    Raises:
        ValueError: rank out of range, an unknown implementation, a kernel that the layer type cannot represent, or
            arguments that `torch.nn.Conv2d` refuses.
    """

    rank_meaning: ClassVar[str]
    #: Name of the factor that is scaled at initialisation, which gives the composed kernel its scale.
    scale_factor: ClassVar[str]
    #: Whether the layer has an equivalent dense kernel in training mode too.
    composes_in_training: ClassVar[bool] = True
    #: Inner channels, if they are as many as the rank, are computed in blocks of so many by engines; else 1.
    block: ClassVar[int] = 1
    #: Whether `spectrum` only bounds what a rank keeps.
    spectrum_is_bound: ClassVar[bool] = False
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        # A dense convolution without storage checks and normalises the arguments.
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(dense.kernel_size)
        self.stride, self.dilation = pair(dense.stride), pair(dense.dilation)
        self.padding = dense.padding
        self.padding_mode: PaddingMode = padding_mode

        shape = self.weight_shape
        self.max_rank = self.max_rank_for(*shape, groups=groups)
        if not is_rank(rank, self.max_rank):
            raise ValueError(
                f"rank={rank!r} is not possible for {type(self).__name__} with a kernel of shape {shape} and "
                f"groups={groups}: it counts {self.rank_meaning} and goes from 1 to {self.max_rank}"
            )
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        self.rank = int(rank)
        self.implementation = implementation

        self._register(bias, device, dtype)
        self.reset_parameters()

    def _register(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register the parameters, uninitialised."""
        for name, shape in self.factor_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        values = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)

    # What a layer type defines --------------------------------------------------------------------------------

    @classmethod
    def max_rank_for(cls, out_channels: int, in_per_group: int, kh: int, kw: int, *, groups: int = 1) -> int:
        """The largest allowed rank, at which every kernel `(out_channels, in_per_group, kh, kw)` can be represented.

        For DeCEF and BasisConv no smaller rank suffices. For CPAC and rank-1 it is a bound that follows from the shape.
        A smaller rank may suffice, but the smallest is not known in general.

        Raises:
            ValueError: the layer type does not represent such kernels, or never with fewer parameters.
        """
        raise NotImplementedError

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each factor."""
        raise NotImplementedError

    def compose(self) -> Tensor:
        """The dense kernel `(out_channels, in_channels // groups, kh, kw)`, differentiable in the factors."""
        raise NotImplementedError

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The forward pass as a chain of small convolutions, bias included.

        Args:
            x: input `(B, in_channels, H, W)`.
            padding: rows of zeros to add above and below, columns of zeros to add left and right.
        """
        raise NotImplementedError

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        """The layer as plain convolutions with copied, detached weights, in one or more arrangements.

        Returns:
            For every arrangement by name, a list of chains whose outputs add up. "factorized" is the chain of
            `forward_factorized`, for CPAC's 1x1 kernels without its two scalings. "branches", which not all types have,
            merges 1-D filters into 2-D ones (CPAC, rank-1) and makes one chain per rank, so that its inner channels are
            no more than the input's or the output's (DeCEF, rank-1). "wide" puts these side by side again, for one
            large 1x1 convolution and depthwise ones of one filter per channel. "aligned", for types whose inner
            channels are as many as their rank (BasisConv, CPAC), has zeros for more of them, up to a multiple of
            `block`. Which arrangement is faster depends on the engine and the precision.
        """
        raise NotImplementedError

    @classmethod
    def spectrum(cls, weight: Tensor, *, groups: int = 1, moments: Tensor | None = None) -> Tensor:
        """How much of the squared norm of a kernel, or of its output, each further rank adds.

        The sum of the first r values is what the nearest kernel of rank r keeps. For DeCEF and BasisConv this is exact
        (Eckart and Young), except that with moments DeCEF treats every input channel separately. For CPAC and rank-1 it
        is an upper bound: their best approximations are not nested and have no closed form. With moments it is an
        estimate of that bound, as they are taken for a Kronecker product.

        Args:
            weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
            groups: number of groups of the convolution.
            moments: second moments of its input patches, see `decompose_`; None is for the kernel's norm.

        Returns:
            `(max_rank,)` in float64, descending.
        """
        raise NotImplementedError

    def _factorize(self, weight: Tensor, warm_start: bool = False) -> dict[str, Tensor]:
        """Factors of the kernel nearest to `weight`, a float64 tensor of `weight_shape`; see `decompose_`."""
        raise NotImplementedError

    def _init_factors(self) -> None:
        """Draw the factors; the caller then scales the one that `scale_factor` names."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor:
        """`||compose()||^2` in the Frobenius norm, differentiable.

        Most subclasses compute it from the Gram matrices of their factors, without the kernel.
        """
        return self.compose().square().sum()

    # What all types share -------------------------------------------------------------------------------------

    def _filtered_then_mixed(
        self, filters: Tensor, mix: Tensor, shift: Tensor | None = None
    ) -> dict[str, list[nn.Sequential]]:
        """Arrangements of one convolution that has the kernel's size, stride and padding, and a 1x1 one after it.

        Args:
            filters: `(groups * rank, in_channels // groups, kh, kw)`.
            mix: `(out_channels, rank)`.
            shift: bias of the first, `(groups * rank,)`.
        """

        def chain(more: int) -> nn.Sequential:
            bias = None if shift is None else more_components(shift, self.groups, more)
            first = conv2d_of(more_components(filters, self.groups, more), bias, self.groups, **self._spatial())
            return nn.Sequential(first, conv2d_of(F.pad(mix, (0, more)), self.bias, self.groups))

        more = -self.rank % self.block
        return {"factorized": [chain(0)], **({"aligned": [chain(more)]} if more else {})}

    def _spatial(self, vertical: bool = True, horizontal: bool = True) -> dict[str, Any]:
        """Stride, padding, dilation and padding mode for a plain convolution over one or both directions."""

        def both(values: tuple[int, int], neutral: int) -> tuple[int, int]:
            return (values[0] if vertical else neutral, values[1] if horizontal else neutral)

        padding = self.padding if isinstance(self.padding, str) else both(pair(self.padding), 0)
        return {
            "stride": both(self.stride, 1),
            "padding": padding,
            "dilation": both(self.dilation, 1),
            "padding_mode": self.padding_mode,
        }

    @property
    def _pads(self) -> tuple[int, int, int, int]:
        """What is added on the left, right, top and bottom."""
        return zero_pads(self.padding, self.kernel_size, self.dilation)

    @property
    def _pad_first(self) -> bool:
        """Whether the input is padded before: a convolution of the chain can only pad with zeros, and evenly."""
        left, right, top, bottom = self._pads
        return self.padding_mode != "zeros" or left != right or top != bottom

    @property
    def _padding(self) -> tuple[int, int]:
        """Rows and columns of zeros that are left to the convolutions to add on each side."""
        left, _, top, _ = self._pads
        return (0, 0) if self._pad_first else (top, left)

    def _padded(self, x: Tensor) -> Tensor:
        """`x`, padded where the convolutions can't do it."""
        return padded(x, self._pads, self.padding_mode) if self._pad_first else x

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense kernel `(out_channels, in_channels // groups, kh, kw)`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def compose_bias(self) -> Tensor | None:
        """The bias `(out_channels,)` that goes with the kernel of `compose()`, or None."""
        return self.bias

    @property
    def weight(self) -> Tensor:
        """The composed kernel, for code that reads `conv.weight`. Composed anew at every read; do not write to it."""
        return self.compose()

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors by name, without the bias."""
        return {name: getattr(self, name) for name in self.factor_shapes()}

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Draw new factors, and the bias as `torch.nn.Conv2d` draws it.

        Args:
            std: root mean square of the composed kernel's weights. The default is `sqrt(2 / fan_in)` (He et al. 2015,
                eq. 10).

        Raises:
            ValueError: `std` is NaN or infinite.
        """
        if std is not None and not math.isfinite(std):
            raise ValueError(f"std={std} must be finite: do the weights that it is of have NaN or infinite values?")
        fan_in = math.prod(self.weight_shape[1:])
        if getattr(self, self.scale_factor).device.type != "meta":
            self._init_factors()
            with evaluating(self):
                squared = self.squared_norm().item()
                if not 0 < squared < math.inf:  # half precision overflows
                    squared = self.compose().double().square().sum().item()
            drawn = math.sqrt(squared / math.prod(self.weight_shape))
            getattr(self, self.scale_factor).mul_((math.sqrt(2 / fan_in) if std is None else std) / drawn)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, input: Tensor) -> Tensor:
        x = self._padded(input)
        if self.implementation == "factorized" or (self.implementation == "auto" and self.prefers_factorized(x)):
            return self.forward_factorized(x, self._padding)
        kernel, bias = self.compose(), self.compose_bias()
        return F.conv2d(x, kernel, bias, self.stride, self._padding, self.dilation, self.groups)

    def prefers_factorized(self, x: Tensor) -> bool:
        """Whether the chain is faster than composing the kernel and convolving once, for inputs like `x`.

        Both are timed on the first call for a layer's shape and an input's shape, dtype, layout and device, with the
        backward pass if gradients are needed. The answer is kept for the life of the process; after `MOST_SHAPES` input
        shapes that of the nearest in size is taken. Where timing is not possible (`torch.jit.trace`, compiling,
        `torch.func` transforms, devices other than CPU and CUDA), the one with fewer MACs is taken. `torch.fx` cannot
        trace the choice: say "factorized" or "reconstructed" for it. For `torch.jit.script`, which can't compile these
        layers, `fold` the network or trace it.
        """
        return factorized_is_faster(self, x)

    def _twin(self) -> Self:
        """A layer that computes the same with parameters of its own, and has no hooks: to be timed."""
        # Factors may be computed, which rules out copies: the twin gets parameters with their values.
        kind: Any = type(self).__base__ if is_parametrized(self) else type(self)
        twin: Self = object.__new__(kind)
        twin.__dict__ = dict(self.__dict__)
        for name in (*self.factors(), "bias"):
            twin.__dict__.pop(name, None)
        twin._parameters = {
            name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            for name, value in {**self.factors(), "bias": self.bias}.items()
        }
        return twin

    @torch.no_grad()
    def decompose_(self, weight: Tensor, *, warm_start: bool = False, moments: Tensor | None = None) -> float:
        """Set the factors to those of the low-rank kernel nearest to `weight`, and return the relative error.

        Computed in float64 and cast back. CPAC and rank-1 have no closed form: they iterate to a local optimum.

        Args:
            weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
            warm_start: the current factors are near. Iterations start from them and take only a few sweeps, and a
                factor that is frozen by design (BasisConv's basis) does not change. Not possible with `moments`.
            moments: second moments of the layer's input patches, `(groups, d, d)`, see `decef.moments`. With them,
                "nearest" refers to the layer's output instead of the kernel's weights. The error of the output is never
                larger than without them.

        Returns:
            `||weight - compose()|| / ||weight||` in the Frobenius norm, or with moments in their metric; 0 for a zero
            kernel.

        Raises:
            ValueError: `weight` or `moments` has the wrong shape or is not finite, `warm_start` comes with moments, or
                a factor is computed before each call, as by pruning.
        """
        if warm_start and moments is not None:
            raise ValueError("warm_start is not possible with moments: a fit to outputs starts anew")
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, this layer's kernel has {self.weight_shape}")
        weight = weight.detach().to(torch.float64)
        if not weight.isfinite().all():
            raise ValueError("weight has NaN or infinite values, which have no decomposition")
        self.check_settable()
        with without_autocast(weight.device):
            return self._decompose(weight, warm_start, moments)

    def check_settable(self) -> None:
        """Raise ValueError if a factor can't be set, because it is computed before each call, as by pruning."""
        computed = next((name for name in self.factors() if name not in self._parameters), None)
        if computed is not None:
            raise ValueError(
                f"its {computed} is computed before each call (pruning, weight norm), so it can't be set: make that "
                "permanent first, as torch.nn.utils.prune.remove does"
            )

    def _decompose(self, weight: Tensor, warm_start: bool, moments: Tensor | None) -> float:
        nearest = self._factorize(weight, warm_start)
        if moments is None:
            self._set_factors(nearest)
            return self._relative_error(weight, None)
        dim = math.prod(self.weight_shape[1:])
        needed = (self.groups, dim, dim)
        if tuple(moments.shape) != needed:
            raise ValueError(f"moments must have shape {needed}, not {tuple(moments.shape)}")
        metric = conditioned(moments.to(weight))
        found = []
        for factors in (*self._factorize_on(weight, metric, nearest), nearest):
            self._set_factors(factors)
            found.append((self._relative_error(weight, metric), factors))
        error, best = min(found, key=lambda pair: pair[0])
        self._set_factors(best)
        return error

    def _factorize_on(self, weight: Tensor, metric: Tensor, nearest: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Candidates for the nearest factors in a metric `(groups, d, d)`; `nearest` is what `_factorize` found."""
        raise ValueError(f"{type(self).__name__} can't be fitted to data, as it has no `_factorize_on`: leave data out")

    def _relative_error(self, weight: Tensor, metric: Tensor | None) -> float:
        with evaluating(self):
            off = weight - self.compose().to(weight)
        one, other = (squared_norm_on(w, metric, self.groups).item() for w in (off, weight))
        return math.sqrt(max(one, 0.0) / other) if other > 0 else 0.0

    def _set_factors(self, factors: dict[str, Tensor]) -> None:
        """Store what `_factorize` found, and set all else that the layer has but its bias: it may hold nothing yet."""
        for name, value in factors.items():
            getattr(self, name).copy_(value)

    @classmethod
    def like(
        cls, conv: nn.Conv2d, rank: int | None = None, *, device: torch.device | str | None = None, **kwargs: Any
    ) -> Self:
        """A freshly initialised layer with the arguments, dtype, mode and `requires_grad` of `conv`.

        `rank=None` means full rank, `device=None` that of `conv`; `kwargs` are further arguments of the class.

        Raises:
            ValueError: `conv` is no `torch.nn.Conv2d`, or of a subclass that computes something else; or see the class.
        """
        for method in ("forward", "_conv_forward"):
            if getattr(type(conv), method, None) is not getattr(nn.Conv2d, method):
                raise ValueError(f"{type(conv).__name__} is not a plain Conv2d: it computes something else")
        if rank is None:
            rank = cls.max_rank_for(*conv.weight.shape, groups=conv.groups)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else pair(conv.padding),
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device if device is None else device,
            conv.weight.dtype,
            rank=rank,
            **kwargs,
        )
        for name, parameter in layer.named_parameters():
            twin = conv.bias if name == "bias" else conv.weight
            assert twin is not None
            parameter.requires_grad_(parameter.requires_grad and twin.requires_grad)
        return layer.train(conv.training)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, rank: int | None = None, **kwargs: Any) -> Self:
        """The layer of this type nearest to `conv`; `rank=None` means full rank, where the two are equal.

        For other arguments and errors see `like` and `decompose_`.
        """
        layer = cls.like(conv, rank, device="meta", **kwargs).to_empty(device=conv.weight.device)
        layer.decompose_(conv.weight)
        if layer.bias is not None:
            assert conv.bias is not None
            with torch.no_grad():
                layer.bias.copy_(conv.bias)
        return layer

    @torch.no_grad()
    def to_conv2d(self) -> nn.Conv2d:
        """A `torch.nn.Conv2d` that computes the same in evaluation mode; its weight is trainable if any factor is."""
        with evaluating(self), without_autocast(self.factors()[self.scale_factor].device):
            weight, bias = self.compose(), self.compose_bias()
        conv = conv2d_of(weight, bias, self.groups, **self._spatial())
        conv.weight.requires_grad_(any(factor.requires_grad for factor in self.factors().values()))
        if conv.bias is not None:
            conv.bias.requires_grad_(conv.weight.requires_grad if self.bias is None else self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join([*parts, f"rank={self.rank}", f"implementation={self.implementation!r}"])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which kernels and factors are computed in their own precision, also where autocast is on."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Temporarily set `module` itself, but not its submodules, to evaluation mode."""
    training, module.training = module.training, False
    try:
        yield
    finally:
        module.training = training


def is_rank(rank: object, most: int) -> bool:
    """Whether `rank` is a whole number from 1 to `most`, numpy's included."""
    return isinstance(rank, Integral) and not isinstance(rank, bool) and 1 <= int(rank) <= most
