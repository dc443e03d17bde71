"""CP decomposition of a batch of small tensors by accelerated, proximal alternating least squares.

Why not tensorly's `parafac`? It takes one tensor at a time, but rank-1 layers decompose every filter, with ATCD even
after every step. For the two spatial modes it forms Khatri-Rao products as large as the tensor. Its steps are not
regularised, so near-parallel components make them singular. tests/test_cp.py compares our error on trained kernels with
the best of several starts of `parafac`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS, POLISH, WARM_SWEEPS = 60, 6, 5  # the last POLISH of the SWEEPS run in double precision
TOLERANCE = 1e-7  # stop after a sweep that lowers the squared error by less than this share of the squared norm
PROXIMAL = 1e-8  # weight of the pull towards the last factors: keeps steps solvable and the error from rising
SINGLE = 10  # TOLERANCE and PROXIMAL are larger by this factor in single precision
PENALTY = 3e-3  # weight of the components' squared norms, against large components that nearly cancel each other


def cp_als(tensors: Tensor, rank: int, start: list[Tensor] | None = None) -> list[Tensor]:
    """Factors `A_k` of shape `(batch, d_k, rank)` with `tensors[b] ~ sum_r A_1[b, :, r] o ... o A_K[b, :, r]`.

    Starts from the leading singular vectors of every unfolding (HOSVD) and never gets worse from there, so at rank 1
    the result is at least as good as the truncated HOSVD. Each sweep starts from an extrapolation of the last two
    (Nesterov momentum: Mitchell, Ye, De Sterck, "Nesterov acceleration of alternating least squares for canonical
    tensor decomposition", 2020). If that raises the error, the momentum restarts. The columns of all factors but the
    first have norm 1.

    What is minimised is the squared error plus `PENALTY` times the squared norms of all components. The nearest tensor
    of a given rank alone has components many times as large as itself, which nearly cancel each other: training breaks
    that (Phan et al., "Stable low-rank tensor decomposition for compression of convolutional neural network", 2020). In
    the end every result is scaled to be nearest to its tensor.

    If the rank suffices to represent every tensor, the result is instead exact and not iterated, and its columns are
    not normalised.

    Args:
        tensors: `(batch, d_1, d_2, d_3)` or `(batch, d_1, d_2, d_3, d_4)`, in float64; the last two dimensions are the
            small, spatial ones.
        rank: number of components, at least 1.
        start: factors near the solution to start from instead; only a few sweeps follow, without the penalty, so that
            a tensor which such factors compose to stays what it is.
    """
    dims = tensors.shape[1:]
    if rank >= math.prod(dims) // max(dims):
        return _exact(tensors, rank)
    if start is not None:
        return _descend(tensors, start, WARM_SWEEPS, 0.0, accelerated=False)
    factors = [factor.float() for factor in _hosvd_start(tensors, rank)]
    factors = _descend(tensors.float(), factors, SWEEPS - POLISH, PENALTY)
    factors = _descend(tensors, [factor.to(tensors.dtype) for factor in factors], POLISH, PENALTY)
    return _scaled(tensors, factors)


def whitened(kernels: Tensor, metric: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Kernels in coordinates in which a metric is about the identity, and the way back.

    The metric is approximated by a Kronecker product of three: one for the channels and one for each spatial direction,
    each an average of the metric over the other modes. On natural images the metric is close to such a product.

    Args:
        kernels: `(groups, out, in, kh, kw)`.
        metric: `(groups, in kh kw, in kh kw)`.

    Returns:
        The transformed kernels, and three matrices `(groups, d, d)` that transform channel, vertical and horizontal
        factors back.
    """
    in_channels, kh, kw = kernels.shape[2:]
    parts = metric.unflatten(2, (in_channels, kh, kw)).unflatten(1, (in_channels, kh, kw))
    averages = [
        torch.einsum("gcijdij->gcd", parts),
        torch.einsum("gcijckj->gik", parts),
        torch.einsum("gcijcik->gjk", parts),
    ]
    back = []
    for mode, average in enumerate(averages, start=2):
        d = average.shape[-1]
        unit = average / average.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-300)
        root = torch.linalg.cholesky(unit + 1e-9 * torch.eye(d, dtype=unit.dtype, device=unit.device))  # S = L L^T
        kernels = torch.einsum("gdm,gnm...->gnd...", root.mT, kernels.movedim(mode, 2)).movedim(2, mode)
        back.append(torch.linalg.inv(root.mT))
    return kernels, back


