"""DeCEF: the filters on each input channel lie in a small subspace.

Yu, Scheidegger, McKelvey: "Building efficient CNNs using depthwise convolutional eigen-filters (DeCEF)", Neurocomputing
609 (2024) 128461; arXiv 1910.09359.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decef.layers.factorized import FactorizedConv2d
from decef.layers.metric import conditioned, fit
from decef.layers.parts import Copies, conv2d_of


class DeCEFConv2d(FactorizedConv2d):
    """`rank` depthwise eigen-filters per input channel, then a 1x1 convolution.

        y_n = sum_c W[n, c] * x_c,    W[n, c] = sum_{j <= rank} coefficients[n, c, j] eigenfilters[c, j]

    The filters on input channel c, vectorised, are the columns of a `(kh kw, out / groups)` matrix. The truncated
    singular value decomposition of this matrix gives the best eigen-filters (left singular vectors) and coefficients.
    There is nothing between the two convolutions. Stride, padding and dilation belong to the first, the bias to the
    second. For arguments and errors see `FactorizedConv2d`. A 1x1 kernel is refused, because its subspace would be the
    whole space.

    From scratch, the factors are those of a random dense kernel, rescaled (see `reset_parameters`). We do not know the
    paper's initialisation.

    Factors:
        eigenfilters: `(in_channels, rank, kh, kw)`
        coefficients: `(out_channels, in_channels // groups, rank)`
    """

    rank_meaning = "eigen-filters per input channel"
    scale_factor = "coefficients"

    eigenfilters: nn.Parameter
    coefficients: nn.Parameter

    @classmethod
    def max_rank_for(cls, out_channels: int, in_per_group: int, kh: int, kw: int, *, groups: int = 1) -> int:
        if kh * kw == 1:
            raise ValueError("a 1x1 kernel has no eigen-filters: DeCEF needs a kernel of more than one element")
        return min(kh * kw, out_channels // groups)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        out, per_group, kh, kw = self.weight_shape
        return {
            "eigenfilters": (self.in_channels, self.rank, kh, kw),
            "coefficients": (out, per_group, self.rank),
        }

    def compose(self) -> Tensor:
        g, (out, per_group, kh, kw) = self.groups, self.weight_shape
        filters = self.eigenfilters.reshape(g, per_group, self.rank, kh * kw)
        coefficients = self.coefficients.reshape(g, out // g, per_group, self.rank)
        weight = coefficients.transpose(1, 2) @ filters  # (g, in/g, out/g, kh kw)
        return weight.transpose(1, 2).reshape(out, per_group, kh, kw)

    def squared_norm(self) -> Tensor:
        g, (out, per_group, _, _) = self.groups, self.weight_shape
        filters = self.eigenfilters.flatten(2)  # (in, rank, kh kw)
        coefficients = self.coefficients.reshape(g, out // g, per_group, self.rank).permute(0, 2, 3, 1).flatten(0, 1)
        return ((filters @ filters.mT) * (coefficients @ coefficients.mT)).sum()  # (in, rank, rank) each

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        filters = self.eigenfilters.flatten(0, 1).unsqueeze(1)  # (in rank, 1, kh, kw)
        y = F.conv2d(x, filters, None, self.stride, padding, self.dilation, groups=self.in_channels)
        return F.conv2d(y, self.coefficients.flatten(1)[:, :, None, None], self.bias, groups=self.groups)

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        def chain(filters: Tensor, coefficients: Tensor, bias: Tensor | None) -> nn.Sequential:
            depthwise = conv2d_of(filters.flatten(0, 1).unsqueeze(1), groups=self.in_channels, **self._spatial())
            return nn.Sequential(depthwise, conv2d_of(coefficients.flatten(1), bias, self.groups))

        one_by_one = [slice(j, j + 1) for j in range(self.rank)]
        found = {
            "factorized": [chain(self.eigenfilters, self.coefficients, self.bias)],
            "branches": [
                chain(self.eigenfilters[:, j], self.coefficients[:, :, j], self.bias if j.start == 0 else None)
                for j in one_by_one
            ],
        }
        if self.groups == 1:
            filters = self.eigenfilters.transpose(0, 1).flatten(0, 1).unsqueeze(1)  # (rank in, 1, kh, kw)
            depthwise = conv2d_of(filters, groups=len(filters), **self._spatial())
            mix = conv2d_of(self.coefficients.transpose(1, 2).flatten(1), self.bias)
            found["wide"] = [nn.Sequential(Copies(self.rank), depthwise, mix)]
        return found

    @classmethod
    def spectrum(cls, weight: Tensor, *, groups: int = 1, moments: Tensor | None = None) -> Tensor:
        filters = stack_filters(weight, groups)
        if moments is not None:
            filters = own_roots(conditioned(moments.to(filters)), weight.shape[1]) @ filters
        return torch.linalg.svdvals(filters).square().sum(0)

    def _factorize(self, weight: Tensor, warm_start: bool = False) -> dict[str, Tensor]:
        g, (out, per_group, kh, kw) = self.groups, self.weight_shape
        u, s, vh = torch.linalg.svd(stack_filters(weight, g), full_matrices=False)
        filters = u[..., : self.rank].transpose(1, 2)  # (in, rank, kh kw)
        coefficients = (s.unsqueeze(2) * vh)[:, : self.rank]  # (in, rank, out/g)
        return {
            "eigenfilters": filters.reshape(self.in_channels, self.rank, kh, kw),
            "coefficients": coefficients.reshape(g, per_group, self.rank, out // g)
            .permute(0, 3, 1, 2)
            .reshape(out, per_group, self.rank),
        }

    def _factorize_on(self, weight: Tensor, metric: Tensor, nearest: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        filters = stack_filters(weight, self.groups)  # (in, kh kw, out/g)
        # For every channel separately: its filters F, projected on the leading right singular vectors of S^(1/2) F.
        roots = own_roots(metric, self.weight_shape[1])
        leading = torch.linalg.svd(roots @ filters, full_matrices=False).Vh[:, : self.rank]
        basis = torch.linalg.qr(filters @ leading.mT).Q.mT  # (in, rank, kh kw)
        return [self._fitted(weight, metric, b) for b in (basis, nearest["eigenfilters"].flatten(2))]

    def _fitted(self, weight: Tensor, metric: Tensor, filters: Tensor) -> dict[str, Tensor]:
        """Eigen-filters `(in, rank, kh kw)` with the coefficients that fit best over all channels together."""
        g, (out, per_group, kh, kw) = self.groups, self.weight_shape
        filters = filters.reshape(g, per_group, self.rank, kh * kw)
        # All eigen-filters as vectors over a whole patch: block diagonal
        wide = torch.zeros(g, per_group, self.rank, per_group, kh * kw, dtype=weight.dtype, device=weight.device)
        index = torch.arange(per_group, device=weight.device)
        wide[:, index, :, index] = filters.transpose(0, 1)
        wide = wide.reshape(g, per_group * self.rank, -1)
        coefficients = fit(weight.reshape(g, out // g, -1), wide, metric)
        return {
            "eigenfilters": filters.reshape(self.eigenfilters.shape),
            "coefficients": coefficients.reshape(self.coefficients.shape),
        }

    def _init_factors(self) -> None:
        weight = torch.randn(self.weight_shape, dtype=torch.float64, device=self.eigenfilters.device)
        for name, value in self._factorize(weight).items():
            getattr(self, name).copy_(value)

    def orthogonality(self) -> Tensor:
        """Penalty `sum_c ||E_c E_c^T - I||_F^2`, zero if every channel's eigen-filters are orthonormal.

        We do not know the paper's training strategy. Without the penalty nothing keeps the filters orthonormal, but the
        layer works all the same.
        """
        filters = self.eigenfilters.flatten(2)
        gram = filters @ filters.transpose(1, 2)
        return (gram - torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)).square().sum()


def stack_filters(weight: Tensor, groups: int = 1) -> Tensor:
    """The vectorised filters on each input channel as the columns of a matrix, in float64.

    Args:
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
        groups: number of groups of the convolution.

    Returns:
        `(in_channels, kh * kw, out_channels // groups)`.
    """
    out, per_group, kh, kw = weight.shape
    stacked = weight.detach().to(torch.float64).reshape(groups, out // groups, per_group, kh * kw)
    return stacked.permute(0, 2, 3, 1).reshape(groups * per_group, kh * kw, out // groups)


def own_roots(metric: Tensor, per_group: int) -> Tensor:
    """Roots R of the diagonal blocks that belong to one input channel each, with `R^T R` equal to the block.

    Args:
        metric: `(groups, in/g kh kw, in/g kh kw)`.
        per_group: input channels in a group.

    Returns:
        `(in_channels, kh kw, kh kw)`.
    """
    blocks = metric.unflatten(2, (per_group, -1)).unflatten(1, (per_group, -1))
    own = torch.stack([blocks[:, c, :, c] for c in range(per_group)], 1).flatten(0, 1)
    return torch.linalg.cholesky(own).mT
