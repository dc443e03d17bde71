"""Rank-1 filters: every filter is an outer product of three 1-D filters.

Kim, Yoon, Jeong, Lee: "Rank-1 convolutional neural network", arXiv 1808.04303 (2018). Lee, Kim, Jeong, Yoon:
alternating tensor compose-decompose (ATCD), Appl. Sci. 2021, 11(2), 643.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decef.layers.cp import PENALTY, cp_als, group_scales, most_kept, whitened
from decef.layers.factorized import FactorizedConv2d
from decef.layers.metric import conditioned
from decef.layers.padding import PaddingMode, Size
from decef.layers.parts import BlockSum, conv2d_of

MOST_UNKNOWN = 1024  # largest number of unknowns in the least-squares problem of one filter


class Rank1Conv2d(FactorizedConv2d):
    """Every filter is a sum of `rank` 3-D rank-1 tensors; the layer runs as a chain of 1-D convolutions.

        W[n, c, i, j] = sum_{m <= rank} channel[n, m, c] vertical[n, m, i] horizontal[n, m, j]

    `rank=1` is the papers' layer. More terms per filter are our extension, so that the layer can be compared with
    others at equal cost. The chain is 1x1, then depthwise kh x 1 with the vertical stride, then 1 x kw with the
    horizontal stride, which also adds the terms. There is nothing between them, and the last one has the bias. For
    arguments and errors see `FactorizedConv2d`. A 1x1 kernel is refused, because its filters already have rank 1.

    Training with `implementation="reconstructed"` is ATCD in its chain-rule reading: each step composes the 3-D
    filters, convolves with them, and updates the 1-D filters by the gradient.

    Args:
        separate_init: draw the three 1-D filters as `torch.nn.Conv2d` would draw three separate layers, instead of
            setting the variance of the composed kernel. These are the consecutive 1-D layers that, according to the
            papers, cannot be trained in some networks.

    Factors:
        channel: `(out_channels, rank, in_channels // groups)`
        vertical: `(out_channels, rank, kh)`
        horizontal: `(out_channels, rank, kw)`
    """

    rank_meaning = "rank-1 terms per filter"
    spectrum_is_bound = True
    scale_factor = "channel"

    channel: nn.Parameter
    vertical: nn.Parameter
    horizontal: nn.Parameter

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
        separate_init: bool = False,
    ) -> None:
        self.separate_init = separate_init  # before the factors are drawn
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, rank=rank, implementation=implementation,
        )  # fmt: skip

    @classmethod
    def max_rank_for(cls, out_channels: int, in_per_group: int, kh: int, kw: int, *, groups: int = 1) -> int:
        if kh * kw == 1:
            raise ValueError("the filters of a 1x1 kernel have rank 1 already: Rank1Conv2d would change nothing")
        return in_per_group * kh * kw // max(in_per_group, kh, kw)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        out, per_group, kh, kw = self.weight_shape
        return {
            "channel": (out, self.rank, per_group),
            "vertical": (out, self.rank, kh),
            "horizontal": (out, self.rank, kw),
        }

    def compose(self) -> Tensor:
        spatial = self.vertical.unsqueeze(3) * self.horizontal.unsqueeze(2)  # (out, rank, kh, kw)
        return (self.channel.transpose(1, 2) @ spatial.flatten(2)).reshape(self.weight_shape)

    def squared_norm(self) -> Tensor:
        gram = self.channel @ self.channel.mT  # (out, rank, rank), and so are all
        for factor in (self.vertical, self.horizontal):
            gram = gram * (factor @ factor.mT)
        return gram.sum()

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        terms = self.out_channels * self.rank
        (sh, sw), (dh, dw) = self.stride, self.dilation
        x = F.conv2d(x, self.channel.flatten(0, 1)[:, :, None, None], groups=self.groups)
        vertical = self.vertical.flatten(0, 1)[:, None, :, None]
        x = F.conv2d(x, vertical, None, (sh, 1), (padding[0], 0), (dh, 1), groups=terms)
        horizontal = self.horizontal[:, :, None, :]  # terms of a filter are added here
        return F.conv2d(x, horizontal, self.bias, (1, sw), (0, padding[1]), (1, dw), groups=self.out_channels)

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        terms = self.out_channels * self.rank
        vertical, horizontal = self.vertical.flatten(0, 1)[:, None, :, None], self.horizontal[:, :, None, :]
        chain = nn.Sequential(
            conv2d_of(self.channel.flatten(0, 1), groups=self.groups),
            conv2d_of(vertical, groups=terms, **self._spatial(horizontal=False)),
            conv2d_of(horizontal, self.bias, self.out_channels, **self._spatial(vertical=False)),
        )
        spatial = self.vertical.unsqueeze(3) * self.horizontal.unsqueeze(2)  # (out, rank, kh, kw)
        branches = [
            nn.Sequential(
                conv2d_of(self.channel[:, j], groups=self.groups),
                conv2d_of(spatial[:, j : j + 1], self.bias if j == 0 else None, self.out_channels, **self._spatial()),
            )
            for j in range(self.rank)
        ]
        found = {"factorized": [chain], "branches": branches}
        if self.groups == 1:
            filters = spatial.transpose(0, 1).flatten(0, 1).unsqueeze(1)  # (rank out, 1, kh, kw)
            bias = None if self.bias is None else F.pad(self.bias, (0, terms - self.out_channels))  # in the first block
            first = conv2d_of(self.channel.transpose(0, 1).flatten(0, 1))
            found["wide"] = [
                nn.Sequential(first, conv2d_of(filters, bias, terms, **self._spatial()), BlockSum(self.rank))
            ]
        return found

    @classmethod
    def spectrum(cls, weight: Tensor, *, groups: int = 1, moments: Tensor | None = None) -> Tensor:
        # channels x space has the most singular values, but for one or two channels rows x (channels columns).
        kernels = weight.detach().to(torch.float64)
        if moments is not None:
            split, metric = kernels.unflatten(0, (groups, -1)), conditioned(moments.to(kernels))
            kernels = (whitened(split, metric)[0] * group_scales(metric)).flatten(0, 1)
        unfoldings = kernels.flatten(2), kernels.transpose(1, 2).flatten(2)
        return most_kept(unfoldings, cls.max_rank_for(*weight.shape, groups=groups))

    def _factorize(self, weight: Tensor, warm_start: bool = False) -> dict[str, Tensor]:
        start = [factor.to(weight).transpose(1, 2) for factor in self.factors().values()] if warm_start else None
        channel, vertical, horizontal = cp_als(weight, self.rank, start)
        return {
            "channel": channel.transpose(1, 2),
            "vertical": vertical.transpose(1, 2),
            "horizontal": horizontal.transpose(1, 2),
        }

    def _factorize_on(self, weight: Tensor, metric: Tensor, nearest: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        g, shape = self.groups, self.weight_shape
        white, back = whitened(weight.reshape(g, shape[0] // g, *shape[1:]), metric)
        factors = cp_als(white.flatten(0, 1), self.rank)  # (out, d, rank) each
        factors = [
            (b[:, None] @ f.reshape(g, -1, *f.shape[1:])).flatten(0, 1) for b, f in zip(back, factors, strict=True)
        ]
        found = dict(zip(nearest, (f.mT for f in factors), strict=True))
        return [self._fitted(weight, metric, candidate) for candidate in (found, nearest)]

    def _fitted(self, weight: Tensor, metric: Tensor, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same factors with the channel filters that fit best, if the problem is small enough to be solved."""
        out, per_group, kh, kw = self.weight_shape
        unknown = self.rank * per_group
        if unknown > MOST_UNKNOWN:
            return factors
        spatial = factors["vertical"].unsqueeze(3) * factors["horizontal"].unsqueeze(2)
        metric = metric.reshape(self.groups, per_group, kh * kw, per_group, kh * kw)
        channel = []
        for n, terms in enumerate(spatial.flatten(2)):  # (rank, kh kw)
            own = metric[n * self.groups // out]
            seen = torch.einsum("mi,cidj->mcdj", terms, own)
            gram = torch.einsum("mcdj,kj->mckd", seen, terms).reshape(unknown, unknown)
            target = torch.einsum("mcdj,dj->mc", seen, weight[n].flatten(1)).flatten()
            gram.diagonal().mul_(1 + PENALTY).add_(1e-9 * gram.diagonal().mean().clamp_min(1e-300))
            channel.append(torch.linalg.solve(gram, target).reshape(self.rank, per_group))
        return {**factors, "channel": torch.stack(channel)}

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        super().reset_parameters(std)
        if self.separate_init and self.channel.device.type != "meta":
            # The last layer adds the terms of a filter, so all of them count as its inputs.
            fan_ins = {"channel": 1, "vertical": 1, "horizontal": self.rank}
            for name, terms in fan_ins.items():
                factor = getattr(self, name)
                bound = 1 / math.sqrt(terms * factor.shape[2])
                factor.uniform_(-bound, bound)

    def _init_factors(self) -> None:
        # The 1-D spatial filters have norm 1 and random directions; the channel filters carry the scale.
        for factor in (self.vertical, self.horizontal):
            factor.normal_()
            factor.div_(factor.norm(dim=2, keepdim=True))
        self.channel.normal_()
