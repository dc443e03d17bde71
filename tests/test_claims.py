"""Claims: every kind and verdict on made-up runs, and what claims.yaml may hold."""

import json
import runpy
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

import decef.claims as claims
from decef.claims import (
    FAILS,
    HOLDS,
    IN_PART,
    INCONCLUSIVE,
    NOT_TESTED,
    ONE_SEED,
    Claim,
    Figure,
    judge,
    load_claims,
    load_figures,
    load_measured,
)
from decef.claims_text import asks_words, markdown
from decef.tables import Record

ROOT = Path(__file__).parents[1]
#: What the project's notes on the papers have as derived, recalled or unknown: not to be printed as anybody's figure.
NOT_READ = [
    *(f"D{i}" for i in range(15, 24)),
    *("B13", "B14", *(f"B{i}" for i in range(29, 36))),
    *("C17", "C18", "C19", "C20"),
    *(f"R{i}" for i in range(16, 25)),
]


def record(layer, seed, top1, *, flops=0.66, params=0.64, model="resnet20", train="quick", atcd=None, **options):
    if layer == "conv2d":
        flops = params = 1
    dense = {"params": 1000, "trainable_params": 1000, "flops": 9000}
    training = {"name": train, "epochs": 9} | ({"atcd": atcd} if atcd else {})
    name = "-".join(map(str, [layer, model, train, atcd, *options.values(), flops, f"s{seed}"]))
    config = {
        "dataset": {"name": "cifar10"},
        "model": {"name": model, "shortcut": "A", "dense_stem": True},
        "layer": {"name": layer, **options},
        "train": training,
        "seed": seed,
    }
    summary = {"id": name, "test_top1": top1, "dense": dense, "flops": 9000 * flops}
    return Record(config, summary | {"params": 1000 * params, "trainable_params": 1000 * params})


def runs(layer, *top1, **options):
    return [record(layer, seed, value, **options) for seed, value in enumerate(top1)]


def claim(figures=(), **asks):
    return Claim("test", "ours", "a statement", "nowhere", asks, "a command", figures)


NO_WORSE = claim(kind="no_worse", runs={"dataset.name": "cifar10", "layer.name": "decef"}, flops=[0.6, 0.7], margin=0.5)
DENSE = runs("conv2d", 90.0, 91.0, 92.0)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([], NOT_TESTED),
        ([90.0], ONE_SEED),
        ([10.0], ONE_SEED),  # however far off
        ([90.0, 91.1, 91.9], HOLDS),
        ([95.0, 96.1, 96.9], HOLDS),
        ([88.0, 89.1, 89.9], FAILS),
        ([89.4, 90.6, 91.4], INCONCLUSIVE),  # -0.53 on average, and the interval spans -0.5
        ([87.0, 91.0, 95.0], INCONCLUSIVE),  # no loss on average, but what a spread
    ],
)
def test_no_worse(ours, verdict):
    got = judge(NO_WORSE, [*DENSE, *runs("decef", *ours, flops=0.667, rank=4)])
    assert got.verdict == verdict
    if len(ours) == 3:
        (evidence,) = got.evidence
        assert evidence.n == 3
        assert len(evidence.runs) == 6
        assert f"{sum(ours) / 3 - 91:+.2f} [" in evidence.result
        assert "against 91.00 % [88.52, 93.48] of conv2d" in evidence.result


def test_runs_are_paired_by_seed_and_compared_with_their_twins_alone():
    far = [record("conv2d", 0, 50.0, model="resnet56"), record("conv2d", 0, 50.0, train="paper")]
    ours = runs("decef", 89.0, 90.1, 90.9, 99.0, 99.0, rank=4)  # two seeds that Conv2d lacks would hide the loss
    (evidence,) = judge(NO_WORSE, [*far, *ours, *DENSE]).evidence
    assert evidence.verdict == FAILS
    assert "-1.00 [" in evidence.result
    assert "over 3 of the seeds" in evidence.result
    (lonely,) = judge(NO_WORSE, [*far, *ours]).evidence
    assert lonely.verdict == NOT_TESTED
    assert "no run of conv2d" in lonely.result


def test_runs_of_other_costs_layers_and_data_are_no_evidence():
    small, other = runs("decef", 1.0, 1.1, 1.2, flops=0.2), runs("cpac", 1.0, 1.1, 1.2)
    elsewhere = runs("decef", 1.0, 1.1, 1.2)
    for run in elsewhere:
        run.config["dataset"] = {"name": "digits"}
    assert judge(NO_WORSE, [*DENSE, *small, *other, *elsewhere]) == claims.Verdict(NOT_TESTED)


def test_networks_are_summed_up():
    good = [*DENSE, *runs("decef", 90.0, 91.1, 91.9, rank=4)]
    bad = [*runs("conv2d", 93.0, 94.0, model="resnet56"), *runs("decef", 90.0, 91.1, model="resnet56", rank=4)]
    once = [record("conv2d", 0, 93.0, model="resnet32"), record("decef", 0, 93.0, model="resnet32", rank=4)]
    assert judge(NO_WORSE, good + bad).verdict == IN_PART
    assert judge(NO_WORSE, good + once).verdict == IN_PART
    assert judge(NO_WORSE, bad + once).verdict == FAILS
    assert [e.verdict for e in judge(NO_WORSE, bad + once + good).evidence] == [HOLDS, ONE_SEED, FAILS]


