"""Draw all figures of a results folder, from its records and tables alone, each with a caption and its sources."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from decef.files import replace_file
from decef.layers import LAYERS
from decef.models import source_file
from decef.models.weights import md5_of
from decef.plans import layer_names, plan
from decef.results import plots
from decef.results.comparisons import comparison_groups, experiments
from decef.results.eigenfilters import EigenFilters
from decef.results.findings import dense_ranks, load_measurements
from decef.results.pages import render
from decef.results.tables import summarize
from decef.training.build import dense_network
from decef.training.networks import epoch_of
from decef.training.record import METRICS, Record, load_records

log = logging.getLogger(__name__)

SIGNIFICANCE = {
    "product": "norm of the component, the product of its four vectors' norms",
    "channels": "norm of its channel vector, which the authors' notebook prints",
}


@dataclass(frozen=True)
class Drawing:
    """A figure, its file's name without ending, a caption, and its source files, relative to the results folder."""

    name: str
    figure: Figure
    shows: str
    sources: Sequence[str]


def draw(results: Path) -> list[Path]:
    """Draw all figures of a results folder into its `figures`, with a README.md of captions; return the PNG files.

    A kind of figure without data is skipped; the log then has the command that makes the data. Old figures whose data
    are gone are removed. Where there is no data at all, nothing is changed: it may be a folder of something else.
    """
    records = load_records(results)
    drawings: list[Drawing] = []
    for kind, command, drawn in KINDS:
        found = list(drawn(results, records))
        if not found:
            log.info("skipped: there is no data for %s; make it with %s", kind, command)
        drawings += found
    if not drawings:
        return []
    folder = results / "figures"
    folder.mkdir(exist_ok=True)
    for drawing in drawings:
        plots.save(drawing.figure, folder / drawing.name)
    names, page = {drawing.name for drawing in drawings}, folder / "README.md"
    before = re.findall(r"\]\(([^()/]+)\.png\)", page.read_text()) if page.is_file() else []
    for old in set(before) - names:  # not other images, which somebody else has put there
        for ending in ("png", "svg"):
            (folder / f"{old}.{ending}").unlink(missing_ok=True)
    replace_file(page, render("figures", drawings=drawings).encode())
    return [folder / f"{drawing.name}.png" for drawing in drawings]


