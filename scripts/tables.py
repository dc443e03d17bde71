"""Write results/tables from run records: python scripts/tables.py [--source wandb] [--print NAME]."""

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
        help="folder with runs/; tables/ or tables-wandb/ is written there too",
    )
    parser.add_argument("--source", choices=["local", "wandb"], default="local", help="where the run records are")
    parser.add_argument("--project", default="decef", help="W&B project")
    parser.add_argument("--entity", help="W&B entity; default: the account's")
    parser.add_argument("--readme", type=Path, help="also put the overview between this file's <!-- results --> lines")
    parser.add_argument(
        "--print", metavar="NAME", help="also print tables whose names begin with NAME; 'all': every table"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from decef.results.overview import overview_table
    from decef.results.pages import replace_between
    from decef.results.tables import load_wandb_records, write_tables
    from decef.training.record import load_records

    try:
        if arguments.source == "wandb":
            records = load_wandb_records(arguments.project, arguments.entity)
        else:
            records = load_records(arguments.results)
    except ValueError as error:
        fail(str(error))
    if not records:
        where = "the project on W&B" if arguments.source == "wandb" else arguments.results / "runs"
        fail(f"there is no finished run in {where}: train something first, make quickstart for one")
    try:
        # A project on W&B may have fewer runs, and tables of what it lacks are not to be removed here.
        folder = "tables" if arguments.source == "local" else "tables-wandb"
        written = write_tables(records, arguments.results / folder)
        if arguments.readme:
            replace_between(arguments.readme, "results", overview_table(records, arguments.results))
    except (ValueError, OSError) as error:
        fail(str(error))
    for path in written:
        if arguments.print and (arguments.print == "all" or path.name.startswith(arguments.print)):
            print(path.read_text())
        print(f"wrote {path} and {path.with_suffix('.csv').name}")


if __name__ == "__main__":
    main()
