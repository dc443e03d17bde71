"""Upload the runs that W&B doesn't have yet: python scripts/sync.py [--results FOLDER]."""

import argparse
import os
import sys
from pathlib import Path

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with runs/")
    arguments = parser.parse_args()

    from decef.training.tracking import offline_runs, upload

    folders = offline_runs(arguments.results)
    if not folders:
        print(f"nothing to upload: {arguments.results / 'runs'} has no run that was mirrored offline")
        return
    try:
        uploaded = upload(folders)
    except ValueError as error:
        fail(str(error))
    for folder in uploaded:
        print(f"uploaded {folder.parents[1].name}")
    left = [os.path.relpath(folder) for folder in folders if folder not in uploaded]
    if left:
        sys.exit(f"{len(left)} of {len(folders)} runs could not be uploaded: {', '.join(left)}")


if __name__ == "__main__":
    main()
