"""Judge the papers' claims by the run records and write results/CLAIMS.md: python scripts/claims.py [--results DIR]."""

import argparse
import logging
from pathlib import Path

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from decef.files import replace_file
    from decef.results.claims import judge_all
    from decef.results.claims_page import markdown

    if not any((arguments.results / made).is_dir() for made in ("runs", "ranks")):
        fail(f"{arguments.results} is no folder of results: train something first, or name another with --results")
    try:
        _, verdicts = judge_all(arguments.results)
    except ValueError as error:
        fail(str(error))
    for claim, verdict in verdicts:
        print(f"{claim.id:28} {verdict.verdict}")
    path = arguments.results / "CLAIMS.md"
    replace_file(path, markdown(verdicts).encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
