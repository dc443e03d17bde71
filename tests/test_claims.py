"""Claims: every kind and verdict on made-up runs, and what claims.yaml may hold."""

import json
import re
import runpy
import shlex
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from support import ROOT, composed

from decef.models.weights import describe_file
from decef.results import claims, findings, published
from decef.results.claims import (
    FAILS,
    HOLDS,
    MIXED,
    NOT_TESTED,
    ONE_SEED,
    REFUTED,
    UNDECIDED,
    Claim,
    judge,
    load_claims,
)
from decef.results.claims_page import asks_words, markdown
from decef.results.findings import Measurements, load_measurements
from decef.results.published import Published, load_known_weights, load_published, published_lines
from decef.results.statistics import seeds_needed
from decef.training.record import recorded, to_record

#: What the project's notes on the papers have as derived, recalled or unknown: not to be printed as anybody's figure.
NOT_READ = [
    *(f"D{i}" for i in range(15, 24)),
    *("B13", "B14", *(f"B{i}" for i in range(29, 36))),
    *("C17", "C18", "C19", "C20"),
    *(f"R{i}" for i in range(16, 25)),
]


REPLACEMENT = {"dense_stem": True, "include": None, "exclude": None, "min_kernel_size": None}


def record(layer, seed, top1, *, flops=0.66, params=0.64, model="resnet20", train="standard", atcd=None, **options):
    """A run with a config as records have it, options that are off among them."""
    dataset, precision = options.pop("dataset", {}), options.pop("precision", "bf16")
    name = "-".join(map(str, [layer, model, train, atcd, *dataset, *options.values(), flops, f"s{seed}"]))
    training = {
        "name": train,
        "epochs": 48,
        "batch_size": 128,
        "lr": 0.02 if train == "recover" else 0.2,
        "weight_decay": 5e-4,
        "atcd": atcd,
        "decay": None,
    }
    settings = {"name": model, "shortcut": "A", "weights": None}
    settings |= {key: options.pop(key) for key in ("weights", "weights_md5", "decompose_on") if key in options}
    if layer == "conv2d":
        flops = params = 1
    else:
        training["decay"] = options.pop("decay", None if atcd else "factors")
        settings |= REPLACEMENT | {key: options.pop(key) for key in REPLACEMENT if key in options}
        asked = {} if "rank" in options or "energy" in options else {"flops": 0.667}
        options = {"rank": None, "flops": None, "energy": None, "implementation": "reconstructed", **asked, **options}
    config = {
        "format": 2,
        "dataset": {"name": "cifar10", "train_size": None, **dataset},
        "model": settings,
        "layer": {"name": layer, **options},
        "train": training,
        "seed": seed,
    }
    dense = {"params": 1000, "trainable_params": 1000, "flops": 9000}
    summary = {"id": name, "test_top1": top1, "dense": dense, "flops": 9000 * flops, "precision": precision}
    return to_record(config, summary | {"params": 1000 * params, "trainable_params": 1000 * params})


def runs(layer, *top1, **options):
    return [record(layer, seed, value, **options) for seed, value in enumerate(top1)]


def claim(figures=(), **asks):
    return Claim("test", "ours", "a statement", "nowhere", asks, "a command", figures)


NON_INFERIOR = claim(
    kind="non_inferior", runs={"dataset.name": "cifar10", "layer.name": "decef"}, flops=[0.6, 0.7], margin=0.5
)
DENSE = runs("conv2d", 90.0, 91.0, 92.0)
DENSE_5 = runs("conv2d", 90.0, 91.0, 92.0, 91.0, 90.0)  # as many as claims look at first
OURS_5 = runs("decef", 90.0, 91.1, 91.9, 91.0, 90.1, rank=4)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([], NOT_TESTED),
        ([90.0], UNDECIDED),
        ([10.0], UNDECIDED),  # however far off
        ([90.0, 91.1, 91.9], HOLDS),
        ([95.0, 96.1, 96.9], HOLDS),
        ([88.0, 89.1, 89.9], FAILS),
        ([89.4, 90.6, 91.4], UNDECIDED),  # -0.53 on average, and the interval spans -0.5
        ([87.0, 91.0, 95.0], UNDECIDED),  # no loss on average, but what a spread
    ],
)
def test_non_inferior(ours, verdict):
    got = judge(NON_INFERIOR, [*DENSE, *runs("decef", *ours, flops=0.667, rank=4)])
    assert got.verdict == verdict
    assert [e.verdict for e in got.evidence] == ([ONE_SEED] if len(ours) == 1 else [verdict] if ours else [])
    if len(ours) == 3:
        (evidence,) = got.evidence
        assert evidence.n == 3
        assert len(evidence.runs) == 6
        assert f"{sum(ours) / 3 - 91:+.2f} [" in evidence.result
        assert "against 91.00 % [88.52, 93.48] of conv2d" in evidence.result


def test_runs_are_paired_by_seed_and_compared_with_their_twins_alone():
    far = [record("conv2d", 0, 50.0, model="resnet56"), record("conv2d", 0, 50.0, train="paper")]
    ours = runs("decef", 89.0, 90.1, 90.9, 99.0, 99.0, rank=4)  # two seeds that Conv2d lacks would hide the loss
    (evidence,) = judge(NON_INFERIOR, [*far, *ours, *DENSE]).evidence
    assert evidence.verdict == FAILS
    assert "-1.00 [" in evidence.result
    assert "over 3 of the seeds" in evidence.result
    (lonely,) = judge(NON_INFERIOR, [*far, *ours]).evidence
    assert lonely.verdict == NOT_TESTED
    assert "no run of conv2d" in lonely.result


