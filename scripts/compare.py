"""Compare runs by seed: how much higher is their test top-1 than that of runs that differ in some settings?

What is not named is the same in both, a rank or budget too; not so a layer type's own options, train.decay and
train.atcd. The others have the usual train.decay, unless --to names another.

python scripts/compare.py model=resnet20 train=standard layer=decef                # than layer=conv2d
python scripts/compare.py model=resnet20 train=standard layer=decef layer.flops=0.667 --to layer=cpac
"""

import argparse
from pathlib import Path

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="of the runs; those not named may be any")
    parser.add_argument(
        "--to", nargs="+", metavar="KEY=VALUE", default=["layer=conv2d"], help="of the others; default: layer=conv2d"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder")
    arguments = parser.parse_args()

    from decef.results.findings import differences_in_top1
    from decef.results.selectors import read_selector
    from decef.training.record import load_records

    try:
        runs = read_selector(arguments.settings)
        found = differences_in_top1(load_records(arguments.results), runs, read_selector(arguments.to))
    except ValueError as error:
        fail(str(error))
    if not found:
        of, to = " ".join(arguments.settings), " ".join(arguments.to)
        fail(f"{arguments.results} has no finished run of {of} that isn't one of {to} too")
    for finding in found:
        print(f"{finding.what}: {finding.result}")
        for comparison in finding.comparisons:
            print(f"  {comparison.words}")
            print(f"  by seed: {', '.join(f'{value:+.2f}' for value in comparison.values)}")


if __name__ == "__main__":
    main()
