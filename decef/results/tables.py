"""Tables of results from run records, or from their mirrors in W&B."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from decef.layers import LAYERS
from decef.results.claims import load_figures, same_setting
from decef.results.statistics import differences, estimate
from decef.training.checkpoint import replace_file
from decef.training.record import CONFIG, FORMAT, SUMMARY, identity
from decef.training.run import DEFAULT_DECAY, OF_REPLACEMENT
from decef.training.tracking import check_account

log = logging.getLogger(__name__)

ASKED = ("rank", "flops", "energy")
OF_LAYERS = ("atcd", "decay")  # training options that belong to a low-rank layer, which Conv2d has not
#: Dataset options that make another task of it, and what they are in the task that the dataset's name stands for.
TASKS: dict[str, Mapping[str, Any]] = {
    "split_test": {},
    "as_published": {},
    "train_size": {},
    "size": {"imagenet": 224},
    "num_classes": {"imagenet": 1000},
}


@dataclass(frozen=True)
class Record:
    """A finished run: what it was and what came out."""

    config: dict[str, Any]
    summary: dict[str, Any]

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """What the run is but for its seed: its config without what cannot have an effect, see `decef.training.record`."""
        return {key: value for key, value in identity(self.config).items() if key != "seed"}

    @property
    def pair(self) -> tuple[int, str | None]:
        """What a run that it may be compared with one to one has in common: seed and numeric precision."""
        return self.config["seed"], self.summary.get("precision")

    @property
    def task(self) -> str:
        """The dataset, and what makes this another task than the one that its name stands for."""
        return " ".join([self.config["dataset"]["name"], *self._task_options])

    @property
    def _task_options(self) -> list[str]:
        data = self.experiment["dataset"]
        others = {key: data.get(key) for key, usual in TASKS.items() if data.get(key) != usual.get(data["name"])}
        return [key if value is True else f"{key} {value}" for key, value in others.items()]

    @property
    def model(self) -> str:
        """The network's name and its options that are on, but for those that say which layers are replaced."""
        left_out = ("name", *OF_REPLACEMENT, "weights_md5")
        model = self.experiment["model"]
        options = [(k, v) for k, v in model.items() if k not in left_out and (k, v) != ("shortcut", "A")]
        return " ".join([model["name"], *(k if v is True else f"{k} {v}" for k, v in options)])

    @property
    def weights(self) -> str | None:
        """MD5 of the trained weights that the run began from."""
        return self.experiment["model"].get("weights_md5")

    @property
    def layer(self) -> str:
        """The layer type."""
        return str(self.config["layer"]["name"])

    @property
    def asked(self) -> str:
        """How much of the layer was asked for: "dense", "rank 4", "energy 0.63" or "0.667 of FLOPs"."""
        layer = self.config["layer"]
        if layer["name"] == "conv2d":
            return "dense"
        if layer.get("rank"):
            return f"rank {layer['rank']}"
        return f"energy {layer['energy']:g}" if layer.get("energy") else f"{layer['flops']:g} of FLOPs"

    @property
    def setting(self) -> str:
        """`asked`, and all else that sets a run apart from others of its network, layer type and training."""
        model, layer, train = (self.experiment[group] for group in ("model", "layer", "train"))
        words = [self.asked]
        if self.layer != "conv2d":
            words += [f"{k} {v}" for k, v in layer.items() if k not in ("name", *ASKED)]
            words += [f"{key} {train[key]}" for key in OF_LAYERS if key in train and train[key] != DEFAULT_DECAY]
            words += ["stem too"] if not model.get("dense_stem") else []
            words += [f"{key} {model[key]}" for key in OF_REPLACEMENT if key != "dense_stem" and key in model]
        words += [f"from weights {self.weights[:8]}"] if self.weights else []
        return ", ".join([*words, *self._task_options])

    @property
    def comparison(self) -> str:
        """Equal for runs that may stand in one table: same data, same training."""
        train = {key: value for key, value in self.experiment["train"].items() if key not in OF_LAYERS}
        return json.dumps({"dataset": self.experiment["dataset"], "train": train}, sort_keys=True)