def test_runs_of_other_costs_layers_and_data_are_no_evidence():
    small, other = runs("decef", 1.0, 1.1, 1.2, flops=0.2), runs("cpac", 1.0, 1.1, 1.2)
    elsewhere = runs("decef", 1.0, 1.1, 1.2, dataset={"name": "digits"})
    assert judge(NON_INFERIOR, [*DENSE, *small, *other, *elsewhere]) == claims.Verdict(NOT_TESTED)


def test_dense_twins_have_neither_what_layers_are_replaced_nor_how_those_are_trained():
    ours = runs("decef", 90.0, 91.1, 91.9, rank=4, dense_stem=False, exclude="layer1.*", decay="kernel")
    assert judge(NON_INFERIOR, [*DENSE, *ours]).verdict == HOLDS


def test_dense_twins_of_decomposed_networks_begin_with_the_same_weights():
    begun, elsewhere = {"weights": "a.pt", "weights_md5": "a"}, {"weights": "b.pt", "weights_md5": "b"}
    ours = runs("decef", 90.0, 91.1, 91.9, rank=4, decompose_on=512, **begun)
    twins, others = runs("conv2d", 90.0, 91.0, 92.0, **begun), runs("conv2d", 50.0, 51.0, 52.0, **elsewhere)
    assert judge(NON_INFERIOR, [*DENSE, *twins, *others, *ours]).verdict == HOLDS
    assert judge(NON_INFERIOR, [*DENSE, *others, *ours]).verdict == NOT_TESTED


def test_training_from_scratch_and_fine_tuning_are_claims_of_their_own():
    asked = {one.id: one for one in load_claims()}
    begun = {"weights": "a.pt", "weights_md5": "a", "train": "recover"}
    scratch = [*DENSE, *runs("decef", 90.0, 91.1, 91.9, flops=0.667)]
    tuned = [*runs("conv2d", 90.0, 91.0, 92.0, **begun), *runs("decef", 90.0, 91.1, 91.9, decompose_on=512, **begun)]
    for claim, found in (("fair-fight", scratch), ("decef-two-thirds-resnet", scratch), ("fair-fight-trained", tuned)):
        assert judge(asked[claim], [*scratch, *tuned]) == judge(asked[claim], found)
        assert len(judge(asked[claim], found).evidence) == 1


def test_nine_epochs_and_other_decays_decide_no_claim_about_training_from_scratch():
    asked = {one.id: one for one in load_claims()}
    quick = [run for layer in ("conv2d", "decef") for run in runs(layer, 90.0, 91.0, 92.0, train="quick")]
    kernel = [*DENSE, *runs("decef", 90.0, 91.1, 91.9, decay="kernel")]
    for one in ("fair-fight", "decef-two-thirds-resnet"):
        assert judge(asked[one], quick).verdict == judge(asked[one], kernel).verdict == NOT_TESTED


def test_what_only_tries_something_out_is_no_evidence():
    found = [*DENSE, *runs("decef", 88.0, 89.1, 89.9, flops=0.667, rank=4)]
    assert judge(NON_INFERIOR, found).verdict == FAILS
    for changed in ({"name": "smoke"}, {"validation": 0.1}):
        tried = [replace(r, config=replace(r.config, train=replace(r.config.train, **changed))) for r in found]
        assert judge(NON_INFERIOR, tried).verdict == NOT_TESTED
    part = [replace(r, config=replace(r.config, dataset=replace(r.config.dataset, train_size=100))) for r in found]
    assert judge(NON_INFERIOR, part).verdict == NOT_TESTED
    found = [*DENSE_5, *runs("decef", 88.0, 89.1, 89.9, 89.0, 88.1, flops=0.667, rank=4)]
    shorter = [replace(r, config=replace(r.config, train=replace(r.config.train, epochs=1))) for r in found]
    asked = {one.id: one for one in load_claims()}
    assert judge(asked["decef-two-thirds-resnet"], found).verdict == FAILS
    assert judge(asked["decef-two-thirds-resnet"], shorter).verdict == NOT_TESTED


def test_the_epochs_that_claims_ask_for_are_those_of_the_schedules():
    for one in load_claims():
        runs = one.asks.get("runs", {})
        if "paper" in runs.get("train.name", ""):
            schedules = [composed(f"train={name}")["train"]["epochs"] for name in runs["train.name"]]
            assert sorted(runs["train.epochs"]) == sorted(schedules)


def test_a_low_rank_control_replaces_the_same_layers():
    ask = claim(kind="non_inferior", runs={"layer.name": "decef"}, control={"layer.name": "cpac"}, margin=0.5)
    control, other = runs("cpac", 90.0, 91.0, rank=4), runs("cpac", 10.0, 11.0, rank=4, dense_stem=False)
    (evidence,) = judge(ask, [*control, *other, *runs("decef", 90.0, 91.1, rank=4)]).evidence
    assert "against 90.50 %" in evidence.result


def test_a_control_of_the_same_layer_type_differs_only_in_what_it_names():
    here = {"layer.name": "decef", "layer.rank": 1}
    ask = claim(kind="non_inferior", runs={**here, "train.atcd": [1]}, control={**here, "train.atcd": None}, margin=0)
    ours = runs("decef", 90.0, 91.1, 91.9, rank=1, atcd=1)
    other = runs("decef", 10.0, 11.1, 12.3, rank=1, orthogonality=0.001)
    assert judge(ask, [*ours, *other]).verdict == NOT_TESTED
    (evidence,) = judge(ask, [*ours, *other, *runs("decef", 90.0, 91.0, 92.0, rank=1)]).evidence
    assert "against 91.00 %" in evidence.result


def test_training_of_another_name_is_no_control():
    asked = {one.id: one for one in load_claims()}
    found = [*DENSE, *runs("decef", 90.0, 91.1, 91.9, flops=0.667)]
    mine = runs("conv2d", 10.0, 11.0, 12.0, train="mine")
    assert judge(asked["fair-fight"], [*found, *mine]) == judge(asked["fair-fight"], found)


