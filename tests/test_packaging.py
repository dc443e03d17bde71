"""What is imported is declared in pyproject.toml, and constraints.txt pins it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = packages_distributions()
EXTRAS = ("train", "deploy", "results")


def plain(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imported(folder):
    """Names of distributions by what imports them."""
    own = {"decef", *(path.stem for name in ("scripts", "tests") for path in (ROOT / name).glob("*.py"))}
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own - sys.stdlib_module_names:
                found.setdefault(plain(DISTRIBUTIONS.get(name, [name])[0]), path.name)
    return found


@pytest.mark.parametrize("folder", ["decef", "scripts", "tests"])
def test_what_is_imported_is_declared_and_pinned(folder):
    optional = PROJECT["optional-dependencies"]
    known = [*PROJECT["dependencies"], *(entry for extra in EXTRAS for entry in optional[extra])]
    declared = {plain(entry) for entry in (known + optional["dev"] if folder == "tests" else known)}
    there = imported(folder)
    assert len(there) > 3
    assert not {name: path for name, path in there.items() if name not in declared}
    pins = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    assert not set(there) - pins