def tradeoffs(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Accuracy against costs, for every network that ran with two or more layer types."""
    for name, title, group in _networks(records):
        frame = summarize(group)
        if frame.layer.nunique() > 1:
            shows = (
                f"{title}: test top-1 of the last epoch against FLOPs and parameters. Mean over n seeds; bars: 95 % "
                "interval of the mean, where n > 1. Grey: the Pareto front."
            )
            yield Drawing(f"accuracy-{name}", plots.plot_tradeoff(frame), shows, _folders(group))


def training(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Training curves, for every network."""
    for name, title, group in _networks(records):
        frame = _metrics(group)
        if frame.empty:
            continue
        shows = (
            f"{title}: training loss and test top-1 after every epoch. Mean over n seeds; band: from the least to the "
            "greatest, where n > 1."
        )
        sources = [f"{folder}/{METRICS}" for folder in _folders(group)]
        yield Drawing(f"training-{name}", plots.plot_training(frame), shows, sources)


def costs(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """MACs of every convolution at the ranks that ran, for networks with several layer types, at least one low-rank."""
    for name, title, group in _networks(records):
        low_rank = [record for record in group if record.layer in LAYERS and record.summary.get("ranks")]
        ran = {record.layer: record for record in reversed(low_rank)}  # "auto" has more to say than ranks
        if len({record.layer for record in group}) < 2 or not ran:
            continue
        order = [layer for layer in LAYERS if layer in ran]
        settings = "; ".join(f"{layer}: {ran[layer].rank_setting}" for layer in order)
        shows = f"{title}: MACs of every convolution, dense (grey) and as it ran (coloured). {settings}."
        try:
            plans = {layer: _plan(ran[layer]) for layer in order}
        except Exception as error:  # a network of one's own that isn't here, or is another now
            log.warning("left out: the costs of %s: %s", name, error)
            continue
        yield Drawing(f"costs-{name}", plots.plot_costs(plans), shows, _folders([ran[layer] for layer in order]))


def without_finetuning(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Accuracy right after decomposition."""
    for path in sorted((results / "without_finetuning").glob("*.csv")):
        shows = (
            f"{path.stem}: test top-1 right after decomposition, without fine-tuning, against the share of the dense "
            "network's FLOPs; ranks by the energy they keep for their FLOPs. Filled, solid: nearest in the layers' "
            "outputs on training images, batch norm's statistics measured again; open, dashed: nearest in their "
            "kernels. Grey line: the dense network; on the right the five points below it."
        )
        yield Drawing(
            f"without-finetuning-{path.stem}",
            plots.plot_without_finetuning(pd.read_csv(path)),
            shows,
            [f"without_finetuning/{path.name}"],
        )


def frontier(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Accuracy against measured time."""
    for path in sorted((results / "frontier").glob("*.csv")):
        shows = (
            f"{path.stem}: test top-1 against the time of a call, over the dense network's in fp32, each network "
            "deployed in fp32, bf16 or int8; a line joins the budgets of a layer type, the wide grey one what no other "
            "network beats in both. Networks that lost much are below the figure."
        )
        frame = pd.read_csv(path, keep_default_na=False)
        if not frame.stage.any():
            log.info("skipped: %s has the dense network alone", path)
            continue
        figure = plots.plot_frontier(frame)
        yield Drawing(f"frontier-{path.stem}", figure, shows, [f"frontier/{path.name}"])


def ranks(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Effective rank against depth, of networks that are known at one time only."""
    for name, table in _rank_tables(results).items():
        if table.epoch.nunique() < 2:
            shows = (
                f"{name}: effective rank of every kernel wider than 1x1, mean over input channels ({_counted(table)}); "
                "dashed: random kernels of the same shapes."
            )
            tables = {str(label): rows for label, rows in table.groupby("network", sort=False)}
            figure = plots.plot_ranks(tables, table.counted_from.iloc[0])
            yield Drawing(f"ranks-{name}", figure, shows, [f"ranks/{name}.csv", f"ranks/{name}.json"])


def ranks_by_network(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Effective rank against depth, of all architectures."""
    tables = {
        network: {name: table[table.network == table.network.iloc[-1]] for name, table in found.items()}
        for network, found in dense_ranks(records, load_measurements(results)).items()
    }
    if tables:
        shows = (
            "Trained dense networks: effective rank of every kernel wider than 1x1 (mean over input channels, singular "
            "values above the threshold), by itself and over that of a random kernel of the same shape, against its "
            "place in the network. Mean over n networks, from the least to the greatest."
        )
        sources = [f"ranks/{name}.csv" for found in tables.values() for name in found]
        yield Drawing("ranks-by-network", plots.plot_ranks_by_network(tables), shows, sources)


def ranks_in_training(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Effective rank against the epoch, for runs that kept their checkpoints."""
    tables = _rank_tables(results)
    for name, title, group in _networks(records):
        for runs in experiments(group):
            found = [run.id for run in runs if run.id in tables and tables[run.id].epoch.nunique() > 1]
            if found:
                frame = pd.concat(tables[run_id].assign(run=run_id) for run_id in found)
                what = f"{runs[0].layer}, {runs[0].setting}"
                shows = (
                    f"{title}, {what}: effective rank ({_counted(frame)}) at epochs whose weights were kept, a line "
                    f"a convolution; black: mean over convolutions. Mean over n = {len(found)} seeds; band: from the "
                    "least to the greatest mean, where n > 1."
                )
                figure = plots.plot_ranks_in_training(frame, frame.counted_from.iloc[0])
                sources = [f"ranks/{run_id}.{ending}" for run_id in found for ending in ("csv", "json")]
                yield Drawing(f"ranks-by-epoch-{name}-{_slug(what)}", figure, shows, sources)


def filters(results: Path, records: Sequence[Record]) -> Iterator[Drawing]:
    """Eigen-filters, and the significance of CP components."""
    for path in sorted((results / "filters").glob("*.json")):
        data = json.loads(path.read_text())
        source = [f"filters/{path.name}"]
        weights = f"weights: {data['weights']}" if data["weights"] else "a run's weights"
        shows = (
            f"{path.stem}, {data['layer']}: eigen-filters (left singular vectors, norm 1, sign chosen) of input "
            f"channels at even distances, with their singular values; {weights}."
        )
        figure = plots.plot_eigenfilters(EigenFilters(**data["eigenfilters"]))
        yield Drawing(f"eigenfilters-{path.stem}", figure, shows, source)
        share = data["decomposed_to_flops"]
        how = f"decomposed to {share:g} of the FLOPs, not trained further" if share else "as trained"
        for kind, layers in data["significance"].items():
            shows = (
                f"{path.stem}, CPAC layers {how}: significance of every layer's components, and of the feature maps "
                f"that they make, sorted, over the largest: {SIGNIFICANCE[kind]}; {weights}."
            )
            name = f"significance-{kind}-{path.stem}"
            yield Drawing(name, plots.plot_significance(layers), shows, source)


#: Each kind of figure: what it shows, the command that makes its data, and the function that draws it.
KINDS: tuple[tuple[str, str, Callable[[Path, Sequence[Record]], Iterator[Drawing]]], ...] = (
    (
        "accuracy against costs",
        "python scripts/train.py -m layer=conv2d,decef,basisconv,basisconv2021,cpac,rank1",
        tradeoffs,
    ),
    (
        "accuracy without fine-tuning",
        "python scripts/without_finetuning.py NETWORK --weights FILE --out results/without_finetuning/NAME",
        without_finetuning,
    ),
    (
        "accuracy against time",
        "python scripts/frontier.py NETWORK --weights FILE --out results/frontier/NAME",
        frontier,
    ),
    ("training curves", "python scripts/train.py layer=decef", training),
    (
        "costs of every convolution",
        "python scripts/train.py -m layer=conv2d,decef,basisconv,basisconv2021,cpac,rank1",
        costs,
    ),
    ("effective ranks", "python scripts/ranks.py NETWORK --weights FILE --out results/ranks/NAME", ranks),
    (
        "effective ranks of known networks",
        "python scripts/ranks.py results/runs/RUN --out results/ranks/RUN",
        ranks_by_network,
    ),
    (
        "effective ranks in training",
        "python scripts/train.py keep_checkpoints=6, then python scripts/ranks.py results/runs/RUN --out "
        "results/ranks/RUN",
        ranks_in_training,
    ),
    ("eigen-filters and significance", "python scripts/figures.py --network resnet20 --weights FILE", filters),
)


def _networks(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Groups of comparable runs of one network, each with a name for files and a title."""
    for name, group in comparison_groups(records).items():
        for model, runs in groupby(sorted(group, key=lambda r: r.model), key=lambda r: r.model):
            train = group[0].config.train.name
            yield f"{name}-{_slug(model)}", f"{model} on {group[0].task}, schedule `{train}`", list(runs)


def _metrics(records: Sequence[Record]) -> pd.DataFrame:
    order = sorted(records, key=lambda r: (layer_names().index(r.layer), r.setting, r.config.seed))
    return pd.DataFrame(
        {"layer": record.layer, "setting": record.setting, "seed": record.config.seed, **row}
        for record in order
        for row in record.metrics
    )


def _plan(record: Record) -> pd.DataFrame:
    """The run's plan, made again from the ranks in its record."""
    source = source_file(record.config.model.name)
    if source is not None and md5_of(source) != record.config.model.source_md5:
        raise ValueError(f"{source} is not what it was when {record.id} ran")
    data = record.config.dataset.dataset()
    with torch.device("meta"):
        model = dense_network(record.config.model, data)
    ranks = record.summary["ranks"]
    return plan(model, record.layer, rank=ranks, include=list(ranks), input_size=data.input_size).to_frame()


def _rank_tables(results: Path) -> dict[str, pd.DataFrame]:
    """Tables of results/ranks by name, with columns `epoch`, where they say it, and `counted_from`, the threshold."""
    tables = {}
    measured = load_measurements(results)
    for name, frame in measured.ranks.items():
        threshold = measured.origins[name].get("threshold")
        if threshold is None:
            log.warning("left out: ranks/%s.csv, as its .json does not say from which threshold ranks count", name)
            continue
        epoch = frame.network.map(epoch_of).astype(float)
        tables[name] = frame.assign(epoch=epoch, counted_from=threshold)
    return tables


def _counted(table: pd.DataFrame) -> str:
    return f"singular values of at least {table.counted_from.iloc[0]:g} of the largest"


def _slug(words: str) -> str:
    return re.sub(r"[^\w.-]+", "-", words)


def _folders(records: Sequence[Record]) -> list[str]:
    return [f"runs/{record.id}" for record in records]