def experiments(records: Iterable[Record]) -> list[list[Record]]:
    """Runs that differ in the seed alone, by seed, in an order that depends on the configs alone.

    This is what counts as one experiment everywhere: a row of a table, a curve, the evidence on a claim.

    Raises:
        ValueError: a seed stands twice among the runs of one experiment, which would count as two.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        seeds = groups.setdefault(json.dumps(record.experiment, sort_keys=True), {})
        other = seeds.setdefault(record.config["seed"], record)
        if other is not record:
            raise ValueError(
                f"{other.summary['id']} and {record.summary['id']} are one experiment with one seed, which counts "
                "once: move one of the two away"
            )
    return [[groups[key][seed] for seed in sorted(groups[key])] for key in sorted(groups)]


def precision_words(records: Iterable[Record]) -> str:
    """The numeric precision of runs, or "mixed" and how many had which."""
    counts = Counter(str(record.summary.get("precision")) for record in records)
    if len(counts) == 1:
        return next(iter(counts))
    return "mixed: " + ", ".join(f"{n} {precision}" for precision, n in sorted(counts.items()))


def load_records(results: Path) -> list[Record]:
    """All finished runs in a results folder, by id. What is unreadable or not finished is logged and left out."""
    records = []
    for folder in sorted((results / "runs").glob("*")):
        try:
            summary = json.loads((folder / SUMMARY).read_text())
            config = yaml.safe_load((folder / CONFIG).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("left out: %s cannot be read (%s)", folder, error)
            continue
        if config.get("format") != FORMAT:
            log.warning("left out: %s has format %s, not %s", folder, config.get("format", 1), FORMAT)
        elif summary.get("status") == "finished":
            records.append(Record(_plain(config), summary))
        else:
            log.info("left out: %s is %s after %s epochs", folder.name, summary.get("status"), summary.get("epochs"))
    return records


def load_wandb_records(project: str, entity: str | None = None) -> list[Record]:
    """All finished runs of a W&B project, by id.

    Raises:
        ValueError: there is no API key, or W&B cannot be reached or has no such project.
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    path = f"{entity}/{project}" if entity else project
    check_account()
    try:
        runs = wandb.Api().runs(path, lazy=False)  # lazy would ask for every run's config and summary one by one
        found = [Record(_plain(run.config), dict(run.summary)) for run in runs]
        finished = {r.summary["id"]: r for r in found if r.summary.get("status") == "finished"}
    except (wandb.errors.Error, WandbApiFailedError, ValueError) as error:
        raise ValueError(f"W&B's project {path} cannot be read: {error}") from error
    return [finished[name] for name in sorted(finished)]


def _plain(value: Any) -> Any:
    """A config as W&B returns it: whole floats are ints, so that a run reads the same from wherever it comes."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def comparison_groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one `comparison` each, by `<dataset>-<schedule>`: with a hash where a schedule ran in several ways."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.comparison, []).append(record)
    plain = {c: f"{g[0].config['dataset']['name']}-{g[0].config['train']['name']}" for c, g in groups.items()}
    taken = list(plain.values())
    return {
        name if taken.count(name) == 1 else f"{name}-{hashlib.sha256(c.encode()).hexdigest()[:8]}": groups[c]
        for c, name in plain.items()
    }


def summarize(records: Sequence[Record]) -> pd.DataFrame:
    """A row per network, layer type and setting: top-1 over seeds, costs, each also as a ratio to Conv2d.

    All records must share one `comparison`. `top1_sd` is the sample standard deviation, and `top1_low` to `top1_high`
    the 95 % interval of the mean; both are missing for one run. `top1_minus_conv2d` is the mean difference over the
    `paired` seeds that Conv2d ran with too, in the same precision and from the same weights, with its interval; missing
    for Conv2d and where there is no such seed.
    """
    groups = experiments(records)
    dense = {
        (runs[0].model, runs[0].weights): {run.pair: run.summary["test_top1"] for run in runs}
        for runs in groups
        if runs[0].layer == "conv2d"
    }
    rows = []
    for runs in groups:
        model, layer, setting = runs[0].model, runs[0].layer, runs[0].setting
        top1 = pd.Series([run.summary["test_top1"] for run in runs])
        summary = runs[0].summary
        known = next((f for f in load_figures() if f.metric == "top1" and same_setting(f, runs[0])), None)
        pairs = differences(((r.pair, r.summary["test_top1"]) for r in runs), dense.get((model, runs[0].weights), {}))
        mean = estimate(list(top1))
        difference = estimate(pairs) if pairs and layer != "conv2d" else None
        rows.append(
            {
                "model": model,
                "layer": layer,
                "setting": setting,
                "top1": mean.mean,
                "top1_sd": top1.std(ddof=1),
                "top1_low": mean.low,
                "top1_high": mean.high,
                "n": len(runs),
                "top1_minus_conv2d": difference.mean if difference else None,
                "difference_low": difference.low if difference else None,
                "difference_high": difference.high if difference else None,
                "paired": difference.n if difference else 0,
                "precision": precision_words(runs),
                "params": summary["params"],
                "params_ratio": summary["params"] / summary["dense"]["params"],
                "trainable_params": summary["trainable_params"],
                "macs": summary["macs"],
                "flops": summary["flops"],
                "flops_ratio": summary["flops"] / summary["dense"]["flops"],
                "images_per_second": pd.Series([run.summary["images_per_second"] for run in runs]).mean(),
                "published_top1": known.value if known else None,
                "published_source": f"{known.where}{f'; {known.training}' if known.training else ''}"
                if known
                else None,
                "runs": " ".join(run.summary["id"] for run in runs),
            }
        )
    frame = pd.DataFrame(rows)
    order = frame.layer.map(list(LAYERS).index)
    return (
        frame.assign(order=order)
        .sort_values(["model", "order", "setting"])
        .drop(columns="order")
        .reset_index(drop=True)
    )


def cells(row: Mapping[Any, Any]) -> dict[str, str]:
    """A row of `summarize`'s frame as people read it: texts by column title."""
    return {
        "network": row["model"],
        "layer": row["layer"],
        "setting": row["setting"],
        "top-1 %": _mean_sd(row["top1"], row["top1_sd"]),
        "95 % interval": _interval(row["top1_low"], row["top1_high"], ".2f"),
        "n": str(row["n"]),
        "vs Conv2d": _difference(row),
        "precision": row["precision"],
        "params": f"{row['params']:,}",
        "x dense": f"{row['params_ratio']:.3f}",
        "of them trained": f"{row['trainable_params']:,}",
        "MFLOPs": f"{row['flops'] / 1e6:.2f}",
        "x dense ": f"{row['flops_ratio']:.3f}",
        "published top-1": "-" if pd.isna(row["published_top1"]) else f"{row['published_top1']:.2f}",
    }


