"""Markdown files from the templates in `templates/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from decef.files import replace_file, write_csv, write_json

Row = TypeVar("Row", bound=Mapping[str, Any])


def render(template: str, **values: Any) -> str:
    """Fill in the page `templates/<template>.md.j2`."""
    environment = Environment(
        loader=PackageLoader("decef.results"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the pages are Markdown, and all text in them is ours
    )
    return environment.get_template(f"{template}.md.j2").render(**values).rstrip("\n") + "\n"


def made_on(sources: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The `machines` and `commits` that records come from, each once; + marks commits with uncommitted changes."""
    known = [session for source in sources for session in (*source.get("earlier_sessions", []), source)]
    machines = {f"{source['device']} ({source['machine']})" for source in known}
    commits = {f"{str(source.get('git_commit'))[:10]}{'+' * bool(source.get('git_dirty'))}" for source in known}
    return {"machines": sorted(machines), "commits": sorted(commits)}


def provenance(made: Mapping[str, Any], *more: str) -> str:
    """Where, when and from which code something was measured, in a sentence."""
    changed = " with uncommitted changes" if made.get("git_dirty") else ""
    commit = f"Commit {str(made.get('git_commit'))[:10]}{changed}"
    gpu = [made["device"]] if made.get("device", "cpu") != "cpu" else []
    return f"{', '.join([commit, made['started'], *more, *gpu, made['machine']])}."


def collect(rows: Iterable[Row], out: Path, show: Callable[[Row], None]) -> list[Row]:
    """All rows of a measurement. Until its page is written, what was measured is kept in <out>.partial.jsonl.

    So is what earlier attempts measured, before it.

    Args:
        rows: as they are measured.
        out: path of the page without ending.
        show: called with every row.

    Raises:
        ValueError: there is no row.
    """
    path = _partial(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    for row in rows:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        found.append(row)
        show(row)
    if not found:
        raise ValueError("nothing of what was asked for can be measured: see the lines above")
    return found


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.jsonl")


def write_bench(
    template: str, rows: Sequence[Mapping[str, Any]], out: Path, made: Mapping[str, Any], **values: Any
) -> None:
    """Write measured rows and their environment as <out>.json, and the template's page as <out>.md.

    Args:
        template: see `render`.
        rows: what was measured.
        out: path without ending.
        made: where, when and with which code, see `environment`; with `dtype`, and `share` of the dense FLOPs.
        **values: for the template.
    """
    write_json(out.with_name(f"{out.name}.json"), {"environment": made, "rows": rows})
    share = f"{made['share']:g} of the FLOPs"
    text = render(template, provenance=provenance(made, made["dtype"], share), **values)
    replace_file(out.with_name(f"{out.name}.md"), text.encode())
    _partial(out).unlink(missing_ok=True)


def write_measured(
    template: str, frame: pd.DataFrame, shown: pd.DataFrame, out: Path, about: str, made: Mapping[str, Any]
) -> None:
    """Write measured rows as <out>.csv, and the template's page with a table of them as <out>.md.

    Args:
        template: see `render`.
        frame: what was measured.
        shown: the table of the page.
        out: path without ending.
        about: what the rows were made from, in words.
        made: where, when and with which code, see `environment`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(out.with_name(f"{out.name}.csv"), frame)
    text = render(template, table=shown.to_markdown(index=False), about=about, provenance=provenance(made))
    replace_file(out.with_name(f"{out.name}.md"), text.encode())
    _partial(out).unlink(missing_ok=True)


def replace_between(path: Path, name: str, text: str) -> None:
    """Replace what stands in a file between the lines `<!-- name -->` and `<!-- end of name -->` by `text`.

    Raises:
        ValueError: the file has no such lines.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, mark, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not mark or not found:
        raise ValueError(f"{path} has no lines {begin.strip()} and {end} to put a table between")
    replace_file(path, f"{before}{begin}{text}\n{end}{after}".encode())
