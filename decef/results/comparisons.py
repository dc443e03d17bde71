"""Which runs are one experiment, and which experiments may be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from decef.training.record import Record, short_hash


def experiments(records: Iterable[Record]) -> list[list[Record]]:
    """Group runs into experiments: runs that differ only in the seed.

    This is what counts as one experiment everywhere: a row of a table, a curve, the evidence on a claim.

    Returns:
        The runs of each experiment, sorted by seed. The order of the experiments depends only on their configs.

    Raises:
        ValueError: two runs of one experiment have the same seed.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        seeds = groups.setdefault(json.dumps(record.experiment, sort_keys=True), {})
        other = seeds.setdefault(record.config.seed, record)
        if other is not record:
            raise ValueError(
                f"{other.id} and {record.id} are one experiment with one seed, which counts "
                "once: move one of the two away"
            )
    return [[groups[key][seed] for seed in sorted(groups[key])] for key in sorted(groups)]


def precision_words(records: Iterable[Record]) -> str:
    """The numeric precision of runs; if they differ, "mixed" and how many had which."""
    counts = Counter(str(record.summary.get("precision")) for record in records)
    if len(counts) == 1:
        return next(iter(counts))
    return "mixed: " + ", ".join(f"{n} {precision}" for precision, n in sorted(counts.items()))


def comparison_groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by `comparison`, named <dataset>-<schedule>.

    Where a schedule ran in several ways, one of them has this name, and a hash is added to the others: the one with
    most runs of those that left the precision to the hardware, which is the usual way, or if none did, of all. If two
    have as many, a hash is added to all.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.comparison, []).append(record)
    names = {c: f"{g[0].config.dataset.name}-{g[0].config.train.name}" for c, g in groups.items()}
    weights = {c: (g[0].config.train.precision == "auto", len(g)) for c, g in groups.items()}
    of_name: dict[str, list[tuple[bool, int]]] = {}
    for c, name in names.items():
        of_name.setdefault(name, []).append(weights[c])

    def unique(comparison: str, name: str) -> str:
        most = max(of_name[name])
        plain = weights[comparison] == most and of_name[name].count(most) == 1
        return name if plain else f"{name}-{short_hash(comparison)}"

    return {unique(c, name): groups[c] for c, name in names.items()}
