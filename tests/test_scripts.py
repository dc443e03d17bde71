"""Command lines that no other test runs, in this process, on something small."""

import importlib
import json
import sys

import pandas as pd
import pytest
from support import ROOT, config

from decef.layers import LAYERS
from decef.training.run import run


@pytest.fixture
def main_of(monkeypatch):
    """Runs a script's `main` with arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run_main(name, *arguments, **constants):
        script = importlib.import_module(name)
        for key, value in constants.items():
            monkeypatch.setattr(script, key, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script.main()

    yield run_main
    for name in ("significance", "costs", "report", "train"):  # names that a package of ours has too, or might
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with one CPAC run."""
    folder = tmp_path_factory.mktemp("results")
    model = {"name": "plain", "width": 0.1, "relu": True, "dense_stem": True}
    run(config(folder, model=model, layer={"name": "cpac", "rank": 3}))
    return folder


def test_significance(main_of, results, tmp_path):
    (folder,) = (results / "runs").iterdir()
    main_of("significance", folder, "--out", tmp_path)
    table = pd.read_csv(tmp_path / f"{folder.name}.csv")
    assert len(table) == 3 * table.layer.nunique() == 18
    assert json.loads((tmp_path / f"{folder.name}.json").read_text())["run"] == folder.name
    with pytest.raises(SystemExit, match="2"):
        main_of("significance", tmp_path, "--out", tmp_path)


def test_report(main_of, results, capsys):
    main_of("report", "--results", results)
    assert "1 runs" in capsys.readouterr().out
    assert "cpac" in (results / "report.html").read_text()


def test_costs_and_their_place_in_a_page(main_of, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- costs -->\nold\n<!-- end of costs -->\nafter\n")
    main_of("costs", "--out", tmp_path / "costs", "--page", page, CIFAR=("resnet20",), IMAGENET=())
    before, _, rest = page.read_text().partition("<!-- costs -->\n")
    table, _, after = rest.partition("<!-- end of costs -->\n")
    assert (before, after) == ("before\n", "after\n")
    assert "old" not in table
    assert table in (tmp_path / "costs.md").read_text()
    assert len(pd.read_csv(tmp_path / "costs.csv")) == 6


def test_quickstart(call, tmp_path):
    """What `make quickstart` types, with one epoch of a few images."""
    few = ["train.epochs=1", "dataset.train_size=100", "wandb.mode=disabled"]
    done = call("train.py", "-m", "experiment=quickstart", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = call("tables.py", "--print", "digits-quickstart", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert all(f"| {layer} " in shown.stdout for layer in LAYERS)
