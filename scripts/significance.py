"""Measure what CPAC's components are worth: remove them one by one from trained networks.

python scripts/significance.py results/runs/<run of layer=cpac> ... --out results/significance
"""

import argparse
from pathlib import Path

from cli import fail, output_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that still have their checkpoints")
    parser.add_argument("--root", type=Path, help="folder with the data; default: as for training")
    parser.add_argument(
        "--out", type=output_folder, default=Path("results/significance"), help="folder for <run id>.csv, .json"
    )
    arguments = parser.parse_args()

    from decef.files import write_csv, write_json
    from decef.machine import environment
    from decef.results.significance import removal_table
    from decef.training.networks import load_network
    from decef.training.record import load_config

    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs:
        try:
            data = load_config(run).dataset.dataset()
            model = load_network(str(run))
            _, test = data.load(arguments.root)
            table = removal_table(model, test)
        except (ValueError, FileNotFoundError) as error:
            fail(str(error))
        print(f"{run.name}:")
        print(table.round(3).to_string(index=False))
        write_json(arguments.out / f"{run.name}.json", {"run": run.name, **environment("cpu")})
        write_csv(arguments.out / f"{run.name}.csv", table)  # last: where it is, all is


if __name__ == "__main__":
    main()
