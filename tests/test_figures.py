import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from support import ROOT, config
from torch import nn

from decef import CPACConv2d, DeCEFConv2d
from decef.conversion import convert
from decef.models import PlainNet
from decef.models.weights import md5_of
from decef.results import figures, plots
from decef.results.comparisons import comparison_groups
from decef.results.effective_ranks import rank_table
from decef.results.eigenfilters import eigenfilters, significance, write_filters
from decef.results.look import look_of
from decef.results.tables import summarize
from decef.training.networks import load_networks
from decef.training.record import load_records, read_metrics
from decef.training.run import run


@pytest.fixture(scope="module")
def records():
    return comparison_groups(load_records(ROOT / "results"))


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_points_are_the_tables_rows(records):
    frame = summarize(records["cifar10-quick"])
    frame = frame[frame.model == "resnet20"]
    for panel, cost in zip(plots.plot_tradeoff(frame).axes, ("flops", "params"), strict=True):
        points = {c.get_label(): c.lines[0] for c in panel.containers}
        assert len(points) == len(frame)
        for row, (label, point) in zip(frame.itertuples(), points.items(), strict=True):
            assert label.startswith(row.layer)
            assert label.endswith(f"(n={row.n})")
            assert point.get_xydata().tolist() == [[getattr(row, cost) / 1e6, row.top1]]
            assert (to_hex(point.get_color()).upper(), point.get_marker()) == (
                look_of(row.layer).color,
                look_of(row.layer).marker,
            )
        front = plots.pareto(frame, cost)
        assert lines(panel)["Pareto front"].get_xydata().tolist() == (
            np.column_stack([front[cost] / 1e6, front.top1]).tolist()
        )
        beaten = frame.drop(front.index)
        assert all(((front[cost] <= r[cost]) & (front.top1 >= r.top1)).any() for _, r in beaten.iterrows())
        assert all(a < b for a, b in pairwise(front.top1))


def test_intervals_are_drawn_where_there_are_seeds(records):
    frame = summarize(records["digits-atcd"])
    (left, _) = plots.plot_tradeoff(frame).axes
    for row, container in zip(frame.itertuples(), left.containers, strict=True):
        ((_, low), (_, high)) = container.lines[2][0].get_segments()[0]
        assert (low, high) == pytest.approx((row.top1_low, row.top1_high))


def test_curves_are_the_metrics_mean_and_range(records):
    group = [r for r in records["digits-atcd"] if r.setting == "rank 1"]
    rows = [read_metrics(ROOT / "results" / "runs" / r.id) for r in group]
    frame = pd.DataFrame(
        {"layer": "rank1", "setting": "rank 1", "seed": r.config.seed, **row}
        for r, metrics in zip(group, rows, strict=True)
        for row in metrics
    )
    _, right = plots.plot_training(frame).axes
    seeds = np.array([[row["test_top1"] for row in metrics] for metrics in rows])
    assert lines(right)[f"rank1 (n={len(group)})"].get_ydata() == pytest.approx(seeds.mean(0))
    band = right.collections[0].get_paths()[0].vertices
    for epoch in range(1, seeds.shape[1] + 1):
        edge = band[band[:, 0] == epoch, 1]
        assert (edge.min(), edge.max()) == pytest.approx((seeds[:, epoch - 1].min(), seeds[:, epoch - 1].max()))


def test_curves_without_finetuning_are_the_csv():
    frame = pd.read_csv(ROOT / "results" / "without_finetuning" / "resnet20.csv")
    drawn = lines(plots.plot_without_finetuning(frame).axes[0])
    for nearest, column, prefix in (("outputs", "recalibrated", "{}"), ("kernels", "top1", "_{}, kernels")):
        for layer in ("decef", "basisconv", "cpac", "rank1"):
            rows = frame[(frame.layer == layer) & (frame.spread == "energy") & (frame.nearest == nearest)]
            line = drawn[prefix.format(layer)]
            expected = rows[["flops_ratio", column]].sort_values("flops_ratio").values
            assert line.get_xydata().tolist() == expected.tolist()


