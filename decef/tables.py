"""Tables of results from run records, or from their mirrors in W&B."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from decef.checkpoint import replace_file
from decef.claims import load_figures, same_setting
from decef.layers import LAYERS
from decef.record import CONFIG, SUMMARY
from decef.statistics import differences, estimate

log = logging.getLogger(__name__)

ASKED = ("rank", "flops", "energy")
REPLACING = ("include", "exclude", "min_kernel_size", "factorize_classifier")  # model options about its layers
OF_LAYERS = ("atcd", "orthogonality")  # training options that belong to a low-rank layer, which Conv2d has not


@dataclass(frozen=True)
class Record:
    """A finished run: what it was and what came out."""

    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def model(self) -> str:
        """The network's name and its options that are on, but for those that say which layers are replaced."""
        config = self.config["model"]
        left_out = ("name", "dense_stem", *REPLACING, "weights_md5")
        options = [(k, v) for k, v in config.items() if k not in left_out and (k, v) != ("shortcut", "A")]
        return " ".join([config["name"], *(k if v is True else f"{k} {v}" for k, v in options)])

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
        model, layer, train = (self.config[group] for group in ("model", "layer", "train"))
        words = [self.asked]
        if layer["name"] != "conv2d":
            # The implementation is another way to compute the same function.
            words += [f"{k} {v}" for k, v in layer.items() if k not in ("name", "implementation", *ASKED)]
            words += [f"{key} {train[key]}" for key in OF_LAYERS if train.get(key)]
            words += ["stem too"] if not model.get("dense_stem") else []
            words += [f"{key} {model[key]}" for key in REPLACING if model.get(key)]
        words += [f"from weights {model['weights_md5'][:8]}"] if model.get("weights_md5") else []
        return ", ".join(words)

    @property
    def comparison(self) -> str:
        """Equal for runs that may stand in one table: same data, same network options, same training."""
        train = {key: value for key, value in self.config["train"].items() if key not in OF_LAYERS}
        same = {"dataset": self.config["dataset"], "train": train}
        return json.dumps(same, sort_keys=True)


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
        if summary.get("status") == "finished":
            records.append(Record(config, summary))
        else:
            log.info("left out: %s is %s after %s epochs", folder.name, summary.get("status"), summary.get("epochs"))
    return records


def load_wandb_records(project: str, entity: str | None = None) -> list[Record]:
    """All finished runs of a W&B project, by id.

    Raises:
        ValueError: there is no API key, or W&B cannot be reached or has no such project.
    """
    import wandb

    path = f"{entity}/{project}" if entity else project
    try:
        runs = wandb.Api().runs(path)
        found = [Record(dict(run.config), dict(run.summary)) for run in runs]
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(f"W&B's project {path} cannot be read: {error}") from error
    return sorted((r for r in found if r.summary.get("status") == "finished"), key=lambda r: r.summary["id"])


def summarize(records: Sequence[Record]) -> pd.DataFrame:
    """A row per network, layer type and setting: top-1 over seeds, costs, each also as a ratio to Conv2d.

    All records must share one `comparison`. `top1_sd` is the sample standard deviation, and `top1_low` to `top1_high`
    the 95 % interval of the mean; both are missing for one run. `top1_minus_conv2d` is the mean difference over the
    `paired` seeds that Conv2d ran with too, with its interval; missing for Conv2d and where there is no such seed.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.model, record.config["layer"]["name"], record.setting), []).append(record)
    rows = []
    for (model, layer, setting), runs in groups.items():
        top1 = pd.Series([run.summary["test_top1"] for run in runs])
        summary = runs[0].summary
        known = next((f for f in load_figures() if f.metric == "top1" and same_setting(f, runs[0])), None)
        dense = {r.config["seed"]: r.summary["test_top1"] for r in groups.get((model, "conv2d", "dense"), [])}
        pairs = differences(((r.config["seed"], r.summary["test_top1"]) for r in runs), dense)
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


def markdown(frame: pd.DataFrame, records: Sequence[Record]) -> str:
    """`summarize`'s frame for people, with what they must know to read it."""
    first = records[0]
    train, dataset = first.config["train"], first.config["dataset"]
    published = frame.dropna(subset="published_top1")
    rows = []
    for row in frame.to_dict("records"):
        rows.append(
            {
                "network": row["model"],
                "layer": row["layer"],
                "setting": row["setting"],
                "top-1 %": _mean_sd(row["top1"], row["top1_sd"]),
                "95 % interval": _interval(row["top1_low"], row["top1_high"], ".2f"),
                "n": row["n"],
                "vs Conv2d": _difference(row),
                "params": f"{row['params']:,}",
                "x dense": f"{row['params_ratio']:.3f}",
                "of them trained": f"{row['trainable_params']:,}",
                "MFLOPs": f"{row['flops'] / 1e6:.2f}",
                "x dense ": f"{row['flops_ratio']:.3f}",
                "published top-1": "-" if pd.isna(row["published_top1"]) else f"{row['published_top1']:.2f}",
            }
        )
    hardware = sorted({f"{r.summary['device']} ({r.summary['machine']})" for r in records})
    commits = sorted({f"{str(r.summary['git_commit'])[:10]}{'+' * bool(r.summary['git_dirty'])}" for r in records})
    lines = [
        f"# {dataset['name']}, schedule `{train['name']}`",
        "",
        f"{train['epochs']} epochs, batch {train['batch_size']}, {train['schedule']} schedule. Top-1 is the test "
        "accuracy of the last epoch, mean ± sd over n seeds, with the mean's Student t interval; nothing was chosen on "
        "the test set. Against Conv2d: the mean difference over the seeds that both ran with, and its 95 % interval. "
        "FLOPs = 2 x MACs, of one image through the network as deployed (factorised layers as their chains); "
        "parameters likewise. The published column is somebody else's figure with another training; - where we know of "
        "none.",
        "",
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
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
    groups = by_comparison(records)
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


def by_comparison(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The groups of runs that may stand in one table, by the table's name."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.comparison, []).append(record)
    names = _names(groups)
    return {names[comparison]: group for comparison, group in groups.items()}


def _names(groups: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """`<dataset>-<schedule>`, with a hash where one schedule was run with different settings."""
    plain = {c: f"{g[0].config['dataset']['name']}-{g[0].config['train']['name']}" for c, g in groups.items()}
    taken = list(plain.values())
    return {
        c: name if taken.count(name) == 1 else f"{name}-{hashlib.sha256(c.encode()).hexdigest()[:8]}"
        for c, name in plain.items()
    }


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