def test_every_look_has_its_share_of_the_chance_to_be_wrong():
    ours = runs("decef", 88.0, 89.7, 90.0, rank=4)
    once, twice = (judge(replace(NON_INFERIOR, looks=looks), [*DENSE, *ours]) for looks in ((), (3, 10)))
    assert [one.verdict for one in (once, twice)] == [FAILS, UNDECIDED]
    (p,) = {re.search(r"\(p = ([\d.]+)", one.evidence[0].result)[1] for one in (once, twice)}
    assert 0.025 < float(p) < 0.05


def test_seeds_beyond_a_planned_number_decide_nothing_before_the_next_is_there():
    dense = runs("conv2d", *[90.0] * 6)
    ours = runs("decef", 88.0, 89.1, 88.8, 88.1, 88.2, 88.3, rank=4)  # decidedly lower by six, not by three
    judged = {
        looks: judge(replace(NON_INFERIOR, looks=looks), [*dense, *ours]).evidence[0]
        for looks in ((), (3, 10), (3, 6), (8, 10))
    }
    assert [one.verdict for one in judged.values()] == [FAILS, UNDECIDED, FAILS, UNDECIDED]
    assert "by the first 3 seeds; " in judged[3, 10].result
    assert "by the first" not in judged[3, 6].result
    assert judged[8, 10].result.endswith("(looked at when there are 8 seeds)")


def test_what_has_one_seed_yet_counts_among_those_that_are_corrected_for():
    dense, ours = runs("conv2d", 90.0, 90.0, 90.0, 90.0), runs("decef", 88.0, 88.9, 88.8, 88.1, rank=4)
    alone = judge(NON_INFERIOR, [*dense, *ours])
    beside = judge(NON_INFERIOR, [*dense, *ours, *runs("decef", 89.9, rank=5)])
    p, corrected = (float(re.search(r"\(p = ([\d.]+)", one.evidence[0].result)[1]) for one in (alone, beside))
    assert corrected == pytest.approx(2 * p, rel=0.1)
    assert beside.words.endswith("; 1 has one seed")


def test_pairs_across_two_kinds_of_hardware_are_counted():
    dense, ours = runs("conv2d", 90.0, 91.0, 92.0), runs("decef", 90.0, 91.1, 91.9, rank=4)

    def result():
        return judge(NON_INFERIOR, [*dense, *ours]).evidence[0].result

    assert "hardware" not in result()
    ours[1].summary["machine"] = "another CPU"
    assert "1 of the pairs across two kinds of hardware" in result()
    ours[1].summary["device"] = dense[1].summary["device"] = "a GPU"  # whatever the CPU beside it
    assert "hardware" not in result()


def test_runs_of_another_precision_are_not_paired():
    ours = runs("decef", 90.0, 91.1, 91.9, rank=4, precision="fp32")
    got = judge(NON_INFERIOR, [*DENSE, *ours])
    assert got.verdict == NOT_TESTED
    assert got.words == "1 has nothing to be compared with"
    assert "3 not paired with conv2d, whose precision differs (fp32 here, bf16 there)" in got.evidence[0].result

    ours[:2] = runs("decef", 90.0, 91.1, rank=4)
    (evidence,) = judge(NON_INFERIOR, [*DENSE, *ours]).evidence
    assert "precision mixed: " in evidence.what
    assert "1 not paired with conv2d, whose precision differs (fp32 here, bf16 there)" in evidence.result
    assert "+0.05 [" in evidence.result
    assert "over 2 of the seeds" in evidence.result
    for run in ours[1:]:
        run.summary["precision"] = "bf16"
    ours[2].summary["processes"] = 8  # batch norm sees the images of one
    (evidence,) = judge(NON_INFERIOR, [*DENSE, *ours]).evidence
    assert "; 1 not paired with conv2d, whose number of processes differs" in evidence.result


def test_a_row_that_mixes_precisions_says_so():
    random_basis = next(c for c in load_claims() if c.id == "basisconv-random-basis")
    one = runs("basisconv", 72.0, 73.0, rank=9)
    (evidence,) = judge(random_basis, one).evidence
    assert "precision" not in evidence.what
    (evidence,) = judge(random_basis, [*one, record("basisconv", 2, 74.0, rank=9, precision="fp32")]).evidence
    assert evidence.what.endswith("precision mixed: 2 bf16, 1 fp32")
    assert evidence.n == 3


def test_a_seed_that_stands_twice_is_refused_by_the_names_of_both_runs():
    ours, again = runs("decef", 90.0, 91.1, rank=4), record("decef", 1, 91.2, rank=4, implementation="factorized")
    with pytest.raises(ValueError, match=rf"{ours[1].summary['id']} and {again.summary['id']} are one experiment"):
        judge(NON_INFERIOR, [*DENSE, *ours, again])
    dense = record("conv2d", 1, 91.0, precision="fp32")
    dense.summary["id"] = "elsewhere"
    with pytest.raises(ValueError, match="elsewhere are one experiment"):
        judge(NON_INFERIOR, [*DENSE, dense, *ours])


def networks(**by_name):
    """A dense network and a low-rank one for each name, at these differences in three seeds."""
    found = []
    for name, differences in by_name.items():
        found += runs("conv2d", 90.0, 91.0, 92.0, model=name)
        found += [record("decef", s, 90.0 + s + d, model=name, rank=4) for s, d in enumerate(differences)]
    return found


