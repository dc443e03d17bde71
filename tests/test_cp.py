"""CP decomposition and the CPAC layer against tensorly and tensorly-torch."""

import os
from pathlib import Path

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch.testing import assert_close

from decef.layers import CPACConv2d
from decef.layers.cp import cp_als, cp_compose
from decef.models.weights import load_state_dict

WEIGHTS = Path(os.environ.get("DECEF_DATA", "data")) / "weights" / "resnet20-12fca82f.th"


def relative_error(kernel, composed):
    return ((kernel - composed).norm() / kernel.norm()).item()


def tensorly_error(kernel, rank, starts):
    """The best of several starts of tensorly's ALS, columns normalised."""
    errors = []
    with tensorly.backend_context("pytorch"):
        for seed in range(starts):
            init = "svd" if seed == 0 else "random"
            try:
                cp = parafac(kernel, rank, n_iter_max=100, init=init, normalize_factors=True, random_state=seed)
            except torch.linalg.LinAlgError:  # a singular step, which tensorly does not regularise
                continue
            errors.append(relative_error(kernel, tensorly.cp_to_tensor(cp)))
    return min(error for error in errors if error == error)


pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs:UserWarning")


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no trained weights under $DECEF_DATA or data/")
@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.1.conv2", "layer3.2.conv2"])
@pytest.mark.parametrize("rank", [4, 12])
def test_on_trained_kernels_no_worse_than_the_best_of_tensorlys_starts(name, rank):
    kernel = load_state_dict(WEIGHTS)[f"{name}.weight"].double()
    factors = cp_als(kernel[None], rank)
    assert all(factor.isfinite().all() for factor in factors)
    ours = relative_error(kernel, cp_compose(factors)[0])
    assert ours < 1.02 * tensorly_error(kernel, rank, starts=4)
    for factor in factors[1:]:
        assert_close(factor.norm(dim=1), torch.ones_like(factor[:, 0]))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_kernel_of_this_rank_is_found_again(rank):
    """Where ALS alone is known to stall: components that are nearly parallel."""
    torch.manual_seed(rank)
    factors = [torch.randn(1, d, rank, dtype=torch.float64) for d in (12, 8, 3, 3)]
    factors[0] = factors[0] + 3 * factors[0][..., :1]
    kernel = cp_compose(factors)
    found = cp_compose(cp_als(kernel, rank))
    assert relative_error(kernel, found) < 0.05


def test_components_do_not_cancel_each_other(monkeypatch):
    """Without the penalty they are many times as large as the kernel, for no smaller an error."""
    torch.manual_seed(0)
    falls = torch.tensor([1, 0.4, 0.2], dtype=torch.float64)  # as trained kernels do
    kernel = torch.randn(1, 16, 16, 3, 3, dtype=torch.float64) * falls[:, None] * falls

    def fitted():
        factors = cp_als(kernel, 25)
        components = torch.stack([factor.norm(dim=1) for factor in factors]).prod(0)
        return relative_error(kernel, cp_compose(factors)), (components.norm() / kernel.norm()).item()

    error, size = fitted()
    monkeypatch.setattr("decef.layers.cp.PENALTY", 0.0)
    free_error, free_size = fitted()
    assert error < 1.02 * free_error
    assert size < 2 < 5 < free_size


@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"dilation": 2}, {"kernel_size": (3, 5)}])
def test_tensorly_torchs_convolution_with_these_factors_gives_the_same_output(arguments):
    tltorch = pytest.importorskip("tltorch")
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, "padding": 1, "dtype": torch.float64, **arguments}
    conv = torch.nn.Conv2d(4, 6, **arguments)
    ours = CPACConv2d(4, 6, rank=5, **arguments)
    theirs = tltorch.FactorizedConv.from_conv(conv, rank=5, factorization="cp", decompose_weights=False)
    theirs = theirs.double()
    with torch.no_grad():
        theirs.weight.weights.fill_(1)
        factors = (ours.filters, ours.channels.T, ours.vertical.T, ours.horizontal.T)
        for theirs_factor, our_factor in zip(theirs.weight.factors, factors, strict=True):
            theirs_factor.copy_(our_factor)
        theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    for implementation in ("factorized", "reconstructed"):
        ours.implementation = theirs.implementation = implementation
        assert_close(ours(x), theirs(x))
