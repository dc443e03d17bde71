"""Comparing runs by seed, and that the intervals that our pages quote come from the records."""

import re
import runpy
import shlex
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
from support import ROOT
from test_claims import record, runs

from decef.results.findings import differences_in_top1
from decef.results.selectors import read_selector, selects
from decef.training.record import load_records

DENSE = runs("conv2d", 90.0, 91.0, 92.0)


@pytest.mark.parametrize(
    ("words", "selector"),
    [
        (["layer=decef", "train=standard", "seed=0"], {"layer.name": "decef", "train.name": "standard", "seed": 0}),
        (["layer=decef,cpac", "layer.flops=0.667"], {"layer.name": ["decef", "cpac"], "layer.flops": 0.667}),
        (["train.atcd=null,1", "model.width=0.25"], {"train.atcd": [None, 1], "model.width": 0.25}),
        (["train.milestones=[0.5]"], {"train.milestones": [[0.5]]}),
        (["train.lr=1e-4,0.01"], {"train.lr": [0.0001, 0.01]}),
    ],
)
def test_selectors_are_written_as_overrides(words, selector):
    assert read_selector(words) == selector


def test_lists_in_records_are_selected_by_one_of_their_texts():
    run = record("decef", 0, 90.0, exclude=["layer2.0.conv1", "layer3.0.conv1"])
    assert selects({"model.exclude": "layer2.*"}, run)
    assert selects({"model.exclude": ["layer1.*", "layer3.0.conv1"]}, run)
    for other in ("layer1.*", None, "*conv2"):
        assert not selects({"model.exclude": other}, run)


@pytest.mark.parametrize(
    "word",
    [
        "decef",
        "laye=decef",
        "layer.flop=0.5",
        "layer.bias=false",
        "model.num_classes=10",
        "train.scales=[[0.5",
        "dataset.root=x",
        "threads=1",
        "wandb.mode=x",
    ],
)
def test_what_selects_nothing_is_refused(word):
    with pytest.raises(ValueError, match=re.escape(word)):
        read_selector(["layer=decef", word])


def compared(records, settings, to):
    """What is found of the runs with `settings`, and the differences by seed."""
    found = differences_in_top1(records, read_selector(settings.split()), read_selector(to.split()))
    return {f.what.partition(", ")[2]: [round(v, 9) for c in f.comparisons for v in c.values] for f in found}


def test_the_others_differ_only_in_what_is_named():
    cpac = [*runs("cpac", 80.0, 81.0, 82.0), *runs("cpac", 10.0, 11.0, 12.0, train="quick")]
    other = runs("cpac", 70.0, 71.0, 72.0, energy=0.63)
    decef = runs("decef", 88.0, 89.5, 90.0)
    everything = [*DENSE, *cpac, *other, *decef]
    label = "decef 0.667 of FLOPs, schedule standard, 48 epochs"
    assert compared(everything, "layer=decef", "layer=conv2d") == {label: [-2.0, -1.5, -2.0]}
    assert compared(everything, "layer=decef", "layer=cpac") == {label: [8.0, 8.5, 8.0]}
    assert compared(everything, "layer=decef", "layer=cpac layer.energy=0.63") == {label: [18.0, 18.5, 18.0]}
    assert compared(everything, "layer=decef", "layer=cpac layer.flops=0.667") == {label: [8.0, 8.5, 8.0]}
    assert compared(everything, "layer=decef layer.flops=0.667", "layer=rank1") == {label: []}


def test_without_a_layer_the_others_have_the_same_and_one_type_says_nothing_of_another():
    usual = [*runs("decef", 88.0, 89.0), *runs("cpac", 80.0, 81.0)]
    kernel = [*runs("decef", 88.5, 89.0, decay="kernel"), *runs("cpac", 82.0, 81.0, decay="kernel")]
    doubtful = [record("rank1", 0, 50.0, rank=1, atcd=1), record("rank1", 0, 60.0, rank=1, atcd="epoch")]
    found = compared([*DENSE, *usual, *kernel, *doubtful], "layer=decef,cpac train.decay=kernel", "train.decay=factors")
    assert sorted(found.values()) == [[0.5, 0.0], [2.0, 0.0]]