BETTER, WORSE, UNCLEAR = (0.0, 0.1, -0.1), (-2.0, -2.1, -1.9), (-3.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("differences", "verdict", "words"),
    [
        ([], NOT_TESTED, ""),
        ([BETTER, BETTER], HOLDS, "2 of 2 comparisons decided: 2 hold, 0 don't"),
        ([WORSE], FAILS, "1 of 1 comparison decided: 0 hold, 1 doesn't"),
        ([BETTER, WORSE], MIXED, "2 of 2 comparisons decided: 1 holds, 1 doesn't"),
        ([BETTER, WORSE, UNCLEAR], MIXED, "2 of 3 comparisons decided: 1 holds, 1 doesn't; 1 needs more seeds"),
        ([(5.0,), (5.0,)], UNDECIDED, "0 of 2 comparisons decided; 2 have one seed"),
        ([BETTER, (5.0,)], UNDECIDED, "1 of 2 comparisons decided: 1 holds, 0 don't; 1 has one seed"),
        ([WORSE, UNCLEAR], REFUTED, "1 of 2 comparisons decided: 0 hold, 1 doesn't; 1 needs more seeds"),
    ],
)
def test_comparisons_are_summed_up_and_counted(differences, verdict, words):
    got = judge(NON_INFERIOR, networks(**{f"net{i}": d for i, d in enumerate(differences)}))
    assert (got.verdict, got.words) == (verdict, words)
    assert got.open == (verdict in (NOT_TESTED, UNDECIDED, REFUTED))


def test_one_that_holds_among_many_undecided_is_no_holding_in_part():
    exact = (0.001, 0.0, -0.001)
    got = judge(NON_INFERIOR, networks(good=exact, **{f"net{i}": UNCLEAR for i in range(8)}))
    assert Counter(e.verdict for e in got.evidence) == {HOLDS: 1, UNDECIDED: 8}
    assert got.verdict == UNDECIDED
    assert got.words == "1 of 9 comparisons decided: 1 holds, 0 don't; 8 need more seeds"
    page = markdown([(NON_INFERIOR, got)])
    assert f"| [test](#test) | a statement | too few seeds to say | {got.words} |" in page
    assert "in part" not in page


def test_many_comparisons_ask_more_of_each():
    close = (-0.1, 0.1, 0.3)  # p = 0.035 against -0.5
    alone = judge(NON_INFERIOR, networks(net=close))
    assert alone.verdict == HOLDS
    assert "(p = 0.035)" in alone.evidence[0].result
    among = judge(NON_INFERIOR, networks(net=close, other=UNCLEAR))
    assert [e.verdict for e in among.evidence] == [UNDECIDED, UNDECIDED]
    assert "(p = 0.07; about 4 seeds needed)" in among.evidence[0].result
    # Holm, not Bonferroni: what is beyond doubt makes it no harder for the other.
    assert judge(NON_INFERIOR, networks(net=close, other=(0.001, 0.0, -0.001))).verdict == HOLDS


def test_the_seeds_that_a_decision_would_need():
    close = (-0.6, 0.2, 0.3)
    (evidence,) = judge(NON_INFERIOR, networks(net=close)).evidence
    expected = seeds_needed(close, -0.5)
    assert expected > 3
    assert f"; about {expected} seeds needed)" in evidence.result
    (evidence,) = judge(NON_INFERIOR, networks(net=UNCLEAR)).evidence
    assert "; more than 50 seeds needed)" in evidence.result


def test_a_control_that_differs_in_the_training():
    atcd = next(c for c in load_claims() if c.id == "atcd-better")
    plain = runs("rank1", 80.0, 81.0, 82.0, rank=1)
    better = runs("rank1", 81.0, 82.1, 82.9, rank=1, atcd="epoch")
    worse = runs("rank1", 79.0, 80.1, 80.9, rank=1, atcd=1)
    separate = runs("rank1", 10.0, 10.0, 10.0, rank=1, separate_init=True)
    assert judge(atcd, [*plain, *better, *separate]).verdict == HOLDS
    assert judge(atcd, [*plain, *worse]).verdict == FAILS
    assert judge(atcd, [*plain, *worse, *better]).verdict == HOLDS  # one reading of the method will do
    assert judge(atcd, [*plain, *runs("rank1", 80.0, 81.0, 82.0, rank=1, atcd=1)]).verdict == UNDECIDED
    assert judge(atcd, plain).verdict == NOT_TESTED
    assert judge(atcd, [*plain, *better, *runs("rank1", 99.0, rank=1, decay="kernel")]).verdict == HOLDS
    vague = claim(kind="non_inferior", runs={"layer.name": "decef"}, control={"layer.name": "rank1"}, margin=0)
    with pytest.raises(ValueError, match=r"claim test: both .* narrow it"):
        judge(vague, [*runs("decef", 80.0, rank=1), *plain, *separate])


@pytest.mark.parametrize(
    ("trained", "control", "verdict"),
    [
        ([80.0, 81.0, 82.0], [10.0, 10.1, 9.9], HOLDS),
        ([80.0, 81.0, 82.0], [75.0, 76.0, 77.0], FAILS),  # it trains, and so does what can't be
        ([80.0, 81.0, 82.0], [10.0, 10.0, 40.0], UNDECIDED),
        ([80.0, 81.0, 82.0], [10.0], ONE_SEED),
        ([80.0, 81.0, 82.0], [], NOT_TESTED),
        ([12.0, 13.0, 14.0], [10.0, 10.1, 9.9], FAILS),
        ([12.0, 90.0, 14.0], [10.0, 10.1, 9.9], UNDECIDED),
        ([80.0], [10.0, 10.1, 9.9], ONE_SEED),
    ],
)
@pytest.mark.parametrize("which", ["rank1-trains", "rank1-initialisation"])
def test_trains(which, trained, control, verdict):
    ours = {"separate_init": True, "atcd": 1} if which == "rank1-trains" else {"separate_init": False}
    trains, options = next(c for c in load_claims() if c.id == which), {"rank": 1, "model": "plain"}
    chain = runs("rank1", *control, separate_init=True, **options)
    got = judge(trains, [*runs("rank1", *trained, **ours, **options), *chain])
    assert [e.verdict for e in got.evidence] == [verdict]
    assert got.verdict == (UNDECIDED if verdict == ONE_SEED else verdict)
    words = "no run of `" if verdict == NOT_TESTED else "; `"
    assert f"{words}layer=rank1 layer.rank=1 layer.separate_init=true train.atcd=null`" in got.evidence[0].result