#: Time falls with the precision, and with the budget.
FRONTIER = pd.DataFrame(
    [("conv2d", "dense", "", precision, 91.0, 1.0 / share) for share, precision in ((1, "fp32"), (4, "int8"))]
    + [
        ("decef", f"{budget} of FLOPs", stage, precision, top1, budget / share)
        for stage, top1 in (("decomposed", 88.0), ("fine-tuned", 90.0))
        for budget in (0.5, 0.667)
        for share, precision in ((1, "fp32"), (4, "int8"))
    ],
    columns=["layer", "budget", "stage", "precision", "top1", "time"],
)


def test_the_frontier_has_a_panel_for_each_stage_and_dense_in_all():
    figure = plots.plot_frontier(FRONTIER)
    assert [axes.get_title() for axes in figure.axes] == ["decomposed", "fine-tuned"]
    for axes, top1 in zip(figure.axes, (88.0, 90.0), strict=True):
        assert lines(axes)["decef, int8"].get_xydata().tolist() == [[0.125, top1], [0.16675, top1]]
        assert lines(axes)["conv2d, int8"].get_xydata().tolist() == [[0.25, 91.0]]
        front = lines(axes)["front"].get_xydata()
        assert [0.25, 91.0] in front.tolist()
        assert (np.diff(front, axis=0) > 0).all()  # what is slower is there because it is more accurate
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["conv2d", "decef", "fp32", "int8"]


def test_eigenfilters_are_those_of_the_layer():
    torch.manual_seed(0)
    layer = DeCEFConv2d(8, 16, 3, rank=2)
    found = eigenfilters(layer.weight, channels=4)
    assert found.channels == [0, 2, 5, 7]
    images = [a.get_images()[0].get_array() for a in plots.plot_eigenfilters(found).axes if a.get_images()]
    assert np.array(images).reshape(4, 2, 3, 3) == pytest.approx(np.array(found.filters))
    basis = torch.tensor(found.filters, dtype=torch.float32).flatten(2)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(2).expand(4, 2, 2))
    # They span the layer's own eigen-filters: projected on them, its kernel stays as it is, with these norms.
    kernel = layer.weight.detach()[:, found.channels].flatten(2).transpose(0, 1)
    coefficients = kernel @ basis.mT
    torch.testing.assert_close(coefficients @ basis, kernel)
    torch.testing.assert_close(coefficients.norm(dim=1), torch.tensor(found.values, dtype=torch.float32))


def test_significance_is_sorted_and_complete():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), "cpac", rank=4)
    found = significance(model, (4, 8, 8))
    drawn = lines(plots.plot_significance(found).axes[0])
    for name, module in model.named_modules():
        if isinstance(module, CPACConv2d):
            expected = np.sort(module.significance().numpy())[::-1]
            assert found[name] == pytest.approx(expected)
            assert drawn[f"_{name}"].get_ydata() == pytest.approx(expected / expected[0])


@pytest.fixture(scope="module")
def drawn(call, tmp_path_factory):
    """A results folder with everything there is a figure of, and its figures."""
    results = tmp_path_factory.mktemp("results")
    model = {"name": "plain", "width": 0.25, "relu": True, "dense_stem": True}
    run(config(results, model=model, layer={"name": "conv2d"}, threads=1))
    run(config(results, model=model, layer={"name": "cpac", "flops": 0.25}, keep_checkpoints=9, threads=1))
    folder = next((results / "runs").glob("*cpac*"))
    networks = load_networks(str(folder))
    (results / "ranks").mkdir()
    tables = [
        rank_table(model, definitions=("threshold",), threshold=0.3).assign(network=label) for label, model in networks
    ]
    pd.concat(tables).to_csv(results / "ranks" / f"{folder.name}.csv", index=False)
    (results / "ranks" / f"{folder.name}.json").write_text(json.dumps({"threshold": 0.3}))
    dense = next((results / "runs").glob("*conv2d*"))
    ((label, network),) = load_networks(str(dense))
    rank_table(network).assign(network=label).to_csv(results / "ranks" / f"{dense.name}.csv", index=False)
    (results / "ranks" / f"{dense.name}.json").write_text(json.dumps({"threshold": 0.3}))
    (results / "ranks" / "mine.csv").write_text("network,name,threshold,threshold_init\nnet,conv,1,2\n")
    (results / "without_finetuning").mkdir()
    shutil.copy(ROOT / "results" / "without_finetuning" / "resnet20.csv", results / "without_finetuning")
    (results / "frontier").mkdir()
    FRONTIER.to_csv(results / "frontier" / "net.csv", index=False)
    FRONTIER[FRONTIER.layer == "conv2d"].to_csv(results / "frontier" / "dense.csv", index=False)  # nothing to draw
    done = call("figures.py", "--results", results, "--network", folder)
    assert done.returncode == 0, done.stderr
    return results, done, tables