def test_a_control_that_differs_in_the_training():
    atcd = next(c for c in load_claims() if c.id == "atcd-better")
    plain = runs("rank1", 80.0, 81.0, 82.0, rank=1)
    better = runs("rank1", 81.0, 82.1, 82.9, rank=1, atcd="epoch")
    worse = runs("rank1", 79.0, 80.1, 80.9, rank=1, atcd=1)
    separate = runs("rank1", 10.0, 10.0, 10.0, rank=1, separate_init=True)
    assert judge(atcd, [*plain, *better, *separate]).verdict == HOLDS
    assert judge(atcd, [*plain, *worse]).verdict == FAILS
    assert judge(atcd, [*plain, *worse, *better]).verdict == IN_PART
    assert judge(atcd, [*plain, *runs("rank1", 80.0, 81.0, 82.0, rank=1, atcd=1)]).verdict == INCONCLUSIVE
    assert judge(atcd, plain).verdict == NOT_TESTED
    twice = runs("rank1", 80.0, rank=1, implementation="factorized")
    with pytest.raises(ValueError, match="atcd-better's control: narrow"):
        judge(atcd, [*plain, *better, *twice])


@pytest.mark.parametrize(
    ("composed", "chain", "verdict"),
    [
        ([80.0, 81.0, 82.0], [10.0, 10.1, 9.9], HOLDS),
        ([80.0, 81.0, 82.0], [75.0, 76.0, 77.0], IN_PART),  # it trains, and so does what can't be
        ([80.0, 81.0, 82.0], [10.0, 10.0, 40.0], INCONCLUSIVE),
        ([80.0, 81.0, 82.0], [10.0], ONE_SEED),
        ([80.0, 81.0, 82.0], [], NOT_TESTED),
        ([12.0, 13.0, 14.0], [10.0, 10.1, 9.9], FAILS),
        ([12.0, 90.0, 14.0], [10.0, 10.1, 9.9], INCONCLUSIVE),
        ([80.0], [10.0, 10.1, 9.9], ONE_SEED),
    ],
)
def test_trains(composed, chain, verdict):
    trains = next(c for c in load_claims() if c.id == "rank1-trains")
    options = {"rank": 1, "model": "plain"}
    records = [*runs("rank1", *composed, **options), *runs("rank1", *chain, separate_init=True, **options)]
    assert judge(trains, records).verdict == verdict


def test_trains_without_a_control():
    random_basis = next(c for c in load_claims() if c.id == "basisconv-random-basis")
    assert judge(random_basis, runs("basisconv", 72.0, 73.0, 74.0, rank=9)).verdict == HOLDS
    assert judge(random_basis, runs("basisconv", 72.0, 73.0, 74.0, rank=9, train_basis=True)).verdict == NOT_TESTED


@pytest.mark.parametrize(
    ("top1", "verdict"),
    [
        ((), NOT_TESTED),
        ((93.0,), ONE_SEED),
        ((92.9, 93.0, 93.1), HOLDS),
        ((91.9, 92.0, 92.1), FAILS),
        ((92, 93, 94), INCONCLUSIVE),
    ],
)
def test_reaches(top1, verdict):
    where = {"paper": "ours", "layer": "decef", "network": "resnet20", "dataset": "cifar10", "where": "", "status": ""}
    figure = Figure(id="X1", metric="top1", setting="rank 4", value=92.95, **where)
    cost = Figure(id="X1", metric="params", setting="rank 4", value=1000, **where)
    other = runs("decef", 50.0, 51.0, rank=3)
    got = judge(claim([figure, cost], kind="reaches", tolerance=0.3), [*runs("decef", *top1, rank=4), *other])
    assert got.verdict == verdict
    assert all("X1 has 92.95 %" in e.result for e in got.evidence)


def ranks(threshold, init, network="resnet20"):
    layers = range(len(threshold))
    shape = {"name": [f"conv{i}" for i in layers], "in_channels": 16, "out_channels": [16 * 2**i for i in layers]}
    return pd.DataFrame({**shape, "threshold": threshold, "threshold_init": init, "network": network})


