"""Markdown files from the templates in `templates/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from decef.training.checkpoint import replace_file


def render(template: str, **values: Any) -> str:
    """A page of `templates/<template>.md.j2`."""
    folder = files("decef.results") / "templates"
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith(".j2")}
    environment = Environment(
        loader=DictLoader(sources),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown is for people and no page of untrusted text
    )
    return environment.get_template(f"{template}.md.j2").render(**values).rstrip("\n") + "\n"


def made_on(sources: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Where and from which code measurements come, without doublets: `machines` and `commits`, + after changed code."""
    known = list(sources)
    machines = {f"{source['device']} ({source['machine']})" for source in known}
    commits = {f"{str(source.get('git_commit'))[:10]}{'+' * bool(source.get('git_dirty'))}" for source in known}
    return {"machines": sorted(machines), "commits": sorted(commits)}


def write_bench(
    template: str, rows: Sequence[Mapping[str, Any]], out: Path, made: Mapping[str, Any], **values: Any
) -> None:
    """Write measured rows and where they were made as <out>.json, and the template's page as <out>.md."""
    data = json.dumps({"environment": made, "rows": rows}, indent=1) + "\n"
    replace_file(out.with_suffix(".json"), data.encode())
    text = render(template, made=made_on([made]), started=made["started"], dtype=made["dtype"], **values)
    replace_file(out.with_suffix(".md"), text.encode())
