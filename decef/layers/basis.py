"""BasisConv: all filters of a layer as linear combinations of a few basis filters.

Tayyab, Mahalanobis: "BasisConv: a method for compressed representation and learning in CNNs", arXiv 1906.04509
(2019). The layer of the later paper is in basis2021.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decef.layers.factorized import FactorizedConv2d
from decef.layers.metric import conditioned
from decef.layers.padding import PaddingMode, Size
from decef.layers.parts import BLOCK


class BasisConv2d(FactorizedConv2d):
    """A convolution with `rank` orthonormal basis filters, then a 1x1 convolution that mixes them.

        W[n] = sum_{q <= rank} coefficients[n, q] basis[q]

    The best basis for a dense kernel consists of the leading eigenvectors of `H^T H`, where row n of H is the
    vectorised filter n. With groups, each group has its own basis. Stride, padding and dilation belong to the first
    convolution, the bias to the second. For arguments and errors see `FactorizedConv2d`.

    Args:
        train_basis: whether the basis filters are trained. The default, False, follows the paper: from scratch the
            basis is random and orthonormal and never changes, and only the coefficients are trained.

    Factors:
        basis: `(groups * rank, in_channels // groups, kh, kw)`
        coefficients: `(out_channels, rank)`
    """

    rank_meaning = "basis filters (per group)"
    scale_factor = "coefficients"
    block = BLOCK

    basis: nn.Parameter
    coefficients: nn.Parameter

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
        train_basis: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, rank=rank, implementation=implementation,
        )  # fmt: skip
        self.basis.requires_grad_(train_basis)

    @classmethod
    def max_rank_for(cls, out_channels: int, in_per_group: int, kh: int, kw: int, *, groups: int = 1) -> int:
        return min(out_channels // groups, in_per_group * kh * kw)

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        out, per_group, kh, kw = self.weight_shape
        return {"basis": (self.groups * self.rank, per_group, kh, kw), "coefficients": (out, self.rank)}

    def compose(self) -> Tensor:
        return self._combine(self.basis)

    def _combine(self, basis: Tensor) -> Tensor:
        """Dense kernel from a basis `(groups * rank, in_channels // groups, kh, kw)` and the layer's coefficients."""
        g, shape = self.groups, self.weight_shape
        weight = self.coefficients.reshape(g, shape[0] // g, self.rank) @ basis.reshape(g, self.rank, -1)
        return weight.reshape(shape)

    def squared_norm(self) -> Tensor:
        basis = self.basis.reshape(self.groups, self.rank, -1)
        coefficients = self.coefficients.reshape(self.groups, -1, self.rank)
        return ((basis @ basis.mT) * (coefficients.mT @ coefficients)).sum()  # (groups, rank, rank) each

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        y = F.conv2d(x, self.basis, None, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(y, self.coefficients[:, :, None, None], self.bias, groups=self.groups)

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        return self._filtered_then_mixed(self.basis, self.coefficients)

    @classmethod
    def spectrum(cls, weight: Tensor, *, groups: int = 1, moments: Tensor | None = None) -> Tensor:
        rows = weight.detach().to(torch.float64).reshape(groups, weight.shape[0] // groups, -1)
        if moments is not None:
            rows = rows @ torch.linalg.cholesky(conditioned(moments.to(rows)))
        return torch.linalg.svdvals(rows).square().sum(0)

    def _factorize(self, weight: Tensor, warm_start: bool = False) -> dict[str, Tensor]:
        rows = weight.reshape(self.groups, self.out_channels // self.groups, -1)  # (g, out/g, in/g kh kw)
        if warm_start and not self.basis.requires_grad:
            # The basis is frozen, so the low-rank set is its span.
            basis = self.basis.to(weight).reshape(self.groups, self.rank, -1)
            return {
                "basis": self.basis.to(weight),
                "coefficients": (rows @ torch.linalg.pinv(basis)).reshape(self.coefficients.shape),
            }
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        coefficients = (u * s.unsqueeze(-2))[..., : self.rank]
        return {
            "basis": vh[:, : self.rank].reshape(self.basis.shape),
            "coefficients": coefficients.reshape(self.coefficients.shape),
        }

    def _factorize_on(self, weight: Tensor, metric: Tensor, nearest: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        rows = weight.reshape(self.groups, self.out_channels // self.groups, -1)
        leading = torch.linalg.eigh(rows @ metric @ rows.mT).eigenvectors[..., -self.rank :]
        projected = leading @ (leading.mT @ rows)  # the nearest in the metric of this rank
        return [self._factorize(projected.reshape(self.weight_shape))]

    def _init_factors(self) -> None:
        dim = math.prod(self.weight_shape[1:])
        gaussian = torch.randn(self.groups, dim, self.rank, dtype=torch.float64, device=self.basis.device)
        self.basis.copy_(torch.linalg.qr(gaussian).Q.transpose(1, 2).reshape(self.basis.shape))
        self.coefficients.normal_()
