"""Least squares in the metric of a layer's inputs, in which a kernel's error is that of its output."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6  # share of the mean second moment that counts for inputs that were never seen


def squared_norm_on(weight: Tensor, metric: Tensor | None, groups: int) -> Tensor:
    """`tr(W S W^T)` summed over groups, with a group's filters as the rows of W; without a metric, S is the identity.

    Args:
        weight: `(out_channels, in_channels // groups, kh, kw)`.
        metric: S, `(groups, d, d)` with `d = in_channels // groups * kh * kw`.
        groups: number of groups.
    """
    if metric is None:
        return weight.square().sum()
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    return ((rows @ metric) * rows).sum()


def fit(rows: Tensor, basis: Tensor, metric: Tensor, penalty: float = 0.0) -> Tensor:
    """Least squares in a metric: the coefficients A that minimise `||rows - A basis||` in it.

    Args:
        rows: `(groups, n, d)`.
        basis: `(groups, m, d)`; if its vectors are linearly dependent, A is the least-norm solution.
        metric: `(groups, d, d)`.
        penalty: weight of the squared norms of all `A[n, m] basis[m]`, in the mean of the metric's diagonal.

    Returns:
        `(groups, n, m)`.
    """
    seen = basis @ metric  # (groups, m, d)
    gram, target = seen @ basis.mT, seen @ rows.mT
    if penalty:
        mean = metric.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        gram = gram + penalty * torch.diag_embed(mean * basis.square().sum(2))
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        return (torch.linalg.pinv(gram, hermitian=True) @ target).mT
    return torch.cholesky_solve(target, root).mT


def conditioned(moments: Tensor) -> Tensor:
    """Moments `(groups, d, d)` as a metric: scaled to mean 1 on the diagonal, and made positive definite by a ridge.

    The ridge is for directions that the data do not have, such as channels that are always 0. Patches are summed in
    single precision, so these directions may even come out negative. The ridge is therefore raised until it suffices.

    Raises:
        ValueError: moments are NaN or infinite.
    """
    if not moments.isfinite().all():
        raise ValueError("moments have NaN or infinite values: so has the data, or what the network makes of it")
    scale = moments.diagonal(dim1=1, dim2=2).mean()
    if scale <= 0:
        return torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device).expand_as(moments)
    metric, ridge = moments / scale, RIDGE
    diagonal = metric.diagonal(dim1=1, dim2=2)  # of which the ridge changes nothing else: moments may be gigabytes
    diagonal += ridge
    while torch.linalg.cholesky_ex(metric).info.any():
        diagonal += 9 * ridge
        ridge *= 10
    return metric