def test_method_and_initialisation_are_judged_by_themselves():
    by_id, options = {c.id: c for c in load_claims()}, {"rank": 1, "model": "plain"}
    chain = runs("rank1", 10.0, 10.1, 9.9, separate_init=True, **options)
    both = runs("rank1", 80.0, 81.0, 82.0, separate_init=False, atcd=1, **options)  # another start, another training
    for which in ("rank1-trains", "rank1-initialisation"):
        assert judge(by_id[which], [*chain, *both]).verdict == NOT_TESTED
    method = runs("rank1", 10.0, 10.2, 9.9, separate_init=True, atcd=1, **options)
    start = runs("rank1", 80.0, 81.0, 82.0, separate_init=False, **options)
    assert judge(by_id["rank1-trains"], [*chain, *both, *method, *start]).verdict == FAILS
    assert judge(by_id["rank1-initialisation"], [*chain, *both, *method, *start]).verdict == HOLDS


def test_a_control_that_ran_with_both_decays_is_that_of_the_default():
    options = {"rank": 1, "separate_init": True, "model": "plain"}
    chain = runs("rank1", 10.0, 10.1, 9.9, **options)
    other = runs("rank1", 80.0, 80.1, 79.9, decay="kernel", **options)
    method = runs("rank1", 80.0, 81.0, 82.0, atcd=1, **options)
    trains = next(c for c in load_claims() if c.id == "rank1-trains")
    assert judge(trains, [*chain, *other, *method]).verdict == judge(trains, [*chain, *method]).verdict == HOLDS


def test_a_control_of_several_experiments_is_one_comparison():
    trains, options = next(c for c in load_claims() if c.id == "rank1-trains"), {"rank": 1, "model": "plain"}
    chain = runs("rank1", 9.0, 10.0, 11.5, separate_init=True, **options)
    ours = [runs("rank1", 98.9, 99.0, 99.1, separate_init=True, atcd=atcd, **options) for atcd in (1, "epoch")]
    alone, both = judge(trains, [*chain, *ours[0]]), judge(trains, [*chain, *ours[0], *ours[1]])
    assert "(p = 0.022)" in alone.evidence[0].result
    assert all("(p = 0.022)" in e.result for e in both.evidence)


def test_trains_without_a_control():
    random_basis = next(c for c in load_claims() if c.id == "basisconv-random-basis")
    assert judge(random_basis, runs("basisconv", 72.0, 73.0, 74.0, rank=9)).verdict == HOLDS
    assert judge(random_basis, runs("basisconv", 72.0, 73.0, 74.0, rank=9, train_basis=True)).verdict == NOT_TESTED


@pytest.mark.parametrize(
    ("top1", "verdict"),
    [
        ((), NOT_TESTED),
        ((93.0,), UNDECIDED),
        ((92.9, 93.0, 93.1), HOLDS),
        ((91.9, 92.0, 92.1), FAILS),
        ((92, 93, 94), UNDECIDED),
    ],
)
def test_reaches(top1, verdict):
    figure, cost = (published_value(metric=metric, value=value) for metric, value in (("top1", 92.95), ("params", 1e3)))
    other = runs("decef", 50.0, 51.0, rank=3)
    ask = claim([figure, cost], kind="reaches", runs={"layer.name": "decef"}, tolerance=0.3)
    got = judge(ask, [*runs("decef", *top1, rank=4), *other])
    assert got.verdict == verdict
    assert all("X1 has 92.95 %" in e.result for e in got.evidence)


def published_value(**options):
    where = {"paper": "ours", "layer": "decef", "network": "resnet20", "dataset": "cifar10", "where": "", "status": ""}
    return Published(**{**where, "id": "X1", "metric": "top1", "setting": "rank 4", "value": 92.95, **options})


def test_dense_runs_of_any_training_decide_no_low_rank_claim():
    dense = [run for model in ("resnet56", "rank1net") for run in runs("conv2d", 93.3, 93.2, 93.1, model=model)]
    for one in load_claims():
        if one.asks["kind"] == "reaches":
            epochs = one.asks["runs"]["train.epochs"]
            trained = [
                replace(r, config=replace(r.config, train=replace(r.config.train, epochs=epochs))) for r in dense
            ]
            assert judge(one, trained).verdict == NOT_TESTED, one.id
            if one.id == "basisconv-resnet56":  # these would decide it, but for the layer type
                loose = replace(one, asks={**one.asks, "runs": {"train.epochs": epochs}})
                assert judge(loose, trained).verdict != NOT_TESTED
        elif one.id == "rank1-cifar10":
            assert judge(one, dense).verdict == NOT_TESTED


def test_a_best_epoch_is_compared_with_best_epochs():
    best = published_value(metric="top1_best")
    ask = claim([best], kind="reaches", runs={"layer.name": "decef", "train.epochs": 48}, tolerance=0.3)
    found = [
        replace(run, metrics=({"test_top1": peak}, {"test_top1": run.top1}))
        for run, peak in zip(runs("decef", 50.0, 51.0, 52.0, rank=4), (92.9, 93.0, 93.1), strict=True)
    ]
    got = judge(ask, found)
    assert got.verdict == HOLDS
    assert "93.00 % [92.75, 93.25] in the best epoch" in got.evidence[0].result
    other = claim([best], kind="reaches", runs={"layer.name": "decef", "train.epochs": 10}, tolerance=0.3)
    assert judge(other, found).verdict == NOT_TESTED
    assert judge(ask, [replace(run, metrics=()) for run in found]).verdict == NOT_TESTED  # whose epochs are lost


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([BETTER, WORSE], HOLDS),
        ([BETTER, UNCLEAR], HOLDS),
        ([WORSE, UNCLEAR], UNDECIDED),
        ([WORSE, WORSE], FAILS),
        ([], NOT_TESTED),
    ],
)
def test_a_claim_that_something_can_be_holds_if_any_experiment_does(differences, verdict):
    found = networks(**{f"net{i}": d for i, d in enumerate(differences)})
    some = replace(NON_INFERIOR, holds_if="any")
    assert judge(some, found).verdict == verdict
    assert "in some experiment" in asks_words(some)
    assert "in some experiment" not in asks_words(NON_INFERIOR)


