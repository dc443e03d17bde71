"""Effective rank: how many dimensions the filters on an input channel really use, in four definitions."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from decef.layers.decef import stack_filters

#: Definitions of `effective_rank`, each with its default threshold; None if it has no threshold.
DEFINITIONS = {"threshold": 0.3, "energy": 0.9, "entropy": None, "stable": None}
#: Subtracted from a share of energy. Otherwise a share of 1 would count singular values that are zero up to rounding.
ROUNDING = 1e-12


def effective_rank(
    weight: Tensor, threshold: float | None = None, *, definition: str = "threshold", groups: int = 1
) -> Tensor:
    """Effective rank of the filters on each input channel.

    The filters on a channel, vectorised, are the columns of that channel's `(kh kw, out_channels / groups)` matrix. Let
    s_1 >= s_2 >= ... be its singular values. The definitions are:

    - "threshold": how many s_i are at least `threshold * s_1`. The DeCEF paper has an effective rank of its own, whose
      definition we do not know. This is our reading, and 0.3 is our default.
    - "energy": how many of the largest s_i are needed for a share `threshold` of the sum of all s_i^2; default 0.9.
    - "entropy": exp of the entropy of s_i / sum s (Roy, Vetterli: "The effective rank", EUSIPCO 2007).
    - "stable": the sum of all s_i^2 over s_1^2.

    All four also depend on the size of the matrix, so compare the result with that of a random kernel of this shape.

    Args:
        weight: dense kernel `(out_channels, in_channels // groups, kh, kw)`.
        threshold: in (0, 1], for "threshold" and "energy" only; None means the default in `DEFINITIONS`.
        definition: a key of `DEFINITIONS`.
        groups: number of groups of the convolution.

    Returns:
        `(in_channels,)` in float64; 0 for a channel whose filters are all zero.

    Raises:
        ValueError: no kernel, an unknown definition, a threshold outside (0, 1], or a threshold for a definition
            without one.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition={definition!r} is not one of {', '.join(DEFINITIONS)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be a kernel of four dimensions, not of shape {tuple(weight.shape)}")
    default = DEFINITIONS[definition]
    if threshold is not None and default is None:
        raise ValueError(f"definition={definition!r} has no threshold")
    threshold = default if threshold is None else threshold
    if threshold is not None:
        check_share("threshold", threshold)
    s = torch.linalg.svdvals(stack_filters(weight, groups))  # (in_channels, min(kh kw, out_channels / groups))
    largest, total = s[:, :1], s.sum(1, keepdim=True)
    if definition == "threshold":
        rank = ((s >= threshold * largest) & (s > 0)).sum(1).to(s.dtype)
    elif definition == "energy":
        assert threshold is not None
        energy = s.square().cumsum(1)
        rank = (energy < (threshold - ROUNDING) * energy[:, -1:]).sum(1).to(s.dtype) + 1
    elif definition == "entropy":
        p = s / total
        rank = torch.exp(-torch.special.xlogy(p, p).sum(1))
    else:
        rank = s.square().sum(1) / largest.squeeze(1).square()
    return torch.where(largest.squeeze(1) > 0, rank, 0.0)


def check_share(name: str, share: float) -> None:
    """Check that a share is in (0, 1].

    Raises:
        ValueError: it is not; the message calls it `name`.
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r} is not a share: it must be above 0 and at most 1")
