"""The tables in our pages are copies of those in results: every number is there."""

import json
import re

import pytest
from support import ROOT

from decef.results.pages import replace_between

NUMBER = r"\d+(?:\.\d+)?"


def copied(section):
    """The numbers in a section's tables that have decimals, each with whether it is half the width of an interval.

    Numbers with an interval of their own are left out: tests/test_compare.py has them.
    """
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    rows = re.sub(r"`[^`]*`|\d+\.\d+ \[[^\]]*\]", "", rows)
    return [(number, bool(half)) for half, number in re.findall(r"(± )?(\d+\.\d+)", rows)]


def sources(page, section):
    """The text of the pages in results that a section links to."""
    links = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", section)]
    return [link.read_text() for link in links if ROOT / "results" in link.parents and link.suffix == ".md"]


@pytest.mark.parametrize(("name", "tables"), [("results.md", 6), ("compress.md", 1), ("layers.md", 1)])
def test_every_number_in_a_copied_table_is_in_a_page_that_its_section_links_to(name, tables):
    page = ROOT / "docs" / name
    found = 0
    for section in re.split(r"^(?=##+ )", page.read_text(), flags=re.MULTILINE):
        text = "\n".join(sources(page, section))
        if not text:
            continue
        there = [float(number) for number in re.findall(NUMBER, text)]
        ends = re.findall(r"\[([-+]?[\d.]+), ([-+]?[\d.]+)\]", text)
        halves = [(float(high) - float(low)) / 2 for low, high in ends]
        numbers = copied(section)
        found += bool(numbers)
        for number, half in numbers:
            # Both ends of an interval are rounded in the table that it is read from.
            slack = 0.5 * 10 ** -len(number.partition(".")[2]) + 0.005 * half + 1e-9
            known = halves if half else there
            assert any(abs(one - float(number)) <= slack for one in known), (section.splitlines()[0], number)
    assert found >= tables


def test_a_table_needs_lines_to_stand_between(tmp_path):
    page = tmp_path / "page.md"
    for text in ("nothing", "<!-- x -->\nand no end", "<!-- end of x -->"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"has no lines <!-- x --> and <!-- end of x --> to put a table between"):
            replace_between(page, "x", "a table")
        assert page.read_text() == text
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    replace_between(page, "x", "new")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- end of x -->\nafter\n"


def measured(name):
    rows = json.loads((ROOT / "results" / "bench" / f"{name}-cpu.json").read_text())["rows"]
    return [row for row in rows if "network" in row]


def table(page, heading):
    """The first table under a heading, as its column names and its rows."""
    section = (ROOT / "docs" / page).read_text().split(f"\n{heading}", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]


def check(shown, value, where):
    """Whether a number in a table is the measured one, rounded."""
    places = len(shown.partition(".")[2])
    assert shown == f"{value:.{places}f}", (where, shown, value)


NAMES = {
    "ResNet-18": "torchvision/resnet18",
    "ResNet-50": "torchvision/resnet50",
    "VGG-16-BN": "vgg16_bn",
    "ResNet-20": "resnet20",
    "MobileNetV2": "torchvision/mobilenet_v2",
}


def test_the_table_of_inference_times_is_the_measured_one():
    columns, rows = table("speed.md", "## Inference")
    found = {(r["network"], r["batch"], r["precision"], r["layer"]): r for r in measured("networks")}
    network = ("", 0)
    for name, precision, dense, at_dense_speed, *shares in rows:
        if name:
            words, batch = name.rsplit(", ", 1)
            network = NAMES[words.split(" at ")[0]], int(batch)
        of = {layer.strip("`"): found.get((*network, precision, layer.strip("`"))) for layer in columns[4:]}
        seconds = found[*network, precision, "conv2d"]["deployed"]
        check(dense, 1e3 * seconds, (network, precision))
        known = [row["at_dense_speed"] for row in of.values() if row is not None]
        check(at_dense_speed, sum(known) / len(known), (network, precision))
        for share, (layer, row) in zip(shares, of.items(), strict=True):
            assert bool(share) == (row is not None), (network, precision, layer)
            if row is not None:
                check(share, row["deployed"] / seconds, (network, precision, layer))


def test_the_table_of_training_times_is_the_measured_one():
    columns, rows = table("speed.md", "## Training")
    found = {(r["network"], r["batch"], r["layer"]): r["seconds"] for r in measured("training")}
    for name, *shares in rows:
        words, batch = name.split(", ")
        network = NAMES[words], int(batch)
        for share, column in zip(shares, columns[1:], strict=True):
            layer = column.split("`")[1]
            check(share, found[*network, layer] / found[*network, "conv2d"], (network, layer))


def test_the_table_of_operators_is_the_measured_one():
    columns, rows = table("speed.md", "**Where the rest of the time goes**")
    of = [r for r in measured("operators") if (r["network"], r["precision"]) == ("torchvision/resnet18", "int8")]
    (dense,) = (sum(r["seconds"].values()) for r in of if r["layer"] == "conv2d")
    for name, total, *parts in rows:
        layer, form = [*name.replace("`", "").split(", "), "reconstructed"][:2]
        (seconds,) = (r["seconds"] for r in of if (r["layer"], r["form"]) == (layer, form))
        check(total, sum(seconds.values()) / dense, name)
        named = {column: seconds.get(column, 0.0) for column in columns[2:-1]}
        named["else"] = sum(seconds.values()) - sum(named.values())
        for part, (column, value) in zip(parts, named.items(), strict=True):
            assert part or not value, (name, column)
            if part:
                check(part, value / dense, (name, column))


def test_shares_on_the_measured_page_are_of_the_dense_network_that_they_say():
    lines = (ROOT / "results" / "bench" / "networks-cpu.md").read_text().splitlines()
    columns, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    found = {(r["network"], str(r["batch"]), r["layer"], r["precision"]): r for r in measured("networks")}
    assert len(rows) == len(found)
    for cells in rows:
        row = dict(zip(columns, cells, strict=True))
        network, precision = (row["network"], row["batch"]), row["precision"]
        here = found[*network, row["layer"], precision]
        same, full = (found[*network, "conv2d", kind] for kind in (precision, "fp32"))
        assert float(row["of dense"]) == round(here["deployed"] / same["deployed"], 2)
        assert float(row["of dense fp32"]) == round(here["deployed"] / full["deployed"], 2)
        assert float(row["torch"]) == round(here["eager"] / full["eager"], 2)
        assert float(row["memory"]) == round(here["memory"] / full["memory"], 2)
