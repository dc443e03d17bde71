"""Values that the papers and their authors' code report, each with its source; `published.yaml` holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from decef.training.record import Record

STATUSES = ("verified", "verified-code")


@dataclass(frozen=True)
class Published:
    """One published or logged value. `published.yaml` explains the fields."""

    id: str
    paper: str
    layer: str
    network: str
    dataset: str
    metric: str
    setting: str
    value: float
    where: str
    status: str
    training: str = ""

    @property
    def source(self) -> str:
        """Where the value is from, and how that network was trained."""
        return "; ".join(filter(None, [self.where, self.training]))

    def fits(self, record: Record) -> bool:
        """Whether a run has this value's task, network, layer and rank setting; other options may differ."""
        ours = (record.task, record.model, record.layer, record.rank_setting)
        return ours == (self.dataset, self.network, self.layer, self.setting)


@cache
def load_papers() -> dict[str, str]:
    """Citations by paper key."""
    return dict(_read()["papers"])


@cache
def load_published() -> tuple[Published, ...]:
    """All published and logged values, in the file's order.

    Raises:
        ValueError: a value has an unknown field, paper or status, or is there twice.
    """
    published, seen = [], set()
    for entry in _read()["published"]:
        fields = {key: value for key, value in entry.items() if key != "values"}
        for setting, value in entry.get("values", {}).items():
            layer = "conv2d" if setting == "dense" else fields.get("layer")
            try:
                one = Published(**{**fields, "layer": layer, "setting": setting, "value": float(value)})
            except (TypeError, ValueError) as error:
                raise ValueError(f"published.yaml: {fields.get('id')} cannot be read: {error}") from error
            for what, name, known in (("paper", one.paper, load_papers()), ("status", one.status, STATUSES)):
                if name not in known:
                    raise ValueError(f"published.yaml: {one.id} has {what} '{name}'; there are {', '.join(known)}")
            key = (one.id, one.dataset, one.network, one.metric, setting)
            if key in seen:
                raise ValueError(f"published.yaml: {' '.join(filter(None, key))} stands there twice")
            seen.add(key)
            published.append(one)
    return tuple(published)


@cache
def load_known_weights() -> dict[str, str]:
    """Names of the networks whose trained weights others published, by the MD5 of their files.

    Raises:
        ValueError: an entry of `published.yaml` names no network.
    """
    try:
        return {str(md5): str(entry["network"]) for md5, entry in _read()["weights"].items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"published.yaml: its weights cannot be read: {error}") from error


def published_lines(published: Iterable[Published]) -> list[str]:
    """The values in words, a line per fact and metric."""
    lines: dict[str, list[str]] = {}
    for one in published:
        value = f"{one.value:,.0f}" if one.value >= 1e4 else f"{one.value:g}"
        about = f"{one.id}, {one.network} on {one.dataset}, {one.metric} ({one.source})"
        lines.setdefault(about, []).append(f"{one.setting}: {value}")
    return [f"{about}: {'; '.join(values)}" for about, values in lines.items()]


@cache
def _read() -> dict[str, Any]:
    return dict(yaml.safe_load((files("decef.results") / "published.yaml").read_text()))