def test_no_interval_goes_beyond_what_is_possible():
    sure = judge(claim(kind="trains", runs={"layer.name": "decef"}, at_least=50), runs("decef", 96.0, 98.0, 99.9))
    assert ", 100.00]" in sure.evidence[0].result


def ranks(threshold, init, network="resnet20"):
    layers = range(len(threshold))
    shape = {"name": [f"conv{i}" for i in layers], "in_channels": 16, "out_channels": [16 * 2**i for i in layers]}
    return pd.DataFrame({**shape, "threshold": threshold, "threshold_init": init, "network": network})


FALLING, RISING, RANDOM = [5.0, 4.5, 3.0, 2.9], [2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0]


def origins(names, md5=None):
    """What scripts/ranks.py leaves beside tables: each of a known network of its own, or all of one file."""
    known = {f"{i:032x}": "resnet20" for i in range(9)}
    found = {
        name: {"network": "resnet20", "weights": f"weights.th (MD5 {md5 or key})"}
        for name, key in zip(names, known, strict=False)
    }
    return known, found


@pytest.mark.parametrize(
    ("tables", "verdicts", "overall"),
    [
        ([], [], NOT_TESTED),
        ([ranks(FALLING, RANDOM)], [ONE_SEED], UNDECIDED),
        ([ranks(FALLING, RANDOM)] * 8, [HOLDS], HOLDS),
        ([ranks(RISING, [6.0, 6.1, 6.2, 6.3])] * 8, [FAILS], FAILS),
        ([ranks([5.0] * 4, [6.0] * 4)] * 3, [UNDECIDED], UNDECIDED),  # without a correlation
        ([ranks(RISING, [2.0, 4.0, 7.0, 15.0])] * 8, [FAILS], FAILS),  # rises, but less than random kernels' do
        ([ranks(FALLING, RANDOM)] * 2 + [ranks(RISING, RANDOM)], [UNDECIDED], UNDECIDED),
    ],
)
def test_ranks_over_depth(tmp_path, monkeypatch, tables, verdicts, overall):
    (tmp_path / "ranks").mkdir()
    known, made = origins([f"run{i}" for i in range(len(tables))])
    monkeypatch.setattr(findings, "load_known_weights", lambda: known)
    for i, table in enumerate(tables):
        table.to_csv(tmp_path / "ranks" / f"run{i}.csv", index=False)
        (tmp_path / "ranks" / f"run{i}.json").write_text(json.dumps(made[f"run{i}"]))
    got = judge(claim(kind="monotone_rank", over="depth"), [], load_measurements(tmp_path))
    assert [e.verdict for e in got.evidence] == verdicts
    assert got.verdict == overall
    assert all(e.n == len(tables) for e in got.evidence)


def test_ranks_are_judged_by_each_definition():
    falls = ranks(FALLING, RANDOM)
    both = falls.assign(entropy=RISING, entropy_init=[6.0, 6.1, 6.2, 6.3])
    dense = runs("conv2d", *[90.0] * 8)
    got = judge(claim(kind="monotone_rank", over="depth"), dense, Measurements({run.id: both for run in dense}))
    found = {e.what: e.verdict for e in got.evidence}
    assert found == {
        "resnet20, 4 convolutions, schedule standard, threshold rank": HOLDS,
        "resnet20, 4 convolutions, schedule standard, entropy rank": FAILS,
    }
    assert got.verdict == MIXED


def test_definitions_that_agree_are_tests_of_their_own():
    """Holm's method counts them: one more definition with the same ranks makes the claim no easier."""
    falls = ranks(FALLING, RANDOM)
    both = falls.assign(energy=FALLING, energy_init=RANDOM)
    dense = runs("conv2d", *[90.0] * 8)

    def p_values(table):
        got = judge(claim(kind="monotone_rank", over="depth"), dense, Measurements({run.id: table for run in dense}))
        return [float(p) for e in got.evidence for p in re.findall(r"p = ([0-9.e-]+)", e.result)]

    alone, together = p_values(falls), p_values(both)
    assert [2 * p for p in alone] * 2 == pytest.approx(together, rel=0.05)  # as they are printed


def test_networks_of_other_data_or_training_are_no_further_seeds():
    dense = [record("conv2d", seed, 90.0) for seed in range(3)]
    dense += [
        record("conv2d", 3, 90.0, dataset={"name": "svhn"}),
        record("conv2d", 4, 90.0, dataset={"train_size": 100}),
    ]
    table = ranks(FALLING, RANDOM)
    made = {dense[0].id: {"threshold": 0.5}, **{run.id: {"threshold": 0.3} for run in dense[1:]}}
    tables = findings.dense_ranks(dense, Measurements({run.id: table for run in dense}, {}, made))
    assert sorted(len(group) for group in tables.values()) == [1, 1, 1, 2]
    assert "resnet20, 4 convolutions, schedule standard" in tables