def test_the_script_draws_every_kind_and_says_from_what(drawn):
    results, done, _ = drawn
    assert "there is no data" not in done.stderr
    assert "frontier/dense.csv has the dense network alone" in done.stderr
    assert "left out: ranks/mine.csv, as its .json does not say" in done.stderr
    written = {path.stem for path in (results / "figures").glob("*.png")}
    assert written == {path.stem for path in (results / "figures").glob("*.svg")}
    kinds = (
        "accuracy-",
        "training-",
        "costs-",
        "without-finetuning-",
        "frontier-",
        "ranks-digits",
        "ranks-by-epoch-",
        "ranks-by-network",
        "eigenfilters-",
    )
    for kind in (*kinds, "significance-product-", "significance-channels-"):
        assert sum(name.startswith(kind) for name in written) == 1, kind
    (run_id,) = (path.name for path in (results / "runs").glob("*cpac*"))
    assert f"eigenfilters-{run_id}" in written
    captions = (results / "figures" / "README.md").read_text()
    for name in written:
        assert f"![{name}]({name}.png)" in captions
    for source in captions.split("](../")[1:]:
        assert (results / source.split(")")[0]).exists()


def test_deleted_and_drawn_again_figures_are_the_same_files(drawn):
    results, _, _ = drawn
    folder = results / "figures"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "README.md").write_text("![ranks-gone](ranks-gone.png)\n")
    for name in ("ranks-gone.png", "ranks-gone.svg"):
        (folder / name).write_bytes(b"of data that are no longer there")
    (folder / "mine.png").write_bytes(b"an image of somebody else's")
    figures.draw(results)
    (folder / "mine.png").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_ranks_by_network_are_means_over_networks():
    def table(*threshold):
        return pd.DataFrame({"threshold": threshold, "threshold_init": [4.0, 8.0]})

    rank, ratio = plots.plot_ranks_by_network({"net": {"a": table(2.0, 2.0), "b": table(4.0, 2.0)}}).axes
    assert lines(rank)["net, n = 2"].get_xydata().tolist() == [[0, 3], [1, 2]]
    assert lines(ratio)["net, n = 2"].get_ydata().tolist() == [0.75, 0.25]


def test_ranks_in_training_are_the_means_of_the_checkpoints_tables(drawn):
    _, _, tables = drawn
    frame = pd.concat(table.assign(epoch=i + 1, run="a") for i, table in enumerate(tables))
    both = pd.concat([frame, frame.assign(run="b", threshold=frame.threshold + 1)])
    axes = plots.plot_ranks_in_training(both, 0.3).axes[0]
    mean = lines(axes)["mean over convolutions"]
    expected = [[i + 1, pytest.approx(table.threshold.mean() + 0.5)] for i, table in enumerate(tables)]
    assert mean.get_xydata().tolist() == expected
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(table.threshold.mean() for table in tables))
    assert band.max() == pytest.approx(max(table.threshold.mean() for table in tables) + 1)
    for name in tables[0]["name"]:
        drawn_line = lines(axes)[f"_{name}"].get_ydata()
        assert drawn_line == pytest.approx(frame[frame.name == name].threshold.to_numpy() + 0.5)


