"""Draw all figures of a results folder, from its run records and tables, into <results>/figures.

python scripts/figures.py
python scripts/figures.py --network resnet20 --weights resnet20.th       # a trained network's filters too
python scripts/figures.py --network results/runs/<run id> --layer layer2.0.conv1
"""

import argparse
import logging
from pathlib import Path

from cli import fail, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with runs/; gets figures/")
    parser.add_argument("--network", help="first write <results>/filters for this model or run")
    parser.add_argument("--weights", type=weights_file, help="file with the model's trained weights")
    parser.add_argument("--layer", help="the convolution whose eigen-filters are drawn; default: the middle one")
    arguments = parser.parse_args()
    if not arguments.network and (arguments.weights or arguments.layer):
        fail("--weights and --layer belong to a network: name it with --network")
    if not arguments.results.is_dir():
        fail(f"there is no folder {arguments.results}: train something first, or name another with --results")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from decef.models.weights import describe_file
    from decef.results.eigenfilters import write_filters
    from decef.results.figures import draw
    from decef.training.networks import input_size_of, load_network

    try:
        if arguments.network:
            model = load_network(arguments.network, weights=arguments.weights, trained=True)
            given = Path(arguments.network)
            name = given.resolve().name if given.exists() else arguments.network
            write_filters(
                model,
                arguments.results / "filters" / name.replace("/", "-"),
                made_from={
                    "network": name,
                    "weights": describe_file(arguments.weights) if arguments.weights else None,
                },
                input_size=input_size_of(arguments.network),
                layer=arguments.layer,
            )
        for path in draw(arguments.results):
            print(f"wrote {path} and {path.with_suffix('.svg').name}")
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