def test_rank_tables_of_unknown_origin_are_no_evidence(tmp_path, caplog):
    ask, weights = claim(kind="monotone_rank", over="depth"), tmp_path / "resnet20.th"
    weights.write_bytes(b"nobody knows these")
    (tmp_path / "ranks").mkdir()
    dense, decef = record("conv2d", 0, 90.0), record("decef", 0, 90.0, rank=4)
    md5 = next(md5 for md5, network in load_known_weights().items() if network == "resnet20")
    tables = {
        "random": {"network": "resnet20", "weights": None},
        "unknown": {"network": "resnet20", "weights": describe_file(weights)},
        "renamed": {"network": "resnet56", "weights": f"resnet20.th (MD5 {md5})"},
        "broken": None,
        "alone": None,
        "trained": {"network": "resnet20", "weights": f"resnet20.th (MD5 {md5})"},
        "trained2": {"network": "resnet20", "weights": f"copy.th (MD5 {md5})"},
        dense.id: {"network": "somewhere/runs/it", "weights": None},
        decef.id: {"network": "somewhere/runs/it", "weights": None},
    }
    for name, made in tables.items():
        ranks(FALLING, RANDOM).to_csv(tmp_path / "ranks" / f"{name}.csv", index=False)
        if name != "alone":
            (tmp_path / "ranks" / f"{name}.json").write_text(json.dumps(made) if made else "{broken")
    got = judge(ask, [dense, decef], load_measurements(tmp_path))
    trained = {e.what: e.runs for e in got.evidence}
    assert trained == {  # two trainings are no two seeds
        "resnet20, 4 convolutions, schedule standard, threshold rank": (f"ranks/{dense.id}.csv",),
        "resnet20, 4 convolutions, trained by others, threshold rank": ("ranks/trained.csv",),
    }
    for name in ("random", "unknown", "renamed", "broken", "alone"):
        assert f"ranks/{name}.csv is of unknown origin" in caplog.text
    assert "ranks/trained2.csv is of the same network as ranks/trained.csv" in caplog.text
    assert decef.id not in caplog.text  # known, and no dense network
    unfinished = judge(ask, [], load_measurements(tmp_path))
    assert unfinished.evidence[0].runs == ("ranks/trained.csv",)


def test_ranks_over_training_and_of_dense_networks_alone():
    ask = claim(kind="monotone_rank", over="training")

    def training(*steps):
        return pd.concat([ranks([9 - s] * 4, RANDOM, f"epoch {2 * i + 1}") for i, s in enumerate(steps)])

    settling, wandering = training(0, 4, 6, 7, 7.5), training(0, 0.5, 1.5, 3.5, 7.5)
    dense = runs("conv2d", *[90.0] * 6)

    def verdict(*tables, of=dense):
        names = [run.id for run in of]
        return judge(ask, of, Measurements(dict(zip(names, tables, strict=False)))).verdict

    assert verdict(*[settling] * 6) == HOLDS
    assert verdict(*[wandering] * 6) == FAILS
    assert verdict(settling) == verdict(settling, settling) == UNDECIDED
    assert verdict(ranks(FALLING, RANDOM)) == NOT_TESTED  # one checkpoint
    assert verdict(settling, settling, of=runs("decef", 90.0, 91.0)) == NOT_TESTED


# Figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_of_its_task_alone():
    def tile(name, **options):
        return record("cpac", 0, 93.0, model="cpacnet", rank=2, dataset={"name": name, **options})

    figures = [f for f in load_published() if f.dataset == "magnetic_tile_masks" and f.metric == "top1"]
    assert {f.id for f in figures} == {"C12", "C13", "C14"}
    assert {f.id for f in figures if f.fits(tile("magnetic_tile_masks"))} == {"C12", "C14"}
    assert not any(f.fits(tile("magnetic_tile_masks", train_size=50)) for f in figures)
    assert not any(f.fits(tile("magnetic_tile", as_published=True)) for f in figures)  # photographs
    assert all("on magnetic_tile_masks, " in line for line in published_lines(figures))

    mnist = [f for f in load_published() if f.id == "C8"]
    whole, part = (
        record("cpac", 0, 96.0, model="cpacnet", rank=2, dataset={"name": "mnist", "split_test": split_test})
        for split_test in (False, True)
    )
    assert [f.setting for f in mnist if f.fits(whole)] == ["rank 2"]
    assert not any(f.fits(part) for f in mnist)
    ask = claim(mnist, kind="reaches", runs={"layer.name": "cpac"}, tolerance=1)
    assert [e.runs for e in judge(ask, [whole, part]).evidence] == [(whole.id,)]


# claims.yaml ------------------------------------------------------------------------------------------------------


def test_every_claim_can_be_judged_and_told():
    assert len(load_claims()) >= 14
    for one in load_claims():
        assert judge(one, []).verdict == NOT_TESTED
        assert asks_words(one)
        assert one.experiment


def test_only_what_was_read_is_there():
    text = "".join((ROOT / "decef" / "results" / name).read_text() for name in ("claims.yaml", "published.yaml"))
    ids = {figure.id for figure in load_published()}
    assert {"1f38c81cdebd6bcce9b03d082161a36c", "48a2383e717f38f02934658ab8d4d9a2"} <= set(load_known_weights())
    assert {"A1", "D8", "B5", "B12", "B21", "C10", "C13", "R12", "R13"} <= ids
    assert not ids & set(NOT_READ)
    assert {figure.id for one in load_claims() for figure in one.published} <= ids
    assert "recalled" not in text.lower()
    assert {figure.status for figure in load_published()} == {"verified", "verified-code"}


