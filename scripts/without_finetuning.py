"""Measure a trained network right after decomposition, without fine-tuning, for each layer type and budget.

python scripts/without_finetuning.py resnet20 --weights resnet20-12fca82f.th --out results/without_finetuning/resnet20
python scripts/without_finetuning.py results/runs/<run id> --data FOLDER --out results/without_finetuning/NAME
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli import fail, output_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a name in decef.models.MODELS, for CIFAR-10; or a run's folder, for its data")
    parser.add_argument("--weights", type=weights_file, help="file with trained weights")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1 / 2, 2 / 3, 5 / 6], help="shares of the FLOPs to keep"
    )
    parser.add_argument("--layers", nargs="+", help="layer types; default: all that auto chooses from, and auto")
    what = "per channel, as the network expects; default: those of the run, else ImageNet's"
    parser.add_argument("--mean", type=float, nargs=3, help=what)
    parser.add_argument("--std", type=float, nargs=3, help=what)
    parser.add_argument("--images", type=int, default=512, help="training images to fit outputs on; 0: kernels only")
    parser.add_argument("--data", type=Path, help="folder with the data; default: $DECEF_DATA, data/")
    parser.add_argument("--out", type=output_file, required=True, help="writes <out>.csv and <out>.md")
    arguments = parser.parse_args()

    from decef.data import IMAGENET_MEAN, IMAGENET_STD
    from decef.data.subsets import stratified_subset
    from decef.machine import environment
    from decef.models import stem_name
    from decef.models.weights import describe_file
    from decef.plans import AUTO, AUTO_TYPES
    from decef.results.pages import collect
    from decef.results.without_finetuning import without_finetuning, write_rows
    from decef.training.config import DatasetConfig
    from decef.training.networks import load_network
    from decef.training.record import load_config

    made = environment("cpu")  # now, as the code on disk may change during the run
    name, run = arguments.network, Path(arguments.network)
    trained_on = DatasetConfig("cifar10", crop_padding=4, flip=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def show(row: Mapping[str, Any]) -> None:
        words = " ".join(f"{row[key]:9}" for key in ("layer", "budget", "spread", "nearest"))
        print(f"{words} top-1 {row['top1']:.2f}", flush=True)

    try:
        if run.is_dir():
            config = load_config(run)
            name, trained_on = config.model.name, config.dataset
        elif arguments.weights is None:
            raise ValueError(f"{name} is no run's folder: say --weights FILE, as a random network has nothing to keep")
        model = load_network(arguments.network, weights=arguments.weights)
        if arguments.mean is not None:
            trained_on = replace(trained_on, mean=tuple(arguments.mean))
        if arguments.std is not None:
            trained_on = replace(trained_on, std=tuple(arguments.std))
        train, test = trained_on.load(arguments.data)
        source = f"those of {run.name}" if arguments.weights is None else describe_file(arguments.weights)
        seen = f", {arguments.images} training images" if arguments.images else ""
        about = f"{name} on {trained_on.name}, weights: {source}{seen}"
        measured = without_finetuning(
            model,
            test,
            layers=arguments.layers or [*AUTO_TYPES, AUTO],
            shares=arguments.shares,
            exclude=stem_name(model),
            progress=True,
            seen=stratified_subset(train, arguments.images) if arguments.images else None,
            augmented=train,
        )
        rows = collect(measured, arguments.out, show)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    write_rows(rows, arguments.out, about, made)
    print(f"wrote {arguments.out}.csv and .md")


if __name__ == "__main__":
    main()