def test_runs_of_another_precision_are_compared_only_if_it_is_named():
    usual, exact = runs("decef", 84.0, 84.0, precision="bf16"), runs("decef", 85.0, 86.0, precision="fp32")
    exact = [replace(r, config=replace(r.config, train=replace(r.config.train, precision="fp32"))) for r in exact]
    (values,) = compared([*exact, *usual], "layer=decef train.precision=fp32", "train.precision=auto").values()
    assert values == [1.0, 2.0]
    (values,) = compared([*usual, *runs("cpac", 80.0, 81.0, precision="fp32")], "layer=decef", "layer=cpac").values()
    assert values == []


def test_weights_are_compared_by_what_is_in_them():
    one = runs("decef", 84.0, 85.0, weights="a.th", weights_md5="a" * 32, decompose_on=512)
    other = runs("decef", 83.0, 83.0, weights="b.th", weights_md5="b" * 32, decompose_on=512)
    on_none = runs("decef", 82.0, 82.0, weights="b.th", weights_md5="b" * 32)
    none = runs("decef", 80.0, 80.0)
    everything = [*one, *other, *on_none, *none]
    assert list(compared(everything, "layer=decef model.weights=a.th", "model.weights=b.th").values()) == [[1.0, 2.0]]
    assert list(compared(everything, "layer=decef model.weights=a.th", "model.weights=null").values()) == [[4.0, 5.0]]


read_once = cache(load_records)


def compare(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("decef.training.record.load_records", read_once)
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["layer=decef", "model=resnet20", "train=nightly"],
            "no finished run of layer=decef model=resnet20 train=nigh",
        ),
        (["layer=conv2d"], "of layer=conv2d that isn't one of layer=conv2d too"),
        (["layer=decef", "--to", "layr=cpac"], "layr=cpac selects no runs"),
    ],
)
def test_bad_input_gets_one_sentence(monkeypatch, capsys, arguments, message):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        compare(monkeypatch, capsys, *arguments)
    assert message in capsys.readouterr().err


# The intervals in our pages -----------------------------------------------------------------------------------------

NUMBER = r"[-+]?\d+\.\d+"
INTERVAL = re.compile(rf"({NUMBER})(?: %)? \[({NUMBER}), ({NUMBER})\]")


def upright(mean, low, high):
    """The same, whichever way a difference was taken."""
    return (mean, low, high) if mean >= 0 else (-mean, -high, -low)


def intervals(text):
    """Every "mean [low, high]" of a text, and with how many decimals."""
    for words in INTERVAL.findall(" ".join(text.split())):
        mean, low, high = map(float, words)
        yield upright(mean, low, high), len(words[0].partition(".")[2])


@cache
def known():
    """The intervals that the tables and claims hold."""
    found = [one for page in (ROOT / "results").glob("*.md") for one, _ in intervals(page.read_text())]
    for path in (ROOT / "results" / "tables").glob("*.csv"):
        table = pd.read_csv(path)
        for columns in (["top1", "top1_low", "top1_high"], ["top1_minus_conv2d", "difference_low", "difference_high"]):
            found += [upright(*row) for row in table[columns].dropna().itertuples(index=False)]
    return found


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_interval_that_a_page_quotes_comes_from_the_records(monkeypatch, capsys, page):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    said = [
        compare(monkeypatch, capsys, *shlex.split(command, comments=True))
        for command in re.findall(r"^python scripts/compare\.py (.*)$", text, re.MULTILINE)
    ]
    assert said or page != "docs/results.md"
    there = [*known(), *(one for out in said for one, _ in intervals(out))]
    for quoted, decimals in intervals(text):
        # What is rounded twice may be half a last digit off twice.
        slack = 0.5 * 10**-decimals + 0.005 * (decimals < 2) + 1e-6
        assert any(all(abs(a - b) <= slack for a, b in zip(quoted, one, strict=True)) for one in there), quoted