def test_figures_agree_with_each_other():
    by = {(f.id, f.dataset, f.network, f.metric, f.setting): f.value for f in load_published()}
    b12 = {metric: by["B12", "cifar10", "resnet56", metric, "energy 0.63"] for metric in ("flops", "params")}
    share = by["B12", "cifar10", "resnet56", "flops_ratio", "energy 0.63"]
    assert b12["flops"] / share == pytest.approx(2 * 125_485_056, rel=1e-3)
    assert b12["params"] == pytest.approx(
        848_304 * by["B12", "cifar10", "resnet56", "params_ratio", "energy 0.63"], abs=5e3
    )
    for rank in range(1, 7):  # 8 filters of 3 x 3 on one channel
        assert by["C15", "mnist", "cpacnet", "params_ratio", f"rank {rank}"] == pytest.approx(
            15 * rank / 72, abs=0.0051
        )
    for figure in load_published():
        if figure.metric.startswith("top1"):
            assert (figure.layer == "conv2d") == (figure.setting == "dense")
            assert 0 < figure.value < 100


def test_selectors_name_config_keys_that_there_are():
    known = {
        f"{p.parent.name}.{key}" for p in (ROOT / "configs").glob("*/*.yaml") for key in yaml.safe_load(p.read_text())
    }
    for one in load_claims():
        for selector in (one.asks.get("runs", {}), one.asks.get("control", {})):
            assert set(selector) <= known, one.id


def test_commands_that_need_nothing_are_accepted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from cli import check_arguments

    ready = [shlex.split(one.experiment) for one in load_claims() if "<" not in one.experiment]
    assert len(ready) >= 5
    for command in ready:
        assert command[:2] == ["python", "scripts/train.py"]
        check_arguments(command[2:])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("published: [B12, B21]", "published: [B12, B99]", "basisconv-resnet56 has published value 'B99'"),
        ("kind: trains", "kind: train", "has kind 'train'; there are non_inferior"),
        ("flops: [0.15, 0.2]", "flop: [0.15, 0.2]", "has argument 'flop'; there are"),
        ("over: depth", "over: dept", "has over 'dept'; there are depth, training"),
        ("      control_at_most: 15\n", "", "has only one of control and control_at_most"),
        ("looks: [2, 3]", "looks: [3, 2]", r"rank1-cifar10 has looks \[3, 2\]: numbers of seeds, from 2 on, must rise"),
        ("looks: [2, 3]", "looks: [1, 3]", r"rank1-cifar10 has looks \[1, 3\]: numbers of seeds, from 2 on, must rise"),
        ("holds_if: any", "holds_if: some", "has holds_if 'some'; there are all, any"),
        ("layer.name: rank1", "layer.nmae: rank1", "selects by 'layer.nmae', which is no setting of a run"),
        ("margin: 0.5", "margn: 0.5", "missing a required argument: 'margin'"),
        ("paper: atcd", "paper: actd", "atcd-better has paper 'actd'"),
        ("- id: atcd-better", "- id: fair-fight", "fair-fight stands there twice"),
        ("status: verified,", "status: recalled,", "A1 has status 'recalled'"),
        ("values: {dense: 91.73}", "values: {dense: none}", "A1 cannot be read"),
        ("{network: resnet20, source", "{net: resnet20, source", "its weights cannot be read: 'network'"),
        (
            "    note: of the same runs",
            "    notes: of the same runs",
            "claim cpac-significance-product cannot be read",
        ),
    ],
)
def test_mistakes_in_the_files_are_named(monkeypatch, old, new, message):
    changed = 0
    for module, name in ((claims, "claims.yaml"), (published, "published.yaml")):
        text = (ROOT / "decef" / "results" / name).read_text()
        changed += old in text
        content = yaml.safe_load(text.replace(old, new, 1))
        monkeypatch.setattr(module, "_read", lambda content=content: content)
    assert changed == 1
    monkeypatch.setattr(claims, "load_published", load_published.__wrapped__)
    read = load_known_weights if "weights" in message else load_claims
    with pytest.raises(ValueError, match=message):
        read.__wrapped__()


def test_the_page_is_the_same_whatever_the_order_of_the_runs():
    records = [*DENSE_5, *OURS_5, *runs("cpac", 89.0, 90.0, 91.0, rank=4)]
    pages = [markdown([(c, judge(c, order)) for c in load_claims()]) for order in (records, records[::-1])]
    assert pages[0] == pages[1]
    assert "| holds |" in pages[0]
    assert "verdict: **holds** (1 of 1 comparison decided: 1 holds, 0 don't)" in pages[0]
    assert "-1.00" in pages[0]


def test_the_command_line_writes_the_same_bytes_twice(tmp_path, monkeypatch, capsys):
    for run in [*DENSE_5, *OURS_5]:
        folder = tmp_path / "runs" / run.id
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(recorded(run.config)))
        (folder / "summary.json").write_text(json.dumps(run.summary | {"status": "finished"}))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr("sys.argv", ["claims.py", "--results", str(tmp_path)])
    pages = []
    for _ in range(2):
        runpy.run_path(str(ROOT / "scripts" / "claims.py"), run_name="__main__")
        pages.append((tmp_path / "CLAIMS.md").read_bytes())
    assert pages[0] == pages[1]
    assert b"**holds**" in pages[0]
    assert str(tmp_path).encode() not in pages[0]
    assert "decef-two-thirds-resnet      holds" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["claims.py", "--results", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "scripts" / "claims.py"), run_name="__main__")
    assert "is no folder of results: train something first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [([[0.1, 0.2, 0.3]] * 6, HOLDS), ([[0.3, 0.2, 0.1]] * 6, FAILS), ([[0.1, 0.2, 0.3]], UNDECIDED)],
)
def test_significance_by_what_removal_costs(rises, verdict):
    records, tables = runs("cpac", *[90.0] * len(rises), rank=3), {}
    for found, rise in zip(records, rises, strict=True):
        table = {"layer": "conv1", "component": [0, 1, 2], "product": [1.0, 2.0, 3.0], "loss_rise": rise}
        tables[found.id] = pd.DataFrame(table)
    got = judge(claim(kind="significance", measure="product"), records, Measurements(significance=tables))
    assert got.verdict == verdict
    assert judge(claim(kind="significance", measure="product"), records).verdict == NOT_TESTED
