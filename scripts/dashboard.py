"""Make or update a project's workspace in W&B: python scripts/dashboard.py [--dry-run]."""

import argparse
import json

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", default="decef", help="W&B project")
    parser.add_argument("--entity", help="W&B entity; default: the account's")
    parser.add_argument("--dry-run", action="store_true", help="print what would be saved; needs no account")
    arguments = parser.parse_args()

    from decef.results.dashboard import save, spec

    try:
        if arguments.dry_run:
            print(json.dumps(spec(arguments.project, arguments.entity or ""), indent=2))
        else:
            print(save(arguments.project, arguments.entity))
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
