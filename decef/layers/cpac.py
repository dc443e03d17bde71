"""CPAC-Conv: the kernel as a CP decomposition.

Wang, Guo, Yue: "CPAC-Conv: CP-decomposition to approximately compress convolutional layers in deep learning",
arXiv 2005.13746 (2020).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decef.layers.cp import PENALTY, cp_als, group_scales, most_kept, whitened
from decef.layers.factorized import FactorizedConv2d
from decef.layers.metric import conditioned, fit
from decef.layers.parts import BLOCK, conv2d_of, more_components


class CPACConv2d(FactorizedConv2d):
    """The kernel as a sum of `rank` outer products of four vectors.

        W[n, c, i, j] = sum_{r <= rank} filters[n, r] channels[r, c] vertical[r, i] horizontal[r, j]

    The paper calls the vectors K^N, K^S, K^X and K^Y. With groups, each group has its own components. The layer runs as
    1x1, depthwise kh x 1, depthwise 1 x kw and 1x1 convolutions, the last of which has the bias. For arguments and
    errors see `FactorizedConv2d`.

    Factors:
        filters: `(out_channels, rank)`
        channels: `(groups * rank, in_channels // groups)`
        vertical: `(groups * rank, kh)`
        horizontal: `(groups * rank, kw)`
    """

    rank_meaning = "CP components (per group)"
    spectrum_is_bound = True
    scale_factor = "filters"
    block = BLOCK

    filters: nn.Parameter
    channels: nn.Parameter
    vertical: nn.Parameter
    horizontal: nn.Parameter

    @classmethod
    def max_rank_for(cls, out_channels: int, in_per_group: int, kh: int, kw: int, *, groups: int = 1) -> int:
        shape = (out_channels // groups, in_per_group, kh, kw)
        return math.prod(shape) // max(shape)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        out, per_group, kh, kw = self.weight_shape
        components = self.groups * self.rank
        return {
            "filters": (out, self.rank),
            "channels": (components, per_group),
            "vertical": (components, kh),
            "horizontal": (components, kw),
        }

    def compose(self) -> Tensor:
        g, shape = self.groups, self.weight_shape
        parts = self.channels.unsqueeze(2) * self.vertical.unsqueeze(1)  # (g rank, in/g, kh)
        parts = parts.unsqueeze(3) * self.horizontal[:, None, None, :]  # (g rank, in/g, kh, kw)
        weight = self.filters.reshape(g, shape[0] // g, self.rank) @ parts.reshape(g, self.rank, -1)
        return weight.reshape(shape)

    def squared_norm(self) -> Tensor:
        filters = self.filters.reshape(self.groups, -1, self.rank)
        gram = filters.mT @ filters  # (groups, rank, rank), and so are all
        for factor in (self.channels, self.vertical, self.horizontal):
            rows = factor.reshape(self.groups, self.rank, -1)
            gram = gram * (rows @ rows.mT)
        return gram.sum()

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        components = self.groups * self.rank
        (sh, sw), (dh, dw) = self.stride, self.dilation
        x = F.conv2d(x, self.channels[:, :, None, None], groups=self.groups)
        vertical, horizontal = self.vertical[:, None, :, None], self.horizontal[:, None, None, :]
        x = F.conv2d(x, vertical, None, (sh, 1), (padding[0], 0), (dh, 1), groups=components)
        x = F.conv2d(x, horizontal, None, (1, sw), (0, padding[1]), (1, dw), groups=components)
        return F.conv2d(x, self.filters[:, :, None, None], self.bias, groups=self.groups)

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        if self.kernel_size == (1, 1):  # the spatial vectors are scalars
            scaled = self.channels * self.vertical * self.horizontal
            return self._filtered_then_mixed(scaled[:, :, None, None], self.filters)
        vertical, horizontal = self.vertical[:, None, :, None], self.horizontal[:, None, None, :]
        one_d = [
            conv2d_of(vertical, groups=len(vertical), **self._spatial(horizontal=False)),
            conv2d_of(horizontal, groups=len(horizontal), **self._spatial(vertical=False)),
        ]

        def chain(spatial: list[nn.Conv2d], more: int = 0) -> nn.Sequential:
            first = conv2d_of(more_components(self.channels, self.groups, more), groups=self.groups)
            last = conv2d_of(F.pad(self.filters, (0, more)), self.bias, self.groups)
            return nn.Sequential(first, *spatial, last)

        def two_d(more: int) -> nn.Sequential:
            filters = more_components(vertical * horizontal, self.groups, more)
            return chain([conv2d_of(filters, groups=len(filters), **self._spatial())], more)

        found = {"factorized": [chain(one_d)], "branches": [two_d(0)]}
        return found | {"aligned": [two_d(-self.rank % self.block)]}

    @classmethod
    def spectrum(cls, weight: Tensor, *, groups: int = 1, moments: Tensor | None = None) -> Tensor:
        # (out kh) x (in kw) has the most singular values, but for layers that widen or narrow much.
        out, per_group, kh, kw = weight.shape
        unfolded = weight.detach().to(torch.float64).reshape(groups, out // groups, per_group, kh, kw)
        if moments is not None:
            metric = conditioned(moments.to(unfolded))
            unfolded = whitened(unfolded, metric)[0] * group_scales(metric)
        both = unfolded.transpose(2, 3).reshape(groups, out // groups * kh, per_group * kw)
        by_filter, by_channel = unfolded.flatten(2), unfolded.transpose(1, 2).flatten(2)
        return most_kept((both, by_filter, by_channel), cls.max_rank_for(*weight.shape, groups=groups))

    def _factorize(self, weight: Tensor, warm_start: bool = False) -> dict[str, Tensor]:
        g, (out, per_group, kh, kw) = self.groups, self.weight_shape
        start = None
        if warm_start:
            start = [self.filters.reshape(g, out // g, self.rank).to(weight)]
            start += [
                factor.to(weight).reshape(g, self.rank, -1).transpose(1, 2)
                for factor in (self.channels, self.vertical, self.horizontal)
            ]
        return self._named(cp_als(weight.reshape(g, out // g, per_group, kh, kw), self.rank, start))

    def _named(self, factors: list[Tensor]) -> dict[str, Tensor]:
        """Factors from `cp_als`, `(groups, d, rank)` each, with the names and shapes that they have in this layer."""
        filters, *others = factors
        names = ("channels", "vertical", "horizontal")
        rows = {name: f.mT.reshape(self.groups * self.rank, -1) for name, f in zip(names, others, strict=True)}
        return {"filters": filters.reshape(self.out_channels, self.rank), **rows}

    def _factorize_on(self, weight: Tensor, metric: Tensor, nearest: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        g, shape = self.groups, self.weight_shape
        # Decompose where the metric, approximated by a product over the modes, is the identity. Then fit the filters in
        # the exact metric.
        split = weight.reshape(g, shape[0] // g, *shape[1:])
        white, back = whitened(split, metric)
        filters, *others = cp_als(white, self.rank)
        candidates = [self._named([filters, *(b @ f for b, f in zip(back, others, strict=True))]), nearest]
        return [self._fitted(weight, metric, factors) for factors in candidates]

    def _fitted(self, weight: Tensor, metric: Tensor, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same factors with the filters that fit best in the metric."""
        g = self.groups
        parts = factors["channels"][:, :, None, None] * factors["vertical"][:, None, :, None]
        parts = (parts * factors["horizontal"][:, None, None, :]).reshape(g, self.rank, -1)
        filters = fit(weight.reshape(g, self.out_channels // g, -1), parts, metric, PENALTY)
        return {**factors, "filters": filters.reshape(self.out_channels, self.rank)}

    def _init_factors(self) -> None:
        # The other three vectors of a component have norm 1 and random directions; the filters carry the scale.
        for factor in (self.channels, self.vertical, self.horizontal):
            factor.normal_()
            factor.div_(factor.norm(dim=1, keepdim=True))
        self.filters.normal_()

    @torch.no_grad()
    def significance(self, kind: str = "product") -> Tensor:
        """How much each component and its feature map matter, `(groups * rank,)`.

        Args:
            kind: "channels" is the paper's: the norm of the component's channel vector (K^S). It changes if one factor
                is scaled up and another down, although the layer stays the same. "product", the default, does not: it
                is the product of the four vectors' norms, which is the norm of the component.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in ("product", "channels"):
            raise ValueError(f"kind={kind!r} is neither 'product' nor 'channels'")
        norms = self.channels.norm(dim=1)
        if kind == "product":
            filters = self.filters.reshape(self.groups, -1, self.rank).norm(dim=1).flatten()
            norms = norms * filters * self.vertical.norm(dim=1) * self.horizontal.norm(dim=1)
        return norms

    @torch.no_grad()
    def remove_(self, components: Tensor) -> None:
        """Remove components from the kernel by zeroing their filters.

        Args:
            components: integer indices `(n,)` into `significance()`, or a mask of its shape.
        """
        if components.dtype == torch.bool:
            components = components.nonzero()[:, 0]
        filters = self.filters.reshape(self.groups, -1, self.rank).clone()
        filters[components // self.rank, :, components % self.rank] = 0
        self.filters.copy_(filters.reshape(self.filters.shape))