def markdown(frame: pd.DataFrame, records: Sequence[Record]) -> str:
    """`summarize`'s frame for people, with what they must know to read it."""
    first = records[0]
    train = first.config["train"]
    published = frame.dropna(subset="published_top1")
    hardware = sorted({f"{r.summary['device']} ({r.summary['machine']})" for r in records})
    sources = {(str(r.summary.get("git_commit")), bool(r.summary.get("git_dirty"))) for r in records}
    commits = sorted(f"{commit[:10]}{'+' * dirty}" for commit, dirty in sources)
    lines = [
        f"# {first.task}, schedule `{train['name']}`",
        "",
        f"{train['epochs']} epochs, batch {train['batch_size']}, {train['schedule']} schedule. Top-1 is the test "
        "accuracy of the last epoch, mean ± sd over n seeds, with the mean's Student t interval; nothing was chosen on "
        "the test set. Against Conv2d: the mean difference over the seeds that both ran with, in the same precision, "
        "and its 95 % interval. FLOPs = 2 x MACs, of one image through the network as deployed (factorised layers as "
        "their chains); "
        "parameters likewise. The published column is somebody else's figure with another training; - where we know of "
        "none.",
        "",
        pd.DataFrame(map(cells, frame.to_dict("records"))).to_markdown(index=False, disable_numparse=True),
        "",
        *(
            f"- published, {row['model']} {row['layer']} ({row['setting']}): {row['published_source']}"
            for row in published.to_dict("records")
        ),
        f"- ran on {'; '.join(hardware)}",
        f"- from commit {', '.join(commits)} (+: with uncommitted changes)",
        f"- runs: {', '.join(r.summary['id'] for r in records)}",
        "",
    ]
    return "\n".join(lines)


def write_tables(records: Sequence[Record], folder: Path) -> list[Path]:
    """A Markdown and a CSV file for every group of runs that may be compared; returns the Markdown files.

    Tables of groups that no longer have a run are removed.
    """
    groups = comparison_groups(records)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.md"), *folder.glob("*.csv")):
        if old.stem not in groups:
            old.unlink()
    written = []
    for name, group in groups.items():
        frame = summarize(group)
        path = folder / f"{name}.md"
        replace_file(path.with_suffix(".csv"), frame.round(6).to_csv(index=False).encode())
        replace_file(path, markdown(frame, group).encode())
        written.append(path)
    return sorted(written)


def _interval(low: float, high: float, format_spec: str) -> str:
    return "" if pd.isna(low) else f"[{low:{format_spec}}, {high:{format_spec}}]"


def _difference(row: Mapping[Any, Any]) -> str:
    if not row["paired"]:
        return ""
    interval = _interval(row["difference_low"], row["difference_high"], "+.2f")
    fewer = f"(n={row['paired']})" if row["paired"] < row["n"] else ""
    return " ".join(filter(None, [f"{row['top1_minus_conv2d']:+.2f}", interval, fewer]))


def _mean_sd(mean: float, sd: float) -> str:
    return f"{mean:.2f}" if pd.isna(sd) else f"{mean:.2f} ± {sd:.2f}"