def test_cost_bars_are_the_ranks_that_ran(records):
    group = [
        r
        for r in records["cifar10-quick"]
        if r.model == "resnet20" and r.rank_setting in ("dense", "0.667 of FLOPs") and not r.config.model.exclude
    ]
    (drawing,) = figures.costs(ROOT / "results", group)
    macs = {r.layer: r.summary["macs"] for r in group} | {"conv2d": group[0].summary["dense"]["macs"]}
    linear = 64 * 10
    for panel in drawing.figure.axes:
        dense, layer = panel.containers
        total = {c.get_label(): sum(bar.get_height() for bar in c) * 1e6 for c in (dense, layer)}
        assert total["dense"] + linear == pytest.approx(macs["conv2d"])
        assert total[layer.get_label()] + linear == pytest.approx(macs[layer.get_label()])


def test_a_network_that_is_not_here_costs_no_other_its_bars(records, caplog):
    group = [r for r in records["cifar10-quick"] if r.model == "resnet20"]
    away = [replace(r, config=replace(r.config, model=replace(r.config.model, name="gone:net"))) for r in group]
    assert len(list(figures.costs(ROOT / "results", [*away, *group]))) == 1
    assert "left out: the costs of cifar10-quick-gone-net" in caplog.text


def test_a_network_that_was_edited_since_or_cannot_be_made_costs_no_other_its_bars(
    records, caplog, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_since.py"
    file.write_text("import torch\ndef net(**_): return float(torch.zeros(1).sum())\n")
    group = [r for r in records["cifar10-quick"] if r.model == "resnet20"]
    for md5, reason in (("0" * 32, "is not what it was when"), (md5_of(file), "meta")):
        model = replace(group[0].config.model, name="edited_since:net", source_md5=md5)
        away = [replace(r, config=replace(r.config, model=model)) for r in group]
        caplog.clear()
        assert len(list(figures.costs(ROOT / "results", [*away, *group]))) == 1
        assert reason in caplog.text


def test_settings_of_one_type_look_different():
    looks = [plots._look("cpac", variant) for variant in range(13)]
    assert len({(look["linestyle"], look["fillstyle"]) for look in looks}) == 13


def test_of_auto_alone_there_are_no_cost_bars(records):
    group = [r for r in records["cifar10-recover"] if r.model == "resnet20" and r.layer in ("conv2d", "auto")]
    assert {r.layer for r in group} == {"conv2d", "auto"}
    assert list(figures.costs(ROOT / "results", group)) == []


def test_what_has_no_data_is_skipped_with_the_command_that_makes_it(call, tmp_path):
    mine = [tmp_path / "figures" / name for name in ("mine.png", "README.md")]
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    done = call("figures.py", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said == [
        f"skipped: there is no data for {what}; make it with {command}" for what, command, _ in figures.KINDS
    ]
    assert [path.read_text() for path in (tmp_path / "figures").iterdir()] == ["mine", "mine"]


def test_of_other_low_rank_networks_there_is_no_significance(tmp_path):
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), "decef", rank=3)
    write_filters(model, tmp_path / "filters" / "x", made_from={"weights": None}, input_size=(4, 8, 8))
    (drawing,) = figures.filters(tmp_path, [])
    assert drawing.name == "eigenfilters-x"
    assert len(json.loads((tmp_path / "filters" / "x.json").read_text())["eigenfilters"]["filters"][0]) == 3


def test_what_the_script_cannot_do(call, tmp_path):
    (tmp_path / "w.th").touch()
    done = call("figures.py", "--results", tmp_path, "--weights", tmp_path / "w.th")
    assert done.returncode == 2
    assert "name it with --network" in done.stderr
    with pytest.raises(ValueError, match="no convolution 'conv9'"):
        write_filters(PlainNet(num_classes=10), tmp_path / "x", made_from={}, input_size=(3, 32, 32), layer="conv9")
    pointwise = nn.Sequential(nn.Conv2d(3, 4, 1))
    for refused in (
        lambda: write_filters(pointwise, tmp_path / "x", made_from={}, input_size=(3, 8, 8)),
        lambda: rank_table(pointwise),
    ):
        with pytest.raises(ValueError, match="the network has no convolution wider than 1x1"):
            refused()


def test_the_committed_figures_name_files_that_are_there():
    captions = (ROOT / "results" / "figures" / "README.md").read_text()
    sources = [part.split(")")[0] for part in captions.split("](../")[1:]]
    assert sources
    for source in sources:
        assert (ROOT / "results" / source).exists(), source
