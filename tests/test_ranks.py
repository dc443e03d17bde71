"""Effective ranks of matrices whose singular values are known, and what the rules do with spectra."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from decef import cost, effective_rank
from decef.conversion import convert
from decef.layers import LAYERS, BasisConv2d, CPACConv2d, DeCEFConv2d, FactorizedConv2d
from decef.plans import plan
from decef.ranks import DEFINITIONS, Budget, Candidate, EffectiveRank, Energy, Fixed, PerLayer, Share, Totals

F64 = torch.float64
FACTORIZED = [name for name, cls in LAYERS.items() if issubclass(cls, FactorizedConv2d)]
NOTHING = Totals(0, 0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=F64)).Q


def kernel(*channels, out=5):
    """A `(out, len(channels), 2, 2)` kernel; the filters that act on a channel have the singular values it names."""
    columns = []
    for values in channels:
        diagonal = torch.zeros(4, out, dtype=F64)
        diagonal[range(len(values)), range(len(values))] = torch.tensor(values, dtype=F64)
        columns.append((orthogonal(4) @ diagonal @ orthogonal(out)).T.reshape(out, 2, 2))
    return torch.stack(columns, dim=1)


# Effective rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("definition", "threshold", "expected"),
    [
        ("threshold", None, 2),  # 4, 2 are at least 0.3 * 4
        ("threshold", 0.24, 3),
        ("threshold", 0.49, 2),
        ("threshold", 0.51, 1),
        ("energy", None, 2),  # 16 / 21 = 0.762, 20 / 21 = 0.952
        ("energy", 0.76, 1),
        ("energy", 0.77, 2),
        ("energy", 0.96, 3),
        ("energy", 1.0, 3),
        ("entropy", None, 7 / 2 ** (10 / 7)),  # shares 4/7, 2/7, 1/7
        ("stable", None, 21 / 16),
    ],
)
def test_definitions_by_hand(definition, threshold, expected):
    """Singular values 4, 2, 1 and three equal ones, of 4 x 5 matrices."""
    weight = kernel((4.0, 2.0, 1.0), (3.0, 3.0, 3.0))
    if threshold not in (0.76, 0.77):  # any share above 2/3 needs all of three equal values
        assert effective_rank(weight, threshold, definition=definition)[1].item() == pytest.approx(3)
    for scale in (1e-6, 1.0, -1e6):
        rank = effective_rank(scale * weight, threshold, definition=definition)
        assert rank[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.999, 1.0])
def test_a_threshold_of_one_counts_the_largest_value(threshold):
    assert effective_rank(kernel((4.0, 2.0, 1.0)), threshold).tolist() == [1]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_zero_channel_has_rank_zero(definition):
    weight = torch.randn(6, 3, 3, 3)
    weight[:, 1] = 0
    ranks = effective_rank(weight, definition=definition)
    assert ranks[1] == 0
    assert (ranks[[0, 2]] >= 1).all()
    assert effective_rank(torch.zeros(6, 3, 3, 3), definition=definition).tolist() == [0, 0, 0]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_groups_are_measured_one_by_one(definition):
    weight = torch.randn(12, 2, 3, 2)
    ranks = effective_rank(weight, definition=definition, groups=3)
    assert ranks.shape == (6,)
    assert_close(ranks, torch.cat([effective_rank(w, definition=definition) for w in weight.chunk(3)]))
    assert effective_rank(weight, definition=definition).shape == (2,)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_effective_rank_is_in_float64(definition):
    assert effective_rank(torch.randn(4, 2, 3, 3), definition=definition).dtype == F64


def test_stable_is_at_most_entropy_is_at_most_the_matrix_rank():
    weight = torch.randn(16, 8, 3, 3)
    stable, entropy = (effective_rank(weight, definition=d) for d in ("stable", "entropy"))
    assert (stable > 1).all()
    assert (stable < entropy).all()
    assert (entropy < 9).all()


@pytest.mark.parametrize(("out", "mean"), [(16, 7.53), (32, 8.94), (64, 9.0)])
def test_random_kernels(out, mean):
    """PAPERS.md 1(e): what an untrained 3 x 3 kernel has depends on the number of its filters."""
    ranks = effective_rank(torch.randn(out, 2000, 3, 3), 0.3)
    assert ranks.mean().item() == pytest.approx(mean, abs=0.04)


def test_effective_rank_refuses():
    weight = torch.randn(4, 2, 3, 3)
    with pytest.raises(ValueError, match="'nuclear' is not one of threshold, energy, entropy, stable"):
        effective_rank(weight, definition="nuclear")
    for definition in ("entropy", "stable"):
        with pytest.raises(ValueError, match=f"'{definition}' has no threshold"):
            effective_rank(weight, 0.5, definition=definition)
    for definition in ("threshold", "energy"):
        for threshold in (0, -0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=f"threshold={threshold} is not a share"):
                effective_rank(weight, threshold, definition=definition)


# Rules ------------------------------------------------------------------------------------------------------------


def candidate(cls, weight, groups=1, name="c"):
    """A candidate as `plan` makes them without an input size."""
    unit = cls(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups, rank=1)
    per_rank = sum(p.numel() for own, p in unit.named_parameters() if own != "bias")
    return Candidate(name, cls, weight, groups, unit.max_rank, weight.numel(), per_rank, 0, 0)


def test_a_rule_can_look_for_a_candidate_among_others():
    weight = torch.randn(4, 2, 3, 3)
    one, other = candidate(DeCEFConv2d, weight), candidate(DeCEFConv2d, weight.clone())
    assert [one, other].index(other) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("cls", [DeCEFConv2d, BasisConv2d])
def test_energy_is_the_smallest_rank_that_keeps_the_share(cls, share, groups):
    conv = nn.Conv2d(4, 16, 3, groups=groups, dtype=F64)
    rank = Energy(share)([candidate(cls, conv.weight.detach(), groups)], NOTHING)["c"]
    kept = [1 - cls.like(conv, r).decompose_(conv.weight) ** 2 for r in range(1, rank + 1)]
    assert kept[-1] >= share
    assert all(k < share for k in kept[:-1])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_energy_is_the_rule_of_basisconv(share):
    """PAPERS.md 2(b).1: the first index whose cumulated squared singular values reach the share, plus 1."""
    weight = torch.randn(24, 5, 3, 3, dtype=F64)
    energy = torch.linalg.svdvals(weight.flatten(1)).square()
    expected = int((energy.cumsum(0) / energy.sum() >= share).nonzero()[0]) + 1
    assert Energy(share)([candidate(BasisConv2d, weight)], NOTHING) == {"c": expected}
    assert 1 < expected < 24


@pytest.mark.parametrize("cls", [DeCEFConv2d, BasisConv2d])
def test_all_energy_is_full_rank_or_that_of_the_kernel(cls):
    rule = Energy(1.0)
    assert rule([candidate(cls, torch.randn(16, 4, 3, 3))], NOTHING) == {"c": 9 if cls is DeCEFConv2d else 16}
    weight = cls(4, 16, 3, rank=3, dtype=F64).compose().detach()
    assert rule([candidate(cls, weight)], NOTHING) == {"c": 3}


@pytest.mark.parametrize("rule", [Energy(0.5), Energy(1.0), EffectiveRank()])
@pytest.mark.parametrize("layer", FACTORIZED)
def test_an_all_zero_kernel_has_rank_1(layer, rule):
    zero = candidate(LAYERS[layer], torch.zeros(16, 4, 3, 3))
    assert rule([zero], NOTHING) == {"c": 1}
    assert zero.kept_energy().sum() == 1


def test_effective_rank_as_a_rule():
    """The mean over channels, rounded up; for the other types the singular values of their spectrum."""
    weight = kernel((4.0, 2.0, 1.0), (4.0, 1.0), (4.0, 1.0))  # 2, 1, 1 at the default threshold
    assert EffectiveRank()([candidate(DeCEFConv2d, weight)], NOTHING) == {"c": 2}
    assert EffectiveRank(0.2)([candidate(DeCEFConv2d, weight)], NOTHING) == {"c": 3}  # 3, 2, 2
    assert EffectiveRank(0.6)([candidate(DeCEFConv2d, weight)], NOTHING) == {"c": 1}
    assert EffectiveRank()([candidate(DeCEFConv2d, torch.zeros(5, 3, 2, 2))], NOTHING) == {"c": 1}
    rows = orthogonal(6) @ torch.diag(torch.tensor([8.0, 4, 2, 1, 0.5, 0.25], dtype=F64)) @ torch.eye(6, 12, dtype=F64)
    basis = candidate(BasisConv2d, rows.reshape(6, 3, 2, 2))
    for threshold, expected in ((0.3, 2), (0.6, 1), (0.1, 4), (0.02, 6)):
        assert EffectiveRank(threshold)([basis], NOTHING) == {"c": expected}


def test_share_rounds_and_gives_at_least_one():
    candidates = [
        candidate(DeCEFConv2d, torch.randn(16, 2, 3, 3), name="nine"),
        candidate(CPACConv2d, torch.randn(4, 2, 3, 2), name="twelve"),
        candidate(DeCEFConv2d, torch.randn(8, 4, 3, 3), 4, name="two"),
    ]
    assert [c.max_rank for c in candidates] == [9, 12, 2]
    for share, expected in ((0.05, [1, 1, 1]), (0.3, [3, 4, 1]), (0.8, [7, 10, 2]), (1.0, [9, 12, 2])):
        assert list(Share(share)(candidates, NOTHING).values()) == expected


@pytest.mark.parametrize("rule", [Energy, EffectiveRank, Share])
@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan])
def test_rules_take_shares_only(rule, share):
    with pytest.raises(ValueError, match=f"={share} is not a share"):
        rule(share)


# Budget by energy -------------------------------------------------------------------------------------------------


def uneven():
    """Two convolutions of nearly rank 1, two with flat spectra, and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.Conv2d(24, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 32, (3, 5), padding=(1, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).double()
    with torch.no_grad():
        for i in (1, 3):
            conv = model[i]
            conv.weight.copy_(CPACConv2d.like(conv, 1).compose() + 0.003 * torch.randn_like(conv.weight))
    return model


def kept_energy(model, made):
    """Sum over layers of the share of the squared norm that each keeps; a layer left dense keeps all."""
    cls, total = LAYERS[made.layer], 0.0
    for row in made.rows:
        conv = model.get_submodule(row.name)
        spectrum = cls.spectrum(conv.weight, groups=conv.groups)
        total += (spectrum[: row.rank].sum() / spectrum.sum()).item() if row.rank else 1.0
    return total


@pytest.mark.parametrize("share", [0.35, 0.7])
@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("layer", FACTORIZED)
def test_budget_by_energy(layer, what, share):
    model, size = uneven(), (3, 8, 8)
    made, uniform = (
        plan(model, layer, rank=Budget(**{what: share}, uniform=u), exclude="0", input_size=size) for u in (False, True)
    )
    before, after = ("params_before", "params_after") if what == "params" else ("macs_before", "macs_after")
    unit = 1 if what == "params" else 2
    allowed = share * cost(model, size).attrs[what]
    used = cost(convert(model, made, from_scratch=True), size).attrs[what]
    assert used <= allowed + 1
    for row in made.rows:
        assert getattr(row, after) <= getattr(row, before)
        if row.action == "convert":
            step = getattr(row, after) // row.rank
            full = row.rank == row.max_rank or getattr(row, after) + step > getattr(row, before)
            assert full or used + unit * step > allowed
    gained = kept_energy(model, made) - kept_energy(model, uniform)
    assert gained > (0.05 if share < 0.6 else 0)


def test_a_parameter_budget_needs_no_input_size():
    model = uneven()
    made = plan(model, "decef", rank=Budget(params=0.5))
    assert made.ranks == plan(model, "decef", rank=Budget(params=0.5), input_size=(3, 8, 8)).ranks
    assert all(row.macs_before is row.macs_after is None for row in made.rows)
    dense = sum(p.numel() for p in model.parameters())
    assert 0.45 * dense < sum(p.numel() for p in convert(model, made).parameters()) <= 0.5 * dense + 0.5


# Layers that would not become cheaper -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, (4, 8, 8)])
def test_rules_that_weigh_costs_leave_what_saves_nothing(size):
    """A 3 x 3 kernel with 16 filters is as dear as dense from rank 5.76 on; at random it has 7.53."""
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        model[1].weight.copy_(DeCEFConv2d(16, 16, 3, rank=2).compose())
    for rule, rank in ((EffectiveRank(0.3), 8), (Energy(0.9999), 9)):
        first, second = plan(model, "decef", rank=rule, input_size=size).rows
        assert (first.action, first.rank, first.reason) == ("keep", None, f"rank {rank} would cost no less than dense")
        assert (first.params_after, first.macs_after) == (first.params_before, first.macs_before)
        assert (second.action, second.rank) == ("convert", 2)
    for rule in (Fixed(9), 9, Share(1.0), PerLayer({"0": 9, "1": 9}), {"0": 9, "1": 9}):
        rows = plan(model, "decef", rank=rule, input_size=size).rows
        assert [(row.action, row.rank) for row in rows] == [("convert", 9)] * 2
        assert all(row.params_after > row.params_before for row in rows)


@pytest.mark.parametrize("rule", [EffectiveRank(), Energy(0.5), Budget(params=0.99)])
def test_a_layer_that_cannot_save_is_no_candidate(rule):
    """One filter per group: rank 1 has 9 + 1 parameters per channel, the dense layer 9."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32))
    with torch.no_grad():
        model[0].weight.copy_(DeCEFConv2d(16, 32, 3, rank=2).compose())
    first, second = plan(model, "decef", rank=rule).rows
    assert first.action == "convert"
    assert (second.action, second.reason) == ("keep", "rank 1 would cost no less than dense")
    assert set(plan(model, "decef", rank=1).ranks) == {"0", "1"}


@pytest.mark.parametrize("what", ["flops", "params"])
def test_a_generous_budget_leaves_dense_what_gains_nothing_by_more_ranks(what):
    """The second kernel has rank 2 and needs no more; the first has full rank and is worth its dense cost."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        model[1].weight.copy_(DeCEFConv2d(32, 32, 3, rank=2).compose())
    made = plan(model, "decef", rank=Budget(**{what: 0.9}), input_size=(16, 12, 12))
    first, second = made.rows
    assert (first.action, first.rank, first.reason) == ("keep", None, f"left dense by {Budget(**{what: 0.9})!r}")
    assert second.rank >= 2
    everything = plan(model, "decef", rank=Budget(**{what: 1.0}), input_size=(16, 12, 12))
    assert everything.rows[0].action == "keep"


def test_where_the_bound_says_that_all_is_kept_the_rest_is_spread_evenly():
    """CPAC's spectrum has no more values than an unfolding, 48 of 144 here, and its kernel needs more ranks."""
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4)))
    made = plan(model, "cpac", rank=Budget(flops=0.9), input_size=(16, 8, 8))
    assert [row.action for row in made.rows] == ["convert"] * 4
    assert max(made.ranks.values()) - min(made.ranks.values()) <= 1
    assert min(made.ranks.values()) > 48