def group_scales(metric: Tensor) -> Tensor:
    """How large each group's inputs are, which `whitened` leaves out: `(groups, 1, 1, 1, 1)`."""
    return metric.diagonal(dim1=1, dim2=2).mean(1).sqrt()[:, None, None, None, None]


def cp_compose(factors: list[Tensor]) -> Tensor:
    """The tensors `(batch, d_1, ..., d_K)` that `factors` stand for."""
    rest = reduce(_khatri_rao, factors[1:])  # (batch, d_2 ... d_K, rank)
    dims = [f.shape[1] for f in factors]
    return (factors[0] @ rest.mT).reshape(-1, *dims)


def _scaled(tensors: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The factors, the first one scaled so that each tensor is met as well as it can be by that."""
    composed = cp_compose(factors)
    dims = tuple(range(1, tensors.dim()))
    scale = (tensors * composed).sum(dims) / composed.square().sum(dims).clamp_min(torch.finfo(tensors.dtype).tiny)
    return [factors[0] * scale[:, None, None], *factors[1:]]


def _descend(
    tensors: Tensor, factors: list[Tensor], sweeps: int, penalty: float, accelerated: bool = True
) -> list[Tensor]:
    """Factors after at most `sweeps` sweeps; the penalised error never rises."""
    coarse = 1 if tensors.dtype == torch.float64 else SINGLE
    total = tensors.square().sum().clamp_min(torch.finfo(tensors.dtype).tiny)
    flat = tensors.flatten(-2)  # (batch, *large, d_v d_h)
    before, last, momentum = factors, math.inf, 0
    for _ in range(sweeps):
        step = momentum / (momentum + 3) if accelerated else 0.0
        ahead = [now + step * (now - old) for now, old in zip(factors, before, strict=True)] if step else factors
        new, kept = _sweep(flat, ahead, coarse * PROXIMAL, penalty)
        error = 1 - (kept / total).item()
        if step and error > last:
            momentum = 0
            continue
        before, factors, momentum = factors, new, momentum + 1
        if last - error < coarse * TOLERANCE:
            break
        last = error
    return factors


def _sweep(tensors: Tensor, factors: list[Tensor], proximal: float, penalty: float) -> tuple[list[Tensor], Tensor]:
    """Solve for every factor once.

    The tensor is contracted with each large factor only once; the result serves the other large mode and both spatial
    ones. No Khatri-Rao product with a large factor is ever formed.

    Args:
        tensors: `(batch, d_1, d_v d_h)` or `(batch, d_1, d_2, d_v d_h)`.
        factors: `(batch, d_k, rank)` each: one or two large ones, vertical, horizontal.
        proximal: see PROXIMAL.
        penalty: see PENALTY.

    Returns:
        The new factors, and how much of the squared norm of all tensors they keep, less the penalty.
    """
    factors = list(factors)
    grams = [factor.mT @ factor for factor in factors]

    def solve(mode: int, product: Tensor) -> Tensor:
        others = reduce(torch.mul, grams[:mode] + grams[mode + 1 :])
        factors[mode] = _least_squares(product, factors[mode], others, proximal, penalty)
        grams[mode] = factors[mode].mT @ factors[mode]
        return factors[mode]

    *large, v, h = range(len(factors))
    spatial = _khatri_rao(factors[v], factors[h])  # (batch, d_v d_h, rank)
    if len(large) == 1:
        core = tensors.mT @ solve(0, tensors @ spatial)
    else:
        rest = torch.einsum("bdoi,bor->bdir", tensors, factors[1])
        one = solve(0, (rest * spatial[:, None]).sum(2))
        rest = torch.einsum("bdoi,bdr->boir", tensors, one)
        other = solve(1, (rest * spatial[:, None]).sum(2))
        core = (rest * other[:, :, None]).sum(1)
    core = core.unflatten(1, (factors[v].shape[1], factors[h].shape[1]))  # (batch, d_v, d_h, rank)
    vertical = solve(v, (core * factors[h][:, None]).sum(2))
    target = (core * vertical[:, :, None]).sum(1)
    horizontal = solve(h, target)
    gram = reduce(torch.mul, grams)
    kept = 2 * (target * horizontal).sum() - gram.sum() - penalty * gram.diagonal(dim1=1, dim2=2).sum()
    for factor in factors[1:]:  # the first factor carries the scale, so that no factor can grow while another shrinks
        norm = factor.norm(dim=1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
        factor /= norm
        factors[0] = factors[0] * norm
    return factors, kept


def _least_squares(product: Tensor, factor: Tensor, gram: Tensor, proximal: float, penalty: float) -> Tensor:
    """The best factor given the others, kept near the last one.

    Args:
        product: the tensor contracted with the others, `(batch, d, rank)`.
        factor: the last one.
        gram: the components' inner products in the other modes, `(batch, rank, rank)`; squared norms on its diagonal.
        proximal: see PROXIMAL.
        penalty: see PENALTY.
    """
    gram = gram + penalty * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    floor = torch.finfo(gram.dtype).tiny ** 0.5  # keeps the system solvable for a tensor of zeros, whose factors are 0
    weight = proximal * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(floor)[:, None, None]
    gram = gram + weight * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    target = product + weight * factor
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        return torch.linalg.solve(gram, target, left=False)
    return torch.cholesky_solve(target.mT, root).mT


def _khatri_rao(one: Tensor, other: Tensor) -> Tensor:
    """Columnwise Kronecker product, `(batch, d_1 d_2, rank)`; the index of d_2 varies fastest."""
    return (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1, 2)


def _hosvd_start(tensors: Tensor, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    factors = []
    for mode in range(1, tensors.dim()):
        unfolded = tensors.movedim(mode, 1).flatten(2)
        # The left singular vectors, by descending singular value
        if unfolded.shape[1] > unfolded.shape[2]:
            vectors = torch.linalg.svd(unfolded, full_matrices=False).U[..., :rank]
        else:  # faster, if the matrix is wide
            vectors = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors.flip(-1)[..., :rank]
        missing = rank - vectors.shape[-1]
        if missing:  # more components than dimensions of this mode: fill up with random vectors
            extra = torch.randn(*vectors.shape[:2], missing, generator=generator, dtype=tensors.dtype, device="cpu")
            extra = extra / extra.norm(dim=1, keepdim=True)
            vectors = torch.cat([vectors, extra.to(tensors.device)], dim=-1)
        factors.append(vectors)
    return factors


def _exact(tensors: Tensor, rank: int) -> list[Tensor]:
    """Exact factors: a component for every combination of indices of all modes but the largest, the others zero."""
    dims = tensors.shape[1:]
    largest = max(range(len(dims)), key=lambda k: dims[k])
    small = [k for k in range(len(dims)) if k != largest]
    index = torch.cartesian_prod(*[torch.arange(dims[k], device=tensors.device) for k in small]).view(-1, len(small))
    factors = [torch.zeros(len(tensors), d, rank, dtype=tensors.dtype, device=tensors.device) for d in dims]
    components = torch.arange(len(index), device=tensors.device)
    for column, mode in enumerate(small):
        factors[mode][:, index[:, column], components] = 1
    factors[largest][..., : len(index)] = tensors.movedim(largest + 1, 1).flatten(2)
    return factors


def most_kept(unfoldings: Iterable[Tensor], max_rank: int) -> Tensor:
    """At most what every next component keeps of a kernel's squared norm, `(max_rank,)`: a spectrum that is a bound.

    A rank-1 component has rank 1 in every unfolding, so each bounds what is kept. The one with the most singular values
    is taken.

    Args:
        unfoldings: `(kernels, rows, columns)` each.
        max_rank: how many values to return; those that an unfolding lacks are 0.
    """
    most = max(unfoldings, key=lambda matrix: min(matrix.shape[1:]))
    values = torch.linalg.svdvals(most).square().sum(0)
    return F.pad(values, (0, max_rank - len(values)))
