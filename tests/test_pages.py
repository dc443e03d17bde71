"""The tables in our pages are copies of those in results: every number is there."""

import re

import pytest
from support import ROOT

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


@pytest.mark.parametrize(("name", "tables"), [("results.md", 6), ("speed.md", 2), ("compress.md", 1), ("layers.md", 1)])
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
