"""Write claims, tables, charts and runs as one page, results/report.html: python scripts/report.py [--results DIR]."""

import argparse
import logging
from pathlib import Path

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="the results folder; report.html is written there",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from decef.files import replace_file
    from decef.results.claims import judge_all
    from decef.results.report import build

    runs = arguments.results / "runs"
    try:
        records, verdicts = judge_all(arguments.results)
    except ValueError as error:
        fail(str(error))
    if not records:
        fail(f"there is no finished run in {runs}: train something first, make quickstart for one")
    path = arguments.results / "report.html"
    replace_file(path, build(records, verdicts).encode())
    print(f"wrote {path}: {len(records)} runs, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
