"""CP decomposition of a batch of small tensors by proximal alternating least squares.

Why not tensorly's `parafac`: it takes one tensor at a time, and rank-1 layers decompose every filter, in ATCD after
every step; and its steps are not regularised, so near-parallel components make them singular. tests/test_cp.py holds
the error on trained kernels against the best of several of its starts.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

SWEEPS, WARM_SWEEPS = 100, 5
TOLERANCE = 1e-7  # a sweep that lowers the mean squared error by less than this share of the norm is the last
PROXIMAL = 1e-8  # weight of staying near the last factors; keeps every step solvable and the error from rising


def cp_als(tensors: Tensor, rank: int, start: list[Tensor] | None = None) -> list[Tensor]:
    """Factors `A_k` of shape `(batch, d_k, rank)` with `tensors[b] ~ sum_r A_1[b, :, r] o ... o A_K[b, :, r]`.

    Starts from the leading singular vectors of every unfolding (HOSVD) and never gets worse from there, so that at
    rank 1 the result is at least as good as the truncated HOSVD. The columns of all factors but the first have
    norm 1. From the rank at which every tensor is representable on, the result is exact and takes no iteration.

    Args:
        tensors: `(batch, d_1, ..., d_K)`, K >= 2, in float64.
        rank: number of components, at least 1.
        start: factors to start from instead, near the solution: few sweeps are made.
    """
    dims = tensors.shape[1:]
    if rank >= math.prod(dims) // max(dims):
        return _exact(tensors, rank)
    factors = _hosvd_start(tensors, rank) if start is None else list(start)
    total = tensors.square().sum().clamp_min(torch.finfo(tensors.dtype).tiny)
    last = torch.inf
    for _ in range(SWEEPS if start is None else WARM_SWEEPS):
        for mode in range(len(dims)):
            factors[mode] = _least_squares(tensors, factors, mode)
            if mode:  # the scale is the first factor's, so that no component can grow while another shrinks
                norm = factors[mode].norm(dim=1, keepdim=True)
                factors[mode] = factors[mode] / norm.clamp_min(1e-300)
                factors[0] = factors[0] * norm
        error = ((tensors - cp_compose(factors)).square().sum() / total).item()
        if last - error < TOLERANCE:
            break
        last = error
    return factors


def cp_compose(factors: list[Tensor]) -> Tensor:
    """The tensors `(batch, d_1, ..., d_K)` that `factors` stand for."""
    rest = _khatri_rao(factors[1:])  # (batch, d_2 ... d_K, rank)
    dims = [f.shape[1] for f in factors]
    return (factors[0] @ rest.transpose(1, 2)).reshape(-1, *dims)


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    """Columnwise Kronecker product, `(batch, prod d_k, rank)`, the last index fastest."""
    return reduce(lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2), factors)


def _unfold(tensors: Tensor, mode: int) -> Tensor:
    """`(batch, d_mode, product of the other dims)`."""
    return tensors.movedim(mode + 1, 1).flatten(2)


def _least_squares(tensors: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    others = [f for k, f in enumerate(factors) if k != mode]
    gram = reduce(torch.mul, [f.transpose(1, 2) @ f for f in others])  # (batch, rank, rank)
    weight = PROXIMAL * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)[:, None, None]
    target = _unfold(tensors, mode) @ _khatri_rao(others) + weight * factors[mode]
    gram = gram + weight * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, target, left=False)


def _hosvd_start(tensors: Tensor, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    factors = []
    for mode in range(tensors.dim() - 1):
        vectors = torch.linalg.svd(_unfold(tensors, mode), full_matrices=False).U[..., :rank]
        missing = rank - vectors.shape[-1]
        if missing:  # more components than the mode has directions: random ones fill up
            extra = torch.randn(*vectors.shape[:2], missing, generator=generator, dtype=tensors.dtype)
            extra = extra / extra.norm(dim=1, keepdim=True)
            vectors = torch.cat([vectors, extra.to(tensors.device)], dim=-1)
        factors.append(vectors)
    return factors


def _exact(tensors: Tensor, rank: int) -> list[Tensor]:
    """One component for every index of all modes but the largest, the others zero."""
    dims = tensors.shape[1:]
    largest = max(range(len(dims)), key=lambda k: dims[k])
    small = [k for k in range(len(dims)) if k != largest]
    index = torch.cartesian_prod(*[torch.arange(dims[k]) for k in small]).view(-1, len(small)).to(tensors.device)
    factors = [torch.zeros(len(tensors), d, rank, dtype=tensors.dtype, device=tensors.device) for d in dims]
    components = torch.arange(len(index), device=tensors.device)
    for column, mode in enumerate(small):
        factors[mode][:, index[:, column], components] = 1
    factors[largest][..., : len(index)] = _unfold(tensors, largest)
    return factors
