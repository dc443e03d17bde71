"""Tables of results, from run records or from their mirrors in W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import pandas as pd

from decef.files import replace_file, write_csv
from decef.plans import layer_names
from decef.results.comparisons import comparison_groups, experiments, precision_words
from decef.results.pages import made_on, render
from decef.results.published import Published, load_published
from decef.results.statistics import PERCENT, Estimate, differences, estimate
from decef.training.record import RECORDED, Record, finished_record
from decef.training.tracking import check_account


@dataclass(frozen=True)
class Row:
    """A row of a table: one network, layer type and setting, over seeds.

    Attributes:
        runs: sorted by seed.
        top1: mean over the runs, in percent, with its 95 % interval.
        top1_sd: sample standard deviation over the runs, None for a single one.
        difference: to Conv2d, over the seeds that it ran with too, in the same precision and from the same weights;
            None for Conv2d itself, and if there is no such seed.
        precision: see `precision_words`.
        published: somebody else's value for the same task, network, layer and setting, None if we know of none.
    """

    runs: tuple[Record, ...]
    top1: Estimate
    top1_sd: float | None
    difference: Estimate | None
    precision: str
    published: Published | None

    @property
    def first(self) -> Record:
        """A run that stands for all of them, for what doesn't depend on the seed."""
        return self.runs[0]

    @property
    def source(self) -> str | None:
        """Where the published value is from, and how it was trained; None without such a value."""
        return self.published.source if self.published else None

    @property
    def difference_words(self) -> str:
        """The difference to Conv2d with its interval and, if it has fewer seeds than the row, their number."""
        if self.difference is None:
            return ""
        fewer = f" (n={self.difference.n})" if self.difference.n < len(self.runs) else ""
        return f"{self.difference.words('+.2f')}{fewer}"

    def to_dict(self) -> dict[str, Any]:
        """The row of the CSV file, by column."""
        first, difference, known = self.first, self.difference, self.published
        return {
            "model": first.model,
            "layer": first.layer,
            "setting": first.setting,
            "top1": self.top1.mean,
            "top1_sd": self.top1_sd,
            "top1_low": self.top1.low,
            "top1_high": self.top1.high,
            "n": len(self.runs),
            "top1_minus_conv2d": difference.mean if difference else None,
            "difference_low": difference.low if difference else None,
            "difference_high": difference.high if difference else None,
            "paired": difference.n if difference else 0,
            "precision": self.precision,
            "params": first.cost("params"),
            "params_ratio": first.ratio("params"),
            "trainable_params": first.cost("trainable_params"),
            "macs": first.cost("macs"),
            "flops": first.cost("flops"),
            "flops_ratio": first.ratio("flops"),
            "published_top1": known.value if known else None,
            "published_source": self.source,
            "runs": " ".join(run.id for run in self.runs),
        }

    def cells(self) -> dict[str, str]:
        """The row as people read it: texts by column title."""
        first, n, known = self.first, len(self.runs), self.published
        return {
            "network": first.model,
            "layer": first.layer,
            "setting": first.setting,
            "top-1 %": f"{self.top1.mean:.2f}" + ("" if self.top1_sd is None else f" ± {self.top1_sd:.2f}"),
            "95 % interval": self.top1.interval(),
            "n": str(n),
            "vs Conv2d": self.difference_words,
            "precision": self.precision,
            "params": f"{first.cost('params'):,}",
            "x dense": f"{first.ratio('params'):.3f}",
            "of them trained": f"{first.cost('trainable_params'):,}",
            "MFLOPs": f"{first.cost('flops') / 1e6:.2f}",
            "x dense ": f"{first.ratio('flops'):.3f}",
            "published top-1": f"{known.value:.2f}" if known else "-",
        }


def table_rows(records: Sequence[Record]) -> list[Row]:
    """The rows of runs that share a `comparison`, sorted by network, layer type and setting."""
    groups = experiments(records)
    dense = {
        (runs[0].model, runs[0].weights): {run.pair: run.top1 for run in runs}
        for runs in groups
        if runs[0].layer == "conv2d"
    }
    rows = []
    for runs in groups:
        first, top1 = runs[0], [run.top1 for run in runs]
        pairs = differences(((r.pair, r.top1) for r in runs), dense.get((first.model, first.weights), {}))
        rows.append(
            Row(
                runs=tuple(runs),
                top1=estimate(top1, within=PERCENT),
                top1_sd=stdev(top1) if len(top1) > 1 else None,
                difference=estimate(pairs) if pairs and first.layer != "conv2d" else None,
                precision=precision_words(runs),
                published=next((p for p in load_published() if p.metric == "top1" and p.fits(first)), None),
            )
        )
    order = layer_names()
    return sorted(rows, key=lambda row: (row.first.model, order.index(row.first.layer), row.first.setting))


def summarize(records: Sequence[Record]) -> pd.DataFrame:
    """`table_rows` as a frame, with the columns of the CSV files."""
    return _frame(table_rows(records))


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame([row.to_dict() for row in rows])


def markdown(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """The page of one comparison: its rows, and what one must know to read them."""
    return render(
        "table",
        task=records[0].task,
        train=records[0].config.train,
        table=pd.DataFrame([row.cells() for row in rows]).to_markdown(index=False, disable_numparse=True),
        rows=rows,
        made=made_on(record.summary for record in records),
        runs=[record.id for record in records],
    )


def write_tables(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write a Markdown and a CSV file for every group of comparable runs; return the Markdown files.

    Tables of groups that no longer have a run are removed.
    """
    groups = comparison_groups(records)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in groups and (frame := old.with_suffix(".csv")).is_file():  # both, or it isn't of these
            old.unlink()
            frame.unlink()
    written = []
    for name, group in groups.items():
        path, rows = folder / f"{name}.md", table_rows(group)
        write_csv(path.with_suffix(".csv"), _frame(rows))
        replace_file(path, markdown(rows, group).encode())
        written.append(path)
    return sorted(written)


def _of_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """A W&B run's config without what a sweep of W&B adds to it: its parameters, such as `layer.name`."""
    return {key: value for key, value in config.items() if key in ("format", "seed", *RECORDED)}


def load_wandb_records(project: str, entity: str | None = None) -> list[Record]:
    """All finished runs of a W&B project, sorted by id.

    Raises:
        ValueError: there is no API key, W&B cannot be reached, or it has no such project.
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    path = f"{entity}/{project}" if entity else project
    check_account()
    try:
        runs = wandb.Api().runs(path, lazy=False)  # lazy would fetch the runs one by one
        found = [finished_record(run.name, _of_record(run.config), dict(run.summary)) for run in runs]
        finished = {record.id: record for record in found if record}
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise ValueError(f"W&B's project {path} cannot be read: {error}") from error
    return [finished[name] for name in sorted(finished)]
