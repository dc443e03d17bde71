"""BasisConv with a trained basis and batch norm.

Tayyab, Khan, Mahalanobis: "Compressing deep CNNs using basis representation and spectral fine-tuning", ICIP 2021, arXiv
2105.10436.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from decef.layers.basis import BasisConv2d
from decef.layers.choice import factorized_has_fewer_macs
from decef.layers.factorized import evaluating
from decef.layers.padding import PaddingMode, Size


class Basis2021Conv2d(BasisConv2d):
    """A convolution with `rank` basis filters, batch norm, and a 1x1 convolution that mixes them, all trained.

        y = coefficients @ norm(basis * x),    in evaluation mode  W[n] = sum_q coefficients[n, q] s[q] basis[q]

    where `s = weight / sqrt(running_var + eps)` is the norm's scale; its shift is added to the bias. In training the
    norm depends on the batch, so there is no composed kernel: the layer runs as a chain, and `compose` raises an error.
    The factors, and the behaviour in evaluation mode, are those of `BasisConv2d`. For arguments and errors see
    `FactorizedConv2d`.

    Raises:
        ValueError: also for `implementation="reconstructed"`, which could not be trained.
    """

    composes_in_training = False

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
        if implementation == "reconstructed":
            raise ValueError(
                "implementation='reconstructed' is not possible with batch norm between the convolutions, which leaves "
                "no composed kernel to train: say factorized or auto"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, rank=rank, implementation=implementation, train_basis=True,
        )  # fmt: skip

    def _register(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._register(bias, device, dtype)
        self.norm = nn.BatchNorm2d(self.groups * self.rank, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        self.norm.reset_parameters()
        super().reset_parameters(std)

    def compose(self) -> Tensor:
        """The dense kernel `(out_channels, in_channels // groups, kh, kw)` of evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        scale, _ = self._scale_and_shift()
        return self._combine(self.basis * scale[:, None, None, None])

    def compose_bias(self) -> Tensor | None:
        _, shift = self._scale_and_shift()
        coefficients = self.coefficients.reshape(self.groups, -1, self.rank)
        added = (coefficients @ shift.reshape(self.groups, self.rank, 1)).flatten()
        return added if self.bias is None else self.bias + added

    def squared_norm(self) -> Tensor:
        return self.compose().square().sum()

    def prefers_factorized(self, x: Tensor) -> bool:
        if self.training:
            return True
        computed = is_parametrized(self) or not {"weight", "bias"} <= self.norm._parameters.keys()
        if computed:  # which `_twin` can't copy
            return factorized_has_fewer_macs(self, x)
        return super().prefers_factorized(x)

    def forward_factorized(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        y = self._filtered(x, padding)
        single = isinstance(y, Tensor) and y.dim() == 3  # what torch.fx traces with has no number of dimensions
        y = self.norm(y[None])[0] if single else self.norm(y)
        return F.conv2d(y, self.coefficients[:, :, None, None], self.bias, groups=self.groups)

    def _filtered(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, self.basis, None, self.stride, padding, self.dilation, self.groups)

    def before_norm(self, input: Tensor) -> Tensor:
        """What the norm gets for an input of the layer: `(B, groups * rank, H, W)`."""
        x = self._padded(input)
        return self._filtered(x if x.dim() == 4 else x[None], self._padding)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Give the norm the statistics of what it gets; its weight and bias are set so that `compose` stays the same.

        A batch of such statistics then passes in training mode as in evaluation mode.

        Args:
            mean, var: of each channel of `before_norm`, `(groups * rank,)` each.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        scale, shift = self._scale_and_shift()
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_(scale * torch.sqrt(norm.running_var + norm.eps))
        norm.bias.copy_(shift + norm.running_mean * scale)

    def _twin(self) -> Self:
        # Timing must not give the norm's parameters gradients either.
        norm = nn.BatchNorm2d(self.groups * self.rank, device=self.basis.device, dtype=self.norm.weight.dtype).eval()
        norm.load_state_dict(self.norm.state_dict())
        twin = super()._twin()
        twin._modules = {"norm": norm.requires_grad_(self.norm.weight.requires_grad)}
        return twin

    def as_convolutions(self) -> dict[str, list[nn.Sequential]]:
        with evaluating(self):
            scale, shift = self._scale_and_shift()
        return self._filtered_then_mixed(self.basis * scale[:, None, None, None], self.coefficients, shift)

    def _set_factors(self, factors: dict[str, Tensor]) -> None:
        # In evaluation mode the norm is then the identity, as in the authors' code. In training mode it is not, until
        # its statistics are measured, see `set_statistics`.
        self.norm.reset_parameters()
        assert self.norm.running_var is not None
        self.norm.running_var.fill_(1 - self.norm.eps)  # the identity to the last bit
        super()._set_factors(factors)

    def orthogonality(self) -> Tensor:
        """Penalty `sum_{i<j} g_ij^2 / (Q (Q - 1))`, g the Gram matrix of the Q normalised filters, summed over groups.

        This is the authors' penalty at their alpha of 1/2; its other term, `sum_i (1 - g_ii^2)`, is 0 for normalised
        filters. Their code detaches it from the graph; here it has a gradient.
        """
        if self.rank == 1:
            return self.basis.new_zeros(())
        filters = F.normalize(self.basis.reshape(self.groups, self.rank, -1), dim=2)
        off_diagonal = (filters @ filters.mT).triu(diagonal=1)
        return off_diagonal.square().sum() / (self.rank * (self.rank - 1))

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm's scale and shift in evaluation mode, `(groups * rank,)` each."""
        if self.training:
            raise RuntimeError(
                "in training mode a layer with batch norm between its convolutions has no composed kernel: call eval()"
            )
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return scale, norm.bias - norm.running_mean * scale