FALLING, RISING, RANDOM = [5.0, 4.5, 3.0, 2.9], [2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(
    ("tables", "verdict"),
    [
        ([], NOT_TESTED),
        ([ranks(FALLING, RANDOM)], ONE_SEED),
        ([ranks(FALLING, RANDOM)] * 3, HOLDS),
        ([ranks(RISING, [6.0, 6.1, 6.2, 6.3])] * 3, FAILS),
        ([ranks(RISING, [2.0, 4.0, 7.0, 15.0])] * 3, IN_PART),  # rises, but less than random kernels' do
        ([ranks(FALLING, RANDOM)] * 2 + [ranks(RISING, RANDOM)], INCONCLUSIVE),
    ],
)
def test_ranks_over_depth(tmp_path, tables, verdict):
    (tmp_path / "ranks").mkdir()
    for i, table in enumerate(tables):
        table.to_csv(tmp_path / "ranks" / f"run{i}.csv", index=False)
    got = judge(claim(kind="monotone_rank", over="depth"), [], load_measured(tmp_path))
    assert got.verdict == verdict
    assert [e.n for e in got.evidence] == ([len(tables)] if tables else [])


def test_ranks_over_training_and_of_dense_networks_alone():
    ask = claim(kind="monotone_rank", over="training")

    def training(*steps):
        return pd.concat([ranks([9 - s] * 4, RANDOM, f"epoch {2 * i + 1}") for i, s in enumerate(steps)])

    settling, wandering = training(0, 4, 6, 7, 7.5), training(0, 0.5, 1.5, 3.5, 7.5)

    def verdict(records, **tables):
        return judge(ask, records, {"ranks": tables}).verdict

    assert verdict([], a=settling, b=settling) == HOLDS
    assert verdict([], a=wandering, b=wandering) == FAILS
    assert verdict([], a=settling) == ONE_SEED
    assert verdict([], a=ranks(FALLING, RANDOM)) == NOT_TESTED  # one checkpoint
    factorised = record("decef", 0, 90.0)
    assert verdict([factorised], **{factorised.summary["id"]: settling}) == NOT_TESTED


# claims.yaml ------------------------------------------------------------------------------------------------------


def test_every_claim_can_be_judged_and_told():
    assert len(load_claims()) >= 14
    for one in load_claims():
        assert judge(one, []).verdict == NOT_TESTED
        assert asks_words(one)
        assert one.experiment


def test_only_what_was_read_is_there():
    text = (ROOT / "decef" / "claims.yaml").read_text()
    ids = {figure.id for figure in load_figures()}
    assert {"A1", "D8", "B5", "B12", "B21", "C10", "C13", "R12", "R13"} <= ids
    assert not ids & set(NOT_READ)
    assert {figure.id for one in load_claims() for figure in one.figures} <= ids
    assert "recalled" not in text.lower()
    assert {figure.status for figure in load_figures()} == {"verified", "verified-code"}


def test_figures_agree_with_each_other():
    by = {(f.id, f.dataset, f.network, f.metric, f.setting): f.value for f in load_figures()}
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
    for figure in load_figures():
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
        ("figures: [B12, B21]", "figures: [B12, B99]", "basisconv-resnet56 has figure 'B99'"),
        ("kind: reaches, tolerance: 0.3", "kind: reach, tolerance: 0.3", "has kind 'reach'; there are no_worse"),
        ("paper: atcd", "paper: actd", "atcd-better has paper 'actd'"),
        ("- id: atcd-better", "- id: fair-fight", "fair-fight stands there twice"),
        ("status: verified,", "status: recalled,", "A1 has status 'recalled'"),
        ("values: {dense: 91.73}", "values: {dense: none}", "figure A1 cannot be read"),
        (
            "    note: >-\n      after runs",
            "    notes: >-\n      after runs",
            "claim cpac-significance cannot be read",
        ),
    ],
)
def test_mistakes_in_the_file_are_named(monkeypatch, old, new, message):
    text = (ROOT / "decef" / "claims.yaml").read_text()
    assert old in text
    monkeypatch.setattr(claims, "_read", lambda: yaml.safe_load(text.replace(old, new, 1)))
    monkeypatch.setattr(claims, "load_figures", claims.load_figures.__wrapped__)
    with pytest.raises(ValueError, match=message):
        claims.load_claims.__wrapped__()


def test_the_page_is_the_same_whatever_the_order_of_the_runs():
    records = [*DENSE, *runs("decef", 90.0, 91.1, 91.9, rank=4), *runs("cpac", 89.0, 90.0, 91.0, rank=4)]
    pages = [markdown([(c, judge(c, order)) for c in load_claims()]) for order in (records, records[::-1])]
    assert pages[0] == pages[1]
    assert "| holds |" in pages[0]
    assert "-1.00" in pages[0]


def test_the_command_line_writes_the_same_bytes_twice(tmp_path, monkeypatch, capsys):
    for run in [*DENSE, *runs("decef", 90.0, 91.1, 91.9, rank=4)]:
        folder = tmp_path / "runs" / run.summary["id"]
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(run.config))
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
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [([[0.1, 0.2, 0.3]] * 3, HOLDS), ([[0.3, 0.2, 0.1]] * 3, FAILS), ([[0.1, 0.2, 0.3]], ONE_SEED)],
)
def test_significance_by_what_removal_costs(rises, verdict):
    records, tables = runs("cpac", *[90.0] * len(rises), rank=3), {}
    for found, rise in zip(records, rises, strict=True):
        table = {"layer": "conv1", "component": [0, 1, 2], "product": [1.0, 2.0, 3.0], "loss_rise": rise}
        tables[found.summary["id"]] = pd.DataFrame(table)
    got = judge(claim(kind="significance", measure="product"), records, {"significance": tables})
    assert got.verdict == verdict
    assert judge(claim(kind="significance", measure="product"), records, {}).verdict == NOT_TESTED
