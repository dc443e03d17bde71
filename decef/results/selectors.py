"""Which runs a claim is about, and which they are compared with, as config values by dotted key."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

import yaml

from decef.layers import LAYERS
from decef.models import MODELS
from decef.results.comparisons import experiments
from decef.training.config import DEFAULT_DECAY, GROUPS, REPLACEMENT_OPTIONS
from decef.training.record import DATA_PLACES, LAYER_TRAINING, RANK_SETTINGS, RECORDED, Record


def selects(selector: Mapping[str, Any], record: Record) -> bool:
    """Whether a run has the selector's values. A list means any of them, for text in the run too; text may have *;
    null and false mean off."""
    return all(
        any(_fits(_get(record.settings, key), value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for key, wanted in selector.items()
    )


def read_selector(words: Iterable[str]) -> dict[str, Any]:
    """A selector from overrides: `layer=decef,cpac train=quick` selects by `layer.name` and `train.name`.

    Raises:
        ValueError: a word is no `key=value`, its key is no setting of runs, or its value cannot be read.
    """
    selector: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = f"{key}.name" if key in GROUPS else key
        if not equals or not is_setting(key):
            raise ValueError(f"{word} selects no runs: write settings of theirs, such as layer=decef or train=standard")
        try:
            values = [_value(value) for value in text.split(",")]
        except yaml.YAMLError as error:
            raise ValueError(f"{word} cannot be read: write single values with commas between them") from error
        selector[key] = values if len(values) > 1 or isinstance(values[0], list) else values[0]
    return selector


def is_setting(key: str) -> bool:
    """Whether a dotted key names a setting that records have, or an option of a network or layer type here."""
    group, _, name = key.partition(".")
    if group not in RECORDED:
        return key == "seed"
    kinds: Mapping[str, Iterable[Callable[..., object]]] = {"model": MODELS.values(), "layer": LAYERS.values()}
    own = {f.name for f in fields(GROUPS[group])}
    if group == "dataset":
        own -= set(DATA_PLACES)
    parameters = [p for kind in kinds.get(group, ()) for p in inspect.signature(kind).parameters.values()]
    if group == "layer":  # the others are those of the convolution that is replaced
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    else:  # these follow from the dataset
        options = {p.name for p in parameters} - {"num_classes", "in_channels", "image_size"}
    return name in own | options


def _value(text: str) -> Any:
    """As Hydra reads it: 1e-4 is a number to it, which YAML 1.1 takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        values = value if isinstance(value, (list, tuple)) else [value]
        return any(isinstance(one, str) and fnmatchcase(one, wanted) for one in values)
    return bool((value or None) == (wanted or None))  # off is null, false, 0 or missing


def _get(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def chosen(
    records: Iterable[Record],
    runs: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    shares: Mapping[str, Sequence[float]],
) -> Iterator[Record]:
    """The runs that `runs` selects, whose costs lie within `shares`, and that are not the control."""
    for record in records:
        within = all(low <= record.ratio(key) <= high for key, (low, high) in shares.items())
        if within and selects(runs, record) and not (control and selects(control, record)):
            yield record


def twin_key(record: Record, runs: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """A key that a run and its control share: all that must be the same in both, see `decef.results.findings`."""
    free = {*control, *(f"train.{key}" for key in LAYER_TRAINING)}
    ranks = {f"layer.{key}" for key in RANK_SETTINGS}
    if ranks & free:  # whoever names a rank means it in place of the runs' budget
        free |= ranks
    if "model.weights" in control:  # a run is known by what is in the file
        free |= {"model.weights_md5"} if control["model.weights"] else {"model.weights_md5", "model.decompose_on"}
    kept: dict[str, dict[str, Any]] = {
        group: {key: value for key, value in values.items() if f"{group}.{key}" not in free}
        for group, values in record.experiment.items()
    }
    type_of_runs = runs.get("layer.name")
    if control.get("layer.name", type_of_runs) != type_of_runs:  # but for ranks, a type's options are its own
        kept["layer"] = {key: value for key, value in kept["layer"].items() if key in RANK_SETTINGS}
    if control.get("layer.name") == "conv2d":  # Conv2d replaces no layer
        del kept["layer"]
        without = (*REPLACEMENT_OPTIONS, "decompose_on")
        kept["model"] = {key: value for key, value in kept["model"].items() if key not in without}
    return json.dumps(kept, sort_keys=True)


def with_controls(
    records: Sequence[Record],
    runs: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    shares: Mapping[str, Sequence[float]],
) -> Iterator[tuple[list[Record], list[Record]]]:
    """The experiments that `chosen` finds, each with its control's runs: none if there is no control.

    The control has the default weight decay, unless it names another.

    Raises:
        ValueError: an experiment has several as its control.
    """
    controls: dict[str, list[list[Record]]] = {}
    if control:
        usual = {} if "train.decay" in control else {"train.decay": [None, DEFAULT_DECAY]}
        for group in experiments(r for r in records if selects({**control, **usual}, r)):
            controls.setdefault(twin_key(group[0], runs, control), []).append(group)
    for group in experiments(chosen(records, runs, control, shares)):
        found = controls.get(twin_key(group[0], runs, control), []) if control else []
        if control and len(found) > 1:
            both = f"{found[0][0].id} and {found[1][0].id}"
            raise ValueError(f"both {both} are the control {selector_words(control)}: narrow it")
        yield group, found[0] if found else []


def selector_words(selector: Mapping[str, Any]) -> str:
    """A selector as command-line overrides in backticks, or a layer alone by its name."""
    if list(selector) == ["layer.name"] and isinstance(selector["layer.name"], str):
        return str(selector["layer.name"])
    words = []
    for key, value in selector.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"{key.removesuffix('.name')}={','.join(json.dumps(v).strip(chr(34)) for v in values)}")
    return f"`{' '.join(words)}`"
