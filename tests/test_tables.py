import json
import shutil

import pandas as pd
import pytest
import yaml
from scipy.stats import ttest_1samp, ttest_rel

from decef.results.comparisons import comparison_groups
from decef.results.overview import overview_table
from decef.results.tables import summarize, write_tables
from decef.training.record import load_records

DENSE = {"params": 1000, "macs": 4000, "flops": 8000, "trainable_params": 1000}


def add(
    results,
    layer,
    seed,
    top1,
    *,
    schedule="quick",
    model="resnet20",
    status="finished",
    precision="fp32",
    dataset=None,
    train=None,
    weights=None,
    **layer_options,
):
    share = 1 if layer == "conv2d" else 0.5
    changes = [*layer_options.values(), *(dataset or {}).values(), *(train or {}).values(), weights, precision]
    name = f"{layer}-{schedule}-{model}-{seed}-{'-'.join(map(str, changes))}"
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    config = {
        "format": 2,
        "dataset": {"name": "cifar10", **(dataset or {})},
        "model": {"name": model, "shortcut": "A", "weights_md5": weights},
        "layer": {"name": layer, **layer_options},
        "train": {"name": schedule, "epochs": 3, "batch_size": 128, "lr": 0.1, **(train or {})},
        "seed": seed,
    }
    if layer != "conv2d":
        config["model"]["dense_stem"] = True
    summary = {
        "id": name,
        "status": status,
        "precision": precision,
        "test_top1": top1,
        "images_per_second": 100.0,
        "dense": DENSE,
        **{key: int(value * share) for key, value in DENSE.items()},
        "device": "cpu",
        "machine": "test machine",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "epochs": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_seeds_are_one_row_with_mean_sd_and_ratios(tmp_path):
    for seed, top1 in enumerate((90.0, 91.0, 92.0)):
        add(tmp_path, "conv2d", seed, top1)
    add(tmp_path, "decef", 0, 90.5, rank=4)
    frame = summarize(load_records(tmp_path))
    dense, decef = frame.to_dict("records")
    assert (dense["layer"], dense["setting"], dense["n"]) == ("conv2d", "dense", 3)
    assert dense["top1"] == pytest.approx(91)
    assert dense["top1_sd"] == pytest.approx(1)
    assert dense["published_top1"] == 91.73
    assert (decef["setting"], decef["n"], decef["params_ratio"], decef["flops_ratio"]) == ("rank 4", 1, 0.5, 0.5)
    assert pd.isna(decef["top1_sd"])
    assert decef["top1_minus_conv2d"] == pytest.approx(0.5)  # against seed 0 alone, which has 90
    assert decef["paired"] == 1
    assert pd.isna(dense["top1_minus_conv2d"])
    assert all(pd.isna(decef[key]) for key in ("top1_low", "top1_high", "difference_low", "difference_high"))
    assert decef["flops"] == 2 * decef["macs"]
    assert pd.isna(decef["published_top1"])


def test_intervals_and_differences_over_common_seeds(tmp_path):
    for seed, top1 in enumerate((90.0, 91.0, 92.0)):
        add(tmp_path, "conv2d", seed, top1)
    for seed, top1 in ((0, 89.0), (1, 90.2), (2, 90.8), (7, 99.0)):
        add(tmp_path, "decef", seed, top1, rank=4)
    add(tmp_path, "cpac", 9, 90.0, rank=4)
    (path,) = write_tables(load_records(tmp_path), tmp_path / "tables")
    dense, decef, cpac = pd.read_csv(path.with_suffix(".csv")).to_dict("records")
    expected = ttest_1samp([90.0, 91.0, 92.0], 0).confidence_interval()
    assert (dense["top1_low"], dense["top1_high"]) == pytest.approx(tuple(expected), abs=1e-6)
    expected = ttest_rel([89.0, 90.2, 90.8], [90.0, 91.0, 92.0]).confidence_interval()
    assert (decef["difference_low"], decef["difference_high"]) == pytest.approx(tuple(expected), abs=1e-6)
    assert (decef["top1_minus_conv2d"], decef["paired"], decef["n"]) == (pytest.approx(-1), 3, 4)
    assert pd.isna(cpac["top1_minus_conv2d"])
    assert cpac["paired"] == 0
    rows = {line.split("|")[2].strip(): line for line in path.read_text().splitlines() if line.startswith("| resnet")}
    assert "| 91.00 ± 1.00 | [88.52, 93.48]  | 3   |" in rows["conv2d"]
    assert "| -1.00 [-1.50, -0.50] (n=3) | fp32" in rows["decef"]
    assert "| 90.00        |                 | 1   |                            | fp32" in rows["cpac"]


def test_the_same_experiment_done_otherwise_is_the_same_row_and_a_seed_counts_once(tmp_path):
    add(tmp_path, "decef", 0, 90.0, rank=4, implementation="factorized")
    add(tmp_path, "decef", 1, 91.0, rank=4, implementation="reconstructed")
    add(tmp_path, "decef", 2, 92.0, rank=4, train={"channels_last": True, "milestones": [0.5]})
    (row,) = summarize(load_records(tmp_path)).to_dict("records")
    assert (row["n"], row["setting"]) == (3, "rank 4")
    add(tmp_path, "decef", 0, 90.2, rank=4, implementation="reconstructed")
    both = "decef-quick-resnet20-0-4-factorized-None-fp32 and decef-quick-resnet20-0-4-reconstructed-None-fp32"
    with pytest.raises(ValueError, match=f"{both} are one experiment with one seed, which counts once: move one"):
        summarize(load_records(tmp_path))


def test_runs_of_different_precision_are_not_paired_and_a_row_that_mixes_them_says_so(tmp_path):
    for seed, precision in enumerate(("bf16", "bf16", "fp32")):
        add(tmp_path, "conv2d", seed, 91.0, precision=precision)
        add(tmp_path, "decef", seed, 90.0, precision="bf16", rank=4)
    (path,) = write_tables(load_records(tmp_path), tmp_path / "tables")
    dense, decef = pd.read_csv(path.with_suffix(".csv")).to_dict("records")
    assert (dense["n"], dense["precision"]) == (3, "mixed: 2 bf16, 1 fp32")
    assert (decef["n"], decef["paired"], decef["precision"]) == (3, 2, "bf16")


def test_what_makes_another_task_is_shown_and_has_no_published_figure(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    add(tmp_path, "conv2d", 0, 80.0, dataset={"train_size": 1000})
    add(tmp_path, "conv2d", 0, 70.0, dataset={"name": "imagenet", "size": 64, "num_classes": 10})
    add(tmp_path, "conv2d", 0, 60.0, dataset={"name": "imagenet", "size": 224, "num_classes": 1000})
    tables = {path.read_text().splitlines()[0]: path for path in write_tables(load_records(tmp_path), tmp_path / "t")}
    assert set(tables) == {
        "# cifar10, schedule `quick`",
        "# cifar10 train_size 1000, schedule `quick`",
        "# imagenet size 64 num_classes 10, schedule `quick`",
        "# imagenet, schedule `quick`",
    }
    rows = {title: pd.read_csv(path.with_suffix(".csv")).iloc[0] for title, path in tables.items()}
    assert rows["# cifar10, schedule `quick`"].published_top1 == 91.73
    small = rows["# cifar10 train_size 1000, schedule `quick`"]
    assert small.setting == "dense, train_size 1000"
    assert pd.isna(small.published_top1)


def test_runs_from_trained_weights_are_held_against_dense_runs_from_the_same(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    add(tmp_path, "conv2d", 0, 92.0, weights="0123456789abcdef")
    add(tmp_path, "decef", 0, 91.0, weights="0123456789abcdef", rank=4)
    rows = summarize(load_records(tmp_path)).to_dict("records")
    (decef,) = (row for row in rows if row["layer"] == "decef")
    assert decef["setting"] == "rank 4, from weights 01234567"
    assert decef["top1_minus_conv2d"] == pytest.approx(-1)


def test_a_record_of_an_older_format_is_left_out_and_named(tmp_path, caplog):
    folder = add(tmp_path, "conv2d", 0, 90.0)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["format"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_records(tmp_path) == []
    assert "has format 1, not 2" in caplog.text


def test_schedules_are_never_in_one_table(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    add(tmp_path, "conv2d", 0, 93.0, schedule="paper")
    add(tmp_path, "decef", 0, 92.5, schedule="paper", flops=0.667)
    paths = write_tables(load_records(tmp_path), tmp_path / "tables")
    assert [p.name for p in paths] == ["cifar10-paper.md", "cifar10-quick.md"]
    quick = (tmp_path / "tables" / "cifar10-quick.md").read_text()
    assert "schedule `quick`" in quick
    assert "90.00" in quick
    assert "93.00" not in quick
    assert len(pd.read_csv(tmp_path / "tables" / "cifar10-paper.csv")) == 2


def test_one_schedule_with_other_settings_is_another_table(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    folder = add(tmp_path, "conv2d", 1, 80.0)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["epochs"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tables = write_tables(load_records(tmp_path), tmp_path / "tables")
    assert len(tables) == 2
    assert all(len(pd.read_csv(t.with_suffix(".csv"))) == 1 for t in tables)


def test_unfinished_and_unreadable_runs_are_left_out_and_named(tmp_path, caplog):
    add(tmp_path, "conv2d", 0, 90.0)
    add(tmp_path, "decef", 0, None, status="running", rank=2)
    (add(tmp_path, "cpac", 0, 90.0, rank=2) / "summary.json").write_text('{"id": ')
    with caplog.at_level("INFO"):
        records = load_records(tmp_path)
    assert [r.layer for r in records] == ["conv2d"]
    assert "decef-quick-resnet20-0-2-None-fp32 is running" in caplog.text
    assert "cpac-quick-resnet20-0-2-None-fp32 cannot be read" in caplog.text


def test_rebuilding_gives_identical_files_and_drops_stale_ones(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    add(tmp_path, "rank1", 0, 88.0, flops=0.667)
    tables = tmp_path / "tables"
    write_tables(load_records(tmp_path), tables)
    before = {p.name: p.read_bytes() for p in tables.iterdir()}
    for name in ("cifar10-old.md", "cifar10-old.csv"):
        (tables / name).write_text("stale")
    (tables / "mine.csv").write_text("not of these")
    write_tables(load_records(tmp_path), tables)
    assert {p.name: p.read_bytes() for p in tables.iterdir()} == before | {"mine.csv": b"not of these"}


def test_of_several_comparisons_by_one_schedule_the_largest_has_its_name(tmp_path):
    for seed in range(2):
        add(tmp_path, "conv2d", seed, 90.0)
    add(tmp_path, "conv2d", 0, 80.0, train={"epochs": 1})
    few, usual = sorted(comparison_groups(load_records(tmp_path)).items(), key=lambda item: len(item[1]))
    assert (usual[0], len(usual[1])) == ("cifar10-quick", 2)
    assert few[0].startswith("cifar10-quick-")
    add(tmp_path, "conv2d", 1, 80.0, train={"epochs": 1})
    assert all(name.startswith("cifar10-quick-") for name in comparison_groups(load_records(tmp_path)))


def test_a_schedules_name_is_that_of_the_usual_precision(tmp_path):
    add(tmp_path, "conv2d", 0, 90.0)
    for seed in range(2):
        add(tmp_path, "conv2d", seed, 80.0, precision="fp32", train={"precision": "fp32"})
    groups = comparison_groups(load_records(tmp_path))
    assert len(groups["cifar10-quick"]) == 1
    assert len(groups) == 2


def test_the_overview_is_of_runs_that_began_as_it_says(tmp_path):
    """From scratch there, of trained weights and fitted to images here: other runs may be more, and don't count."""
    for seed in range(3):
        add(tmp_path, "conv2d", seed, 90.0, schedule="standard")
        add(tmp_path, "cpac", seed, 10.0, schedule="standard", weights="0" * 32, flops=0.667)
        add(tmp_path, "cpac", seed, 20.0, schedule="recover", weights="0" * 32, flops=0.5)
    for seed in range(2):
        add(tmp_path, "cpac", seed, 80.0, schedule="standard", flops=0.667)
    (row,) = [line for line in overview_table(load_records(tmp_path), tmp_path).splitlines() if "`cpac`" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[1][:5], cells[2], cells[6]) == ("80.00", "2", "-")


def test_copies_and_empty_records_are_left_out(tmp_path, caplog):
    folder = add(tmp_path, "conv2d", 0, 90.0)
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.copytree(folder, folder.with_name("empty"))
    (folder.with_name("empty") / "config.yaml").write_text("")
    assert [found.id for found in load_records(tmp_path)] == [folder.name]
    assert f"copy is a copy of {folder.name}" in caplog.text
    assert "empty cannot be read" in caplog.text


def test_killed_while_tables_are_written(tmp_path, monkeypatch):
    add(tmp_path, "conv2d", 0, 90.0)
    records = load_records(tmp_path)
    (path,) = write_tables(records, tmp_path / "tables")
    expected = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    class Killed(BaseException):
        pass

    def killed(source, target):
        raise Killed

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Killed):
        write_tables(records, tmp_path / "tables")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir() if p.suffix != ".partial"} == expected
    monkeypatch.undo()
    write_tables(records, tmp_path / "tables")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == expected
