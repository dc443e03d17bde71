"""Write the network of a finished run as one safetensors file, to be loaded by `decef.load(NAME)`.

python scripts/release.py results/runs/<run id> resnet20-cifar10-decef-0.667
"""

import argparse
import copy
import re
from pathlib import Path

from cli import fail, output_folder

MOST_LOST = 0.05  # points of accuracy that half precision may cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder that still has its checkpoint")
    parser.add_argument("name", help="what the network is loaded by")
    parser.add_argument(
        "--out", type=output_folder, default=Path("results/networks"), help="folder for <name>.safetensors"
    )
    parser.add_argument("--root", type=Path, help="where the data are; default: as for training")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+", arguments.name):
        fail(f"'{arguments.name}' can't be a network's name: use letters, digits, '.', '_' and '-'")

    from decef.models.released import halved, save
    from decef.training.loop import evaluate
    from decef.training.networks import card_of, load_network
    from decef.training.precision import autocast_for
    from decef.training.record import read_summary

    try:
        network = load_network(str(arguments.run))
        card, data = card_of(arguments.run, arguments.name)
        _, test = data.load(arguments.root)
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(str(error))
    precision = read_summary(arguments.run)["precision"]
    _, again = evaluate(network, test, autocast=autocast_for(test.device, precision))
    assert card.top1 is not None
    if abs(again - card.top1) > max(0.1, 150 / len(test)):  # another machine rounds otherwise: an image in a few
        fail(f"the checkpoint has {again:.2f} % where the record has {card.top1:.2f} %: it is not of this run's end")
    _, whole = evaluate(network, test)
    _, rounded = evaluate(halved(copy.deepcopy(network)), test)
    half = rounded >= whole - MOST_LOST
    path = save(network, card.measured(rounded if half else whole), arguments.out, half=half)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB, {rounded if half else whole:.2f} % on {card.dataset}")


if __name__ == "__main__":
    main()
